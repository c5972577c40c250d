"""DeepLabV3+ over ResNet-101 teaches one over MobileNetV2 on COCO-Stuff-10k, by the authors' script."""

from ml_collections import ConfigDict

from tat_jax.configs import base, seg_coco_r18


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = seg_coco_r18.get_config()
    config.batch_size = 12
    config.optimizer.learning_rate = 0.007
    config.student.update({"architecture": "deeplab_mobilenet_v2", "weights": "weights/mobilenet_v2"})
    config.losses.patch_anchor.decoder.update({"weight": 0.4, "patches": (16, 16), "groups": 64})
    return base.finish(config, argument)
