"""The stem of a residual network, a 7×7 convolution and a max-pool, as each platform does them best.

What is computed is the same everywhere, but for the order in which terms are added; docs/gpu.md tells what is
gained.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, UInt8

from tat_jax.networks.layers import at_least_float32, he_normal

Maps = Float[Array, "batch height width channels"]
Halved = Float[Array, "batch h w channels"]
Kernel = Float[Array, "7 7 channels features"]


class StemConv(nnx.Conv):
    """Convolve images 7×7 at stride 2 without bias, padded by 3 on every side as in PyTorch."""

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(
            3,
            features,
            (7, 7),
            strides=2,
            padding=((3, 3), (3, 3)),
            use_bias=False,
            dtype=dtype,
            param_dtype=at_least_float32(dtype),
            kernel_init=he_normal,
            rngs=rngs,
        )

    def __call__(self, inputs: Maps, out_sharding: None = None) -> Float[Array, "batch h w features"]:
        """Return ⌈height / 2⌉ × ⌈width / 2⌉ features, in the type of activations."""
        images, kernel = (x.astype(self.dtype) for x in (inputs, self.kernel[...]))
        return jax.lax.platform_dependent(images, kernel, cuda=convolve_blocks, default=convolve)


def convolve(images: Maps, kernel: Kernel) -> Float[Array, "batch h w features"]:
    """Return the convolution at stride 2, as it is written."""
    return jax.lax.conv_general_dilated(
        images, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def convolve_blocks(images: Maps, kernel: Kernel) -> Float[Array, "batch h w features"]:
    """Return the same sums as a 4×4 convolution of the 2×2 blocks of pixels, at stride 1.

    Of a fourth channel, which is zero, and the pixels of a block come 16 channels. cuDNN's fast kernels want
    a multiple of eight, and fill three up with five that are zero.
    """
    _, height, width, channels = images.shape
    zeros = (0, -channels % 4)
    images = jnp.pad(images, ((0, 0), (0, height % 2), (0, width % 2), zeros))
    blocks = rearrange(images, "b (h i) (w j) c -> b h w (i j c)", i=2, j=2)
    # An output reads from three pixels before its block to three after the block's first.
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), zeros, (0, 0)))
    kernel = rearrange(kernel, "(h i) (w j) c f -> h w (i j c) f", i=2, j=2)
    return jax.lax.conv_general_dilated(
        blocks, kernel, (1, 1), ((2, 1), (2, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def max_pool(x: Maps) -> Halved:
    """Return the maxima of 3×3 windows at stride 2, padded by 1 on every side.

    The first of equal values, row by row, takes the whole gradient, as in PyTorch.
    """
    return jax.lax.platform_dependent(x, cpu=max_of_shifted, cuda=max_by_place, default=max_of_windows)


def max_of_windows(x: Maps) -> Halved:
    """Return them by XLA's own operation, whose gradient is a scatter."""
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def max_of_shifted(x: Maps) -> Halved:
    """Return them as maxima of shifted maps, the rows' of the columns'."""
    for axis in (2, 1):  # so that the first of equal values is that of PyTorch, which reads row by row
        size = (x.shape[axis] + 1) // 2
        padding = [(0, 0)] * 4
        padding[axis] = (1, 2 * size - x.shape[axis])
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        first, second, third = (
            jax.lax.slice_in_dim(padded, start, start + 2 * size - 1, stride=2, axis=axis)
            for start in range(3)
        )
        # The first of equal values takes the whole gradient; jnp.maximum would share it out.
        x = jnp.where(first >= second, first, second)
        x = jnp.where(x >= third, x, third)
    return x


def max_by_place(x: Maps) -> Halved:
    """Return them; the gradient goes where each was found, which is written down in a byte each."""
    _, height, width, _ = x.shape
    edges = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    return _max_of_even(jnp.pad(x, edges, constant_values=-jnp.inf))


@jax.custom_vjp
def _max_of_even(x: Maps) -> Halved:
    return max_of_windows(x)


def _forward(x: Maps) -> tuple[Halved, UInt8[Array, "batch h w channels"]]:
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)

    def at(place: int) -> Halved:
        row, column = divmod(place, 3)
        return padded[:, row : row + height - 1 : 2, column : column + width - 1 : 2]

    found = at(0)
    where = jnp.zeros(found.shape, jnp.uint8)
    for place in range(1, 9):
        here = at(place)
        larger = (here > found) | jnp.isnan(here)
        found, where = jnp.where(larger, here, found), jnp.where(larger, jnp.uint8(place), where)
    return found, where


def _backward(where: UInt8[Array, "batch h w channels"], by_found: Halved) -> tuple[Maps]:
    """Return what each pixel gets of the windows that it lies in: one, two or four, by its row and column."""

    def to(row: int, column: int) -> Array:
        return jnp.where(where == 3 * row + column, by_found.astype(at_least_float32(by_found.dtype)), 0)

    def of_next(x: Array, axis: int) -> Array:
        edges = [(0, 0)] * 4
        edges[axis] = (0, 1)
        return jnp.pad(jax.lax.slice_in_dim(x, 1, None, axis=axis), edges)

    even = to(1, 1), to(1, 2) + of_next(to(1, 0), 2)
    odd = (
        to(2, 1) + of_next(to(0, 1), 1),
        to(2, 2) + of_next(to(2, 0), 2) + of_next(to(0, 2) + of_next(to(0, 0), 2), 1),
    )
    rows = jnp.stack([jnp.stack(row, axis=3) for row in (even, odd)], axis=2)
    return (rearrange(rows, "b h i w j c -> b (h i) (w j) c").astype(by_found.dtype),)


_max_of_even.defvjp(_forward, _backward)
