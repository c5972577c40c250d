"""Bilinear interpolation with aligned corners, which `jax.image.resize` does not know."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, DTypeLike, Float, Int

from tat_jax.networks.layers import at_least_float32


def matrix(
    size_in: int, size_out: int, *, dtype: DTypeLike = jnp.float32
) -> Float[Array, "{size_out} {size_in}"]:
    """Return what interpolates `size_in` values linearly at `size_out` places, see `aligned_places`."""
    below, share = (x[:, None] for x in aligned_places(size_in, size_out, jnp.arange(size_out), dtype=dtype))
    columns = jnp.arange(size_in)[None]
    return jnp.where(columns == below, 1 - share, jnp.where(columns == below + 1, share, 0))


def aligned_places(
    size_in: int, size_out: int | Int[Array, ""], places: Int[Array, " places"], *, dtype: DTypeLike
) -> tuple[Int[Array, " places"], Float[Array, " places"]]:
    """Return below which of `size_in` values each of `size_out` places lies, and its way to the next value.

    Place i is at i · (size_in − 1) / (size_out − 1), so that the first and the last are aligned, as PyTorch's
    `align_corners=True` has it; it is divided in whole numbers, so that the way is rounded once, and no place
    to the other side of a value.

    Args:
        size_in: the number of values.
        size_out: the number of places; it may be known on the device alone.
        places: those wanted, less than `size_out`.
        dtype: of the ways.
    """
    steps = jnp.maximum(size_out - 1, 1)
    below, rest = jnp.divmod(places * (size_in - 1), steps)
    return below, rest.astype(dtype) / steps.astype(dtype)


def interpolate(
    x: Float[Array, "batch h w channels"], height: int, width: int
) -> Float[Array, "batch {height} {width} channels"]:
    """Return maps of another size, y = R x Cᵀ for each channel, in float32 at least."""
    dtype = at_least_float32(x.dtype)
    rows, columns = (matrix(*sizes, dtype=dtype) for sizes in ((x.shape[1], height), (x.shape[2], width)))
    precise = jax.lax.Precision.HIGHEST
    x = jnp.einsum("ih,bhwc->biwc", rows, x.astype(dtype), precision=precise)
    return jnp.einsum("jw,biwc->bijc", columns, x, precision=precise)


def convolve_interpolated(
    x: Float[Array, "batch h w channels"],
    kernel: Float[Array, "size size channels features"],
    height: int,
    width: int,
) -> Float[Array, "batch {height} {width} features"]:
    """Return the convolution of what `interpolate` returns, without the large maps, in float32 at least.

    Channels are mixed before: y = Σ_uv R_u (x K_uv) C_vᵀ, where R_u are the rows of R moved by u − size // 2,
    with zeros beyond the edges. For 3×3 kernels and maps that become four times as large along both sides, it
    takes a seventh of the operations.

    Args:
        x: the small maps.
        kernel: of an odd size, in the type of the products.
        height: of the large maps.
        width: likewise.
    """
    dtype = at_least_float32(x.dtype)
    size = len(kernel)
    rows, columns = (
        _moved(matrix(*sizes, dtype=dtype), size) for sizes in ((x.shape[1], height), (x.shape[2], width))
    )
    # Kernel columns lie beside those of the map, so that each of the two sums is one matrix product.
    mixed = jnp.einsum("bhwc,uvco->buhvwo", x, kernel.astype(x.dtype)).astype(dtype)
    mixed = rearrange(mixed, "b u h v w o -> b (u h) (v w) o")
    precise = jax.lax.Precision.HIGHEST
    mixed = jnp.einsum("ih,bhwo->biwo", rows, mixed, precision=precise)
    return jnp.einsum("jw,biwo->bijo", columns, mixed, precision=precise)


def _moved(rows: Float[Array, "large small"], size: int) -> Float[Array, "large moved"]:
    """Return rows moved by −(size // 2) … size // 2, side by side."""
    padded = jnp.pad(rows, ((size // 2, size // 2), (0, 0)))
    return jnp.concatenate([padded[u : u + len(rows)] for u in range(size)], axis=1)
