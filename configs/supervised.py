"""A ResNet-34 learns from labels alone, with torchvision's reference recipe: how to get a teacher.

Its run folder serves as `teacher.weights` of another config.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = base.base()
    config.epochs = 90
    config.student.architecture = "resnet34"
    config.optimizer.update(
        {"name": "sgd", "learning_rate": 0.1, "weight_decay": 1e-4, "milestones": (30, 60)}
    )
    return base.finish(config, argument)
