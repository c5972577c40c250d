"""A study without labels: a ResNet-34 teaches a ResNet-18 across two grids, in four ways, over three seeds.

The teacher sees a crop at 224 pixels and has 7 × 7 positions, the student the same crop at 96 and 3 × 3. By
TaT in which the teacher's positions ask, beside what is done today: the student's map resized and matched by
mean squared error or by cosine, and the self-similarity of positions. Each alone with weight 1; none is
tuned. Where `probe` names labelled images, the table has k-NN and a linear probe before and after.
"""

from typing import Any

from ml_collections import ConfigDict

from tat_jax.configs import base, unlabelled


def get_config(argument: str = "") -> ConfigDict:
    """Return the study; `smoke` is its miniature."""
    config = unlabelled.get_config()
    smoke = argument == "smoke"
    config.batch_size = 64
    config.student.image_size = 32 if smoke else 96
    config.losses.tat.layer4.weight = 0.0
    ways: dict[str, dict[str, Any]] = {
        "tat": {"tat": {"asks": "teacher"}},
        "resized": {"resized": {}},
        "resized, cosine": {"resized": {"distance": "cosine"}},
        "self-similarity": {"self_similarity": {}},
    }
    config.study = base.study(
        seeds=(0,) if smoke else (0, 1, 2),
        students={
            way: {"losses": {loss: {"layer4": {"weight": 1.0, **options}} for loss, options in terms.items()}}
            for way, terms in ways.items()
        },
    )
    return base.finish(config, argument)
