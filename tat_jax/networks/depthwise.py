"""The depthwise convolution, as each platform does it best.

XLA's own takes 6 to 44 times as long on a CPU as the sum of shifted maps; docs/benchmarks.md tells more.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tat_jax.networks.precision import at_least_float32

Maps = Float[Array, "batch height width channels"]
Out = Float[Array, "batch h w channels"]
Kernel = Float[Array, "size size 1 channels"]


def depthwise_conv(
    x: Maps,
    kernel: Kernel,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    rhs_dilation: Sequence[int],
    **of_xla: Any,
) -> Out:
    """Convolve every channel with a kernel of its own, as `nnx.Conv(conv_general_dilated=…)` calls it.

    Stride and dilation are those of both sides.
    """

    def by_xla(x: Maps, kernel: Kernel) -> Out:
        return jax.lax.conv_general_dilated(
            x, kernel, window_strides, padding, rhs_dilation=rhs_dilation, **of_xla
        )

    def by_sum(x: Maps, kernel: Kernel) -> Out:
        wide = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        return sum_of_shifted(wide, kernel, window_strides[0], rhs_dilation[0])

    return jax.lax.platform_dependent(x, kernel, cpu=by_sum, default=by_xla)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def sum_of_shifted(x: Maps, kernel: Kernel, stride: int = 1, dilation: int = 1) -> Out:
    """Return the convolution without padding as Σ_ij kernel[i, j] · x shifted by (i, j), row after row.

    Without a loop, XLA joins half of the terms with the reduction of a LayerNorm behind it, and writes each
    of the other shifted maps to memory. Computed in float32 at least, returned in the type of `x`.
    """
    size, reach = len(kernel), _reach(kernel, dilation)
    height, width = ((side - reach) // stride + 1 for side in x.shape[1:3])
    span = stride * (width - 1) + 1  # of a row, that one number of the kernel meets
    exact, kernel = (a.astype(at_least_float32(x.dtype)) for a in (x, kernel))

    def write_row(row: Array, maps: Array) -> Array:
        read = jax.lax.dynamic_slice_in_dim(exact, row * stride, reach, 1)[:, ::dilation]
        terms = (
            read[:, i : i + 1, j * dilation :][:, :, :span:stride] * kernel[i : i + 1, j : j + 1]
            for i in range(size)
            for j in range(size)
        )
        total = functools.reduce(operator.add, terms).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(maps, total, row, 1)

    maps = jnp.zeros((len(x), height, width, x.shape[-1]), x.dtype)
    return jax.lax.fori_loop(0, height, write_row, maps)


def _reach(kernel: Kernel, dilation: int) -> int:
    """Return how many rows of a map a kernel reads."""
    return (len(kernel) - 1) * dilation + 1


def _forward(x: Maps, kernel: Kernel, stride: int, dilation: int) -> tuple[Out, tuple[Maps, Kernel]]:
    return sum_of_shifted(x, kernel, stride, dilation), (x, kernel)


def _backward(stride: int, dilation: int, given: tuple[Maps, Kernel], by_out: Out) -> tuple[Maps, Kernel]:
    """Return the gradient by `x`, a convolution with the kernel turned round, and that by the kernel.

    By itself JAX would reduce the maps once for each number of a channel's kernel.
    """
    x, kernel = given
    edge = _reach(kernel, dilation) - 1
    sides = zip(x.shape[1:3], by_out.shape[1:3], strict=True)
    around = [(edge, side - stride * (out - 1) - 1, stride - 1) for side, out in sides]
    spread = jax.lax.pad(by_out, jnp.zeros((), by_out.dtype), ((0, 0, 0), *around, (0, 0, 0)))
    by_x = sum_of_shifted(spread, kernel[::-1, ::-1], 1, dilation)
    return by_x, _by_kernel(x, kernel, by_out, stride, dilation)


def _by_kernel(x: Maps, kernel: Kernel, by_out: Out, stride: int, dilation: int) -> Kernel:
    """Return the gradient by the kernel, position after position."""
    size, reach = len(kernel), _reach(kernel, dilation)
    batch, height, width, channels = by_out.shape
    x, by_out = (a.astype(at_least_float32(a.dtype)) for a in (x, by_out))

    def add_row(row: Array, total: Array) -> Array:
        read = jax.lax.dynamic_slice_in_dim(x, row * stride, reach, 1)[:, ::dilation]
        of_row = jax.lax.dynamic_slice_in_dim(by_out, row, 1, 1)

        def add(column: Array, total: Array) -> Array:
            window = jax.lax.dynamic_slice_in_dim(read, column * stride, reach, 2)[:, :, ::dilation]
            return total + window * jax.lax.dynamic_slice_in_dim(of_row, column, 1, 2)

        return jax.lax.fori_loop(0, width, add, total)

    each = jnp.zeros((batch, size, size, channels), x.dtype)
    return jax.lax.fori_loop(0, height, add_row, each).sum(0)[:, :, None].astype(kernel.dtype)


sum_of_shifted.defvjp(_forward, _backward)
