"""Where a patch is: learned positions, resampled to other grids, and rotations of queries and keys."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, DTypeLike, Float

from tat_jax.networks.layers import at_least_float32

_BASE = 100.0  # of the periods of rotations, as published


def resample(
    positions: Float[Array, "rows columns channels"], height: int, width: int, *, antialias: bool
) -> Float[Array, "{height} {width} channels"]:
    """Return positions on another grid, y = R x Cᵀ for each channel, in float32 at least.

    Args:
        positions: as they were learned.
        height: rows of the grid.
        width: its columns.
        antialias: as PyTorch's `interpolate(mode="bicubic", antialias=True)`, by which timm resamples; False
            as without, by which the authors of DINOv2 and Hugging Face do where there are no registers.
    """
    if positions.shape[:2] == (height, width):
        return positions
    dtype = at_least_float32(positions.dtype)
    rows, columns = (
        _bicubic(*sizes, antialias).astype(dtype)
        for sizes in ((positions.shape[0], height), (positions.shape[1], width))
    )
    precise = jax.lax.Precision.HIGHEST
    return jnp.einsum("ih,hwc,jw->ijc", rows, positions.astype(dtype), columns, precision=precise)


@functools.cache
def _bicubic(size_in: int, size_out: int, antialias: bool) -> np.ndarray:
    """Return what interpolates `size_in` values at `size_out` places, a row each.

    Keys' kernel has a = −1/2 with antialiasing, as Pillow's, which is as wide as a place and leaves out what
    lies beyond the edges; and −3/4 without, which repeats the values there.
    """
    scale = size_in / size_out
    centres = (np.arange(size_out) + 0.5) * scale - 0.5
    stretch = max(scale, 1.0) if antialias else 1.0
    reach = math.ceil(2 * stretch) + 1
    places = np.floor(centres)[:, None].astype(int) + np.arange(-reach, reach + 1)
    weights = _keys((places - centres[:, None]) / stretch, -0.5 if antialias else -0.75)
    if antialias:
        weights = np.where((places >= 0) & (places < size_in), weights, 0)
        weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (np.arange(size_out)[:, None], places.clip(0, size_in - 1)), weights)
    return matrix


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """Return the kernel of Cubic Convolution Interpolation for Digital Image Processing, Keys, 1981."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def rotations(
    height: int, width: int, head_channels: int, *, prefix: int, dtype: DTypeLike
) -> tuple[Float[Array, "tokens {head_channels}"], Float[Array, "tokens {head_channels}"]]:
    """Return cosines and sines of DINOv3's rotations, in float32 at least; a prefix token's is none.

    The first quarter of the channels turns by a patch's row, the next by its column, each channel with a
    period of its own; the second half of the channels likewise. Patches' centres lie between −1 and 1 along
    both axes, whatever the grid. See `RopePositionEmbedding` of https://github.com/facebookresearch/dinov3,
    which computes centres and periods in float32.

    Args:
        height: rows of the grid.
        width: its columns.
        head_channels: channels of an attention head, which four divides.
        prefix: the number of tokens before those of patches.
        dtype: of activations.
    """
    quarter = head_channels // 4
    powers = 2 * np.arange(quarter, dtype=np.float32) / np.float32(2 * quarter)
    periods = (_BASE ** powers.astype(np.float64)).astype(np.float32)  # rounded once, as PyTorch's are
    centres = [2 * (np.arange(0.5, n, dtype=np.float32) / np.float32(n)) - 1 for n in (height, width)]
    grid = rearrange(np.stack(np.meshgrid(*centres, indexing="ij")), "axes h w -> (h w) axes 1")
    exact = at_least_float32(dtype)
    angles = (2 * math.pi * grid.astype(exact) / periods.astype(exact)).reshape(height * width, 2 * quarter)
    angles = np.pad(np.tile(angles, 2), ((prefix, 0), (0, 0)))
    return jnp.asarray(np.cos(angles), exact), jnp.asarray(np.sin(angles), exact)


def rotate(
    x: Float[Array, "batch heads tokens channels"],
    cosines: Float[Array, "tokens channels"],
    sines: Float[Array, "tokens channels"],
) -> Float[Array, "batch heads tokens channels"]:
    """Return each pair of channels, of which one lies in either half, turned by its angle; in `x`'s type."""
    first, second = jnp.split(x.astype(cosines.dtype), 2, axis=-1)
    halves = jnp.concatenate([-second, first], axis=-1)
    return (x * cosines[None, None] + halves * sines[None, None]).astype(x.dtype)
