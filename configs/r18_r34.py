"""ResNet-34 teaches ResNet-18 on ImageNet, as the authors' published configuration does.

0.1 · cross-entropy + 0.2 · TaT on layer4 with one head; eight GPUs of 256 images each.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = base.base()
    config.batch_size = 2048
    config.bn_group = 256
    config.student.weights = "weights/resnet18"
    config.loss.update({"alpha": 0.1, "beta": 0.0})
    config.tat.layer4.weight = 0.2
    return base.finish(config, argument)
