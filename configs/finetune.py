"""Pretrained networks learn the classes of a small folder of images, a hundred of each class, say.

What is new, the head and what the losses hold, learns ten times as fast as what is pretrained. A ResNet-18 by
cross-entropy, if nothing else is said; `student.weights` may be a run without labels, whose student has no
head yet, as runs/unlabelled. Another `student.architecture` and `student.weights` make a teacher.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = base.base()
    config.epochs = 10
    config.batch_size = 32
    config.log_every = 10
    config.student.weights = "weights/resnet18"
    config.teacher.weights = "runs/teacher"
    config.optimizer.update(
        {
            "learning_rate": 1e-4,
            "schedule": "cosine",
            "warmup_epochs": 1.0,
            "rates": (("student.network.fc", 10.0), ("losses", 10.0)),
        }
    )
    config.data.crop_scale = (0.35, 1.0)  # an eighth of a photograph shows a class that is learned from many
    config.losses.cross_entropy.weight = 1.0
    return base.finish(config, argument)
