"""DINOv2's ViT-B/14 teaches a ResNet-18 on your own images, which nobody labelled, at 224 pixels.

Its 16 × 16 patches ask, and the student's 7 × 7 positions answer. Scores are scaled and targets standardised,
as features so wide ask for. The weights, under timm's names or Hugging Face's:

    python -m tat_jax.convert vit_base_patch14_dinov2 --from FILE --to weights/vit_base_patch14_dinov2

See `unlabelled` for what is measured and how the student gets a head afterwards.
"""

from typing import Any

from ml_collections import ConfigDict

from tat_jax.configs import base, unlabelled

UNDER_PATCHES: dict[str, Any] = {
    "teacher_tap": "norm",
    "asks": "teacher",
    "embedding_kernel": 1,
    "scale": "1/sqrt(d)",
    "target_norm": "channel",
}


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = unlabelled.get_config()
    config.dtype = "bfloat16"
    config.teacher = base.network("vit_base_patch14_dinov2", "weights/vit_base_patch14_dinov2")
    config.losses.tat.layer4 = base.loss("tat", weight=1.0, **UNDER_PATCHES)
    if argument == "smoke":
        config.teacher.image_size = 56  # of the images of 64, which patches of 14 do not fill
    return base.finish(config, argument)
