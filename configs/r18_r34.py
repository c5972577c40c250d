"""ResNet-34 teaches ResNet-18 on ImageNet, as the authors' published configuration does.

0.1 · cross-entropy + 0.2 · TaT on layer4 with one head; eight GPUs of 256 images each.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = base.base()
    config.batch_size = 2048
    config.bn_group = 256
    config.student.weights = "weights/resnet18"
    config.losses.cross_entropy.weight = 0.1
    config.losses.tat.layer4.weight = 0.2
    return base.finish(config, argument)
