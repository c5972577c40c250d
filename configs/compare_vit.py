"""A study on a small folder: a vision transformer, trained there, teaches a ResNet-18 of another grid.

The transformer sees a crop at 96 pixels and has 6 × 6 patches, the student the same crop at 32 and 4 × 4
positions. Cross-entropy alone, with KD, with TaT in which the patches ask, and with the student's map resized
and matched, as is done today; over three seeds, none tuned.
"""

from typing import Any

from ml_collections import ConfigDict

from tat_jax.configs import base, dinov2_r18


def get_config(argument: str = "") -> ConfigDict:
    """Return the study; `smoke` is its miniature."""
    config = base.base()
    config.epochs = 10
    config.batch_size = 64
    config.eval_every = 5
    config.optimizer.update({"learning_rate": 1e-3, "schedule": "cosine", "warmup_epochs": 1.0})
    config.data.update(
        {
            "source": "imagefolder",
            "root": "data/images",
            "image_size": 96,
            "eval_resize": 96,
            "crop_scale": (0.6, 1.0),
        }
    )
    config.student.update({"small_images": True, "width": 16, "image_size": 32})
    config.teacher = base.network("vit_tiny_patch16_224", "random", depth=4, embed_dim=128, image_size=96)
    config = base.finish(config, argument)
    trained = ("architecture", "depth", "embed_dim", "image_size", "small_images", "width")
    ways: dict[str, dict[str, Any]] = {
        "cross-entropy": {},
        "kd": {"kd": {"weight": 1.0, "temperature": 4.0}},
        "tat": {"tat": {"layer4": {"weight": 1.0, **dinov2_r18.UNDER_PATCHES}}},
        "resized": {"resized": {"layer4": {"weight": 1.0, "teacher_tap": "norm"}}},
    }
    smoke = argument == "smoke"
    config.study = base.study(
        seeds=(0,) if smoke else (0, 1, 2),
        teacher={
            "epochs": 1 if smoke else 30,
            "student": {name: config.teacher[name] for name in trained},
        },
        students={way: {"losses": terms} for way, terms in ways.items()},
    )
    return config
