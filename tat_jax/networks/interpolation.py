"""Bilinear interpolation with aligned corners, which `jax.image.resize` does not know."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from tat_jax.networks.layers import at_least_float32


def matrix(
    size_in: int,
    size_out: int | Int[Array, ""],
    *,
    rows: Int[Array, " rows"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "rows {size_in}"]:
    """Return what interpolates `size_in` values linearly at `size_out` places, the first and last aligned.

    Row i has the two weights of place i · (size_in − 1) / (size_out − 1), as PyTorch's `align_corners=True`;
    the place is divided in whole numbers, so that weights are rounded once.

    Args:
        size_in: the number of values.
        size_out: the number of places; it may be known on the device alone if `rows` is given.
        rows: those wanted; None is all. A row from `size_out` on has no place, and means nothing.
        dtype: of the weights.
    """
    rows = jnp.arange(size_out) if rows is None else rows
    steps = jnp.maximum(size_out - 1, 1)
    below, rest = jnp.divmod(rows[:, None] * (size_in - 1), steps)
    share = rest.astype(dtype) / steps.astype(dtype)
    columns = jnp.arange(size_in)[None]
    return jnp.where(columns == below, 1 - share, jnp.where(columns == below + 1, share, 0))


def interpolate(
    x: Float[Array, "batch h w channels"], height: int, width: int
) -> Float[Array, "batch {height} {width} channels"]:
    """Return maps of another size, y = R x Cᵀ for each channel, in float32 at least."""
    dtype = at_least_float32(x.dtype)
    rows, columns = (matrix(*sizes, dtype=dtype) for sizes in ((x.shape[1], height), (x.shape[2], width)))
    precise = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc->biwc", rows, x.astype(dtype), precision=precise)
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=precise)
