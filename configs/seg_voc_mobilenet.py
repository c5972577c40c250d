"""DeepLabV3+ over ResNet-101 teaches one over MobileNetV2 on VOC 2012 with SBD, by the authors' script."""

from ml_collections import ConfigDict

from tat_jax.configs import base, seg_voc_r18


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = seg_voc_r18.get_config()
    config.batch_size = 12
    config.optimizer.learning_rate = 0.004
    config.student.update({"architecture": "deeplab_mobilenet_v2", "weights": "weights/mobilenet_v2"})
    config.losses.patch_anchor.decoder.update(
        {"anchor_weight": 0.5, "patches": (32, 32), "groups": 1024, "anchors": (64, 64)}
    )
    return base.finish(config, argument)
