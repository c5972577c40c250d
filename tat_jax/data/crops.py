"""How classification transforms an image, apart from the task, so that processes that read need no JAX."""

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from tat_jax.data import eval_resize
from tat_jax.data.source import Label
from tat_jax.data.transforms import eval_transform, padded_crop, train_transform


def crop(
    image: UInt8[np.ndarray, "height width 3"],
    label: Label,
    rng: np.random.Generator | None,
    data: ConfigDict,
) -> tuple[UInt8[np.ndarray, "size size 3"], Label]:
    """Crop at random and flip; in evaluation resize the shorter side and take the centre.

    Args:
        image: RGB.
        label: is returned as it is.
        rng: is advanced; None is the transform of evaluation.
        data: the config's.
    """
    if rng is None:
        return eval_transform(image, resize=eval_resize(data), size=data.image_size), label
    if padding := data.get("crop_padding"):  # which configs of before do not have
        return padded_crop(image, rng, size=data.image_size, padding=padding, flip=data.flip), label
    return train_transform(
        image, rng, size=data.image_size, scale=data.crop_scale, ratio=data.crop_ratio, flip=data.flip
    ), label
