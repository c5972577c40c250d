"""Mixup and CutMix: each image of a batch is mixed with its neighbour, within the step and from the seed.

mixup: Beyond Empirical Risk Minimization, Zhang et al., 2018; CutMix: Regularization Strategy to Train Strong
Classifiers with Localizable Features, Yun et al., 2019. As in timm's `Mixup` of mode "batch", all images of a
batch have one λ and one box, and where both are on, one of the two is drawn for each batch. The order of an
epoch is random, and so is the neighbour: rows 0 and 1 are mixed with each other, 2 and 3, and so on. A
neighbour lies on the same device wherever that has an even number of rows, so that devices send each other
nothing. An image without a neighbour that counts, as padding does not, stays as it is.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from tat_jax.batch import Batch, Images, MixedLabels
from tat_jax.networks.layers import at_least_float32

_STREAM = zlib.crc32(b"mixing")  # beside all else that is drawn from the seed
# Weights of pixels are whole numbers out of so many: all devices and compilers mix the same, to the bit.
_WHOLE = 2**16
_SWITCH = 0.5  # how often it is CutMix, where both are on; timm's

Box = tuple[Array, Array, Array, Array]


class Mixing(NamedTuple):
    """How images are mixed.

    Attributes:
        mixup: α, of mixup's λ ~ Beta(α, α); 0 is no mixup.
        cutmix: likewise of CutMix; one of the two is not 0.
        seed: of what is drawn.
    """

    mixup: float
    cutmix: float
    seed: int


def mix(mixing: Mixing, step: Int[Array, ""], batch: Batch) -> Batch:
    """Return a batch whose images and labels are mixed with their neighbours'.

    mixup: image ← λ · image + (1 − λ) · neighbour. CutMix: within a box of 1 − λ of the image's area, as far
    as it lies within the image, image ← neighbour; λ ← the share of the image that is left. Images in uint8
    are rounded to whole numbers, half up, so that each network normalises them by its own statistics; λ is a
    multiple of 2⁻¹⁶. The loss of a label becomes λ · loss(label) + (1 − λ) · loss(label of the neighbour).

    Args:
        mixing: what is drawn.
        step: of the training. It and the seed decide all, whatever was before.
        batch: as the data has it.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(mixing.seed), _STREAM), step)
    weights, share = _draw(mixing, key, *batch.image.shape[1:3])
    where = jnp.asarray(batch.where)
    mixed = where & neighbours(where) & (jnp.arange(len(where)) ^ 1 < len(where))
    weights = jnp.where(rearrange(mixed, "b -> b 1 1 1"), rearrange(weights, "h w -> 1 h w 1"), _WHOLE)
    image = _weighted(weights, *_pair(batch.image, mixed))
    if batch.label is None:
        return batch._replace(image=image)
    labels = MixedLabels(*_pair(batch.label, mixed), jnp.where(mixed, share, 1.0))
    return batch._replace(image=image, label=labels)


def _pair(rows: Any, mixed: Bool[Array, " batch"]) -> tuple[Array, Array]:
    """Return rows, and with what each is mixed: its neighbour, or nothing but itself."""
    rows = jnp.asarray(rows)
    return rows, jnp.where(rearrange(mixed, f"b -> b{' 1' * (rows.ndim - 1)}"), neighbours(rows), rows)


def neighbours(rows: Array) -> Array:
    """Return rows 1, 0, 3, 2 and so on; the last of an odd number is its own neighbour."""
    even = len(rows) - len(rows) % 2
    pairs = rearrange(rows[:even], "(pair two) ... -> pair two ...", two=2)
    swapped = rearrange(pairs[:, ::-1], "pair two ... -> (pair two) ...")
    return jnp.concatenate([swapped, rows[even:]]) if even < len(rows) else swapped


def cut(share: Float[Array, ""], centre: tuple[Array, Array], height: int, width: int) -> Box:
    """Return top, bottom, left and right of the box of 1 − `share` of an image around a centre, within it.

    As the published code of CutMix and timm's: sides of ⌊side · √(1 − share)⌋.
    """
    ends = []
    for middle, side in zip(centre, (height, width), strict=True):
        length = (side * jnp.sqrt(1 - share)).astype(jnp.int32)
        ends += [jnp.clip(middle - length // 2, 0, side), jnp.clip(middle + (length + 1) // 2, 0, side)]
    top, bottom, left, right = ends
    return top, bottom, left, right


def _draw(
    mixing: Mixing, key: Array, height: int, width: int
) -> tuple[Int[Array, "height width"], Float[Array, ""]]:
    """Return the weight of an image's own pixels, out of `_WHOLE`, and the share of its own label."""
    of_share, of_kind, *of_centre = jax.random.split(key, 4)
    is_cut = jax.random.bernoulli(of_kind, _SWITCH) if mixing.mixup and mixing.cutmix else mixing.cutmix > 0
    alpha = jnp.where(is_cut, mixing.cutmix, mixing.mixup).astype(jnp.float32)
    # In float32 whatever the compute type, of which the images that are seen are then no matter.
    drawn = jax.random.beta(of_share, alpha, alpha, dtype=jnp.float32)
    of_whole = jnp.round(drawn * _WHOLE).astype(jnp.int32)
    share = of_whole.astype(jnp.float32) / _WHOLE
    if not mixing.cutmix:
        return jnp.full((height, width), of_whole), share
    middle, centre = (
        jax.random.randint(k, (), 0, side, jnp.int32)
        for k, side in zip(of_centre, (height, width), strict=True)
    )
    top, bottom, left, right = cut(share, (middle, centre), height, width)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    area = ((bottom - top) * (right - left)).astype(jnp.float32)
    outside = 1 - area / (height * width)
    return jnp.where(is_cut, jnp.where(inside, 0, _WHOLE), of_whole), jnp.where(is_cut, outside, share)


def _weighted(weights: Int[Array, "..."], image: Array, other: Array) -> Images:
    """Return weights · image + (1 − weights) · other in the images' type."""
    if image.dtype == jnp.uint8:
        total = weights * image.astype(jnp.int32) + (_WHOLE - weights) * other.astype(jnp.int32)
        return ((total + _WHOLE // 2) // _WHOLE).astype(jnp.uint8)
    share = weights.astype(at_least_float32(image.dtype)) / _WHOLE
    return (share * image + (1 - share) * other).astype(image.dtype)
