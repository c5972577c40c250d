"""The depthwise convolution, as each platform does it best.

XLA's own takes 30 to 44 times as long on a CPU as the sum of shifted maps; docs/benchmarks.md tells more.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.networks.layers import at_least_float32, normal

Maps = Float[Array, "batch height width channels"]
Kernel = Float[Array, "size size 1 channels"]  # of an odd size


class DepthwiseConv(nnx.Conv):
    """Convolve every channel with a kernel of its own, at stride 1, padded so that maps keep their size."""

    bias: nnx.Param[Array]

    def __init__(self, channels: int, size: int, *, deviation: float, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(
            channels,
            channels,
            (size, size),
            feature_group_count=channels,
            dtype=dtype,
            param_dtype=at_least_float32(dtype),
            kernel_init=normal(deviation),
            rngs=rngs,
        )

    def __call__(self, inputs: Maps, out_sharding: None = None) -> Maps:
        """Return the maps, in the type of activations."""
        x, kernel, bias = (a.astype(self.dtype) for a in (inputs, self.kernel[...], self.bias[...]))
        y = jax.lax.platform_dependent(x, kernel, cpu=sum_of_shifted, default=convolve)
        return y + bias[None, None, None]


def convolve(x: Maps, kernel: Kernel) -> Maps:
    """Return the convolution by XLA's own operation."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


@jax.custom_vjp
def sum_of_shifted(x: Maps, kernel: Kernel) -> Maps:
    """Return it as Σ_ij kernel[i, j] · x shifted by (i, j), in float32 at least, row after row of the maps.

    Without a loop, XLA joins half of the terms with the reduction of a LayerNorm behind it, and writes each
    of the other shifted maps to memory.
    """
    size, (height, width) = len(kernel), x.shape[1:3]
    wide, kernel = _padded(x, size), kernel.astype(at_least_float32(x.dtype))

    def write_row(row: Array, maps: Array) -> Array:
        read = jax.lax.dynamic_slice_in_dim(wide, row, size, 1)
        terms = (
            read[:, i : i + 1, j : j + width] * kernel[i : i + 1, j : j + 1]
            for i in range(size)
            for j in range(size)
        )
        total = functools.reduce(operator.add, terms).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(maps, total, row, 1)

    return jax.lax.fori_loop(0, height, write_row, jnp.zeros_like(x))


def _padded(x: Maps, size: int) -> Float[Array, "batch h w channels"]:
    edge = (size // 2, size // 2)
    return jnp.pad(x.astype(at_least_float32(x.dtype)), ((0, 0), edge, edge, (0, 0)))


def _forward(x: Maps, kernel: Kernel) -> tuple[Maps, tuple[Maps, Kernel]]:
    return sum_of_shifted(x, kernel), (x, kernel)


def _backward(given: tuple[Maps, Kernel], by_sum: Maps) -> tuple[Maps, Kernel]:
    """Return the gradients: by `x` the convolution with the kernel turned round; by the kernel row by row.

    By itself JAX would reduce the maps once for each number of a channel's kernel.
    """
    x, kernel = given
    size, (batch, height, width, channels) = len(kernel), x.shape
    wide, by_sum_exact = _padded(x, size), by_sum.astype(at_least_float32(x.dtype))

    def add_row(row: Array, total: Array) -> Array:
        read = jax.lax.dynamic_slice_in_dim(wide, row, size, 1)
        of_row = jax.lax.dynamic_slice_in_dim(by_sum_exact, row, 1, 1)
        return total + sum(read[:, :, i : i + size] * of_row[:, :, i : i + 1] for i in range(width))

    each = jnp.zeros((batch, size, size, channels), wide.dtype)
    by_kernel = jax.lax.fori_loop(0, height, add_row, each).sum(0)[:, :, None]
    return sum_of_shifted(by_sum, kernel[::-1, ::-1]), by_kernel.astype(kernel.dtype)


sum_of_shifted.defvjp(_forward, _backward)
