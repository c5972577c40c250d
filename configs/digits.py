"""The demonstration: one teacher and its students on scikit-learn's handwritten digits.

The teacher sees every label; students of one architecture see a few of each class, and learn by
cross-entropy alone, with KD, and with TaT, over several seeds. All through the code that trains ImageNet.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base


def get_config(argument: str = "") -> ConfigDict:
    """Return the study; `smoke` is its miniature."""
    config = base.base()
    config.epochs = 80
    config.batch_size = 50
    config.eval_every = 20
    config.log_every = 5
    config.student = base.network("resnet18", "random", small_images=True, width=8)
    config.teacher = base.network("resnet18", "random", small_images=True, width=16)
    config.optimizer.update({"learning_rate": 3e-3, "milestones": (56, 72)})
    config.data.update(
        {
            "source": "digits",
            "labels_per_class": 5,
            "image_size": 16,
            "eval_resize": 16,
            "crop_scale": (0.6, 1.0),
            "flip": False,  # a mirrored 2 is no digit
            "threads": 2,
        }
    )
    config.study = base.study(
        seeds=(0, 1, 2),
        # What differs from the above, for the teacher and for each kind of student.
        teacher={
            "epochs": 8,
            "student": {"width": 16},
            "eval_every": 4,
            "optimizer": {"milestones": (5, 7)},
            "data": {"labels_per_class": 100},
        },
        students={
            "cross-entropy": {},
            "kd": {"losses": {"cross_entropy": {"weight": 0.5}, "kd": {"weight": 0.5, "temperature": 4.0}}},
            "tat": {"losses": {"tat": {"layer3": {"weight": 1.0}, "layer4": {"weight": 1.0}}}},
        },
    )
    if argument == "smoke":
        config.study.update({"seeds": (0,)})
        config.study.teacher.update({"epochs": 1, "student": {"width": 8}, "data": {"labels_per_class": 3}})
    return base.finish(config, argument)
