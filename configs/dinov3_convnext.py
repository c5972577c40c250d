"""DINOv3's ViT-B/16 teaches a ConvNeXt-T on your own images, which nobody labelled, at 256 pixels.

Its 16 × 16 patches ask, and the student's 8 × 8 positions answer. Scores are scaled and targets standardised,
as features so wide ask for. The weights, whose licence Meta wants accepted first, under timm's names or
Hugging Face's:

    python -m tat_jax.convert vit_base_patch16_dinov3 --from FILE --to weights/vit_base_patch16_dinov3

See `unlabelled` for what is measured and how the student gets a head afterwards.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base, unlabelled
from tat_jax.configs.dinov2_r18 import UNDER_PATCHES


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = unlabelled.get_config()
    config.dtype = "bfloat16"
    config.data.image_size = 256
    config.student = base.network("convnext_tiny", "random")
    config.teacher = base.network("vit_base_patch16_dinov3", "weights/vit_base_patch16_dinov3")
    config.losses.tat.layer4.weight = 0.0
    config.losses.tat.stage3 = base.loss("tat", weight=1.0, **UNDER_PATCHES)
    return base.finish(config, argument)
