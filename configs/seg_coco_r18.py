"""DeepLabV3+ over ResNet-101 teaches one over ResNet-18 on COCO-Stuff-10k, as the authors' script does.

L = CE/B + α/B · Σ over images of (β · patch groups + γ · anchor points), with the means over a batch of B
images; the teacher is in training mode, and both leave out the dropout of ASPP.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base, seg_teacher


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = seg_teacher.get_config()
    config.epochs = 100
    config.optimizer.update({"learning_rate": 0.01, "schedule": "cosine"})
    config.student.update({"architecture": "deeplab_resnet18", "weights": "weights/resnet18"})
    config.teacher.weights = "runs/seg_teacher"
    config.teacher_mode = "train"
    config.student.aspp_dropout = config.teacher.aspp_dropout = False
    config.losses.patch_anchor.decoder.update(
        {"weight": 0.6, "anchor_weight": 1.0, "patches": (32, 32), "groups": 512, "anchors": (32, 32)}
    )
    return base.finish(config, argument)
