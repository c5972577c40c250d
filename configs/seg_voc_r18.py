"""DeepLabV3+ over ResNet-101 teaches one over ResNet-18 on VOC 2012 with SBD, by the authors' script."""

from ml_collections import ConfigDict

from tat_jax.configs import base, seg_coco_r18


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = seg_coco_r18.get_config()
    config.optimizer.learning_rate = 0.007
    config.teacher.weights = "weights/deeplab_resnet101"
    config.losses.patch_anchor.decoder.update(
        {"weight": 0.1, "anchor_weight": 0.4, "patches": (16, 16), "groups": 64}
    )
    config.data.update(
        {
            "source": "voc",
            "root": "data/VOCdevkit/VOC2012",
            "sbd_root": "data/benchmark_RELEASE",
            "pad_label": "background",
        }
    )
    return base.finish(config, argument)
