"""Each kind of convolution of a ResNet-18 at 224², forward and its two gradients: ours beside PyTorch's.

`python -m proofs.bench.convolutions [--json FILE]`. Batch 16 in float32 on a CPU, compiled as the training
step is; PyTorch is channels-last. It tells where the step's time goes.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import torch
from einops import rearrange

from proofs.bench.sidebyside import Row, compare_times, main
from proofs.report import announce
from tat_jax.step import CPU_OPTIONS

BATCH = 16


class Convolution(NamedTuple):
    """A convolution without bias, padded by half its size.

    Attributes:
        side: of the maps that it reads.
        channels: that it reads.
        features: that it writes.
        size: of its windows.
        stride: of its windows.
    """

    side: int
    channels: int
    features: int
    size: int
    stride: int

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.size}×{self.size}{stride}, {self.side}² × {self.channels} → {self.features}"


KINDS = (
    Convolution(224, 3, 64, 7, 2),
    Convolution(56, 64, 64, 3, 1),
    Convolution(56, 64, 128, 3, 2),
    Convolution(28, 128, 128, 3, 1),
    Convolution(14, 256, 256, 3, 1),
    Convolution(7, 512, 512, 3, 1),
)


def measure() -> list[Row]:
    """Compare every kind; of the first the images need no gradient."""
    jax.config.update("jax_platforms", "cpu")
    return [row for kind in KINDS for row in measure_one(kind, images=kind.channels > 3)]


def measure_one(kind: Convolution, *, images: bool, batch: int = BATCH) -> list[Row]:
    """Compare one kind: forward, the gradient of its kernel and, if asked for, that of what it reads."""
    announce(str(kind))
    rng = np.random.default_rng(0)
    x = rng.random((batch, kind.side, kind.side, kind.channels), np.float32)
    kernel = rng.random((kind.size, kind.size, kind.channels, kind.features), np.float32)
    ours, theirs = _ours(kind, x, kernel), _pytorch(kind, x, kernel)
    names = ("forward", "kernel's gradient", "input's gradient")[: 3 if images else 2]
    return [compare_times(f"{kind}: {name}", ours[name], theirs[name], bound=None) for name in names]


def _ours(kind: Convolution, x: np.ndarray, kernel: np.ndarray) -> dict[str, Callable[[], object]]:
    padding = ((kind.size // 2,) * 2,) * 2
    strides = (kind.stride,) * 2

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)

    def by_kernel(x: jax.Array, kernel: jax.Array, by_out: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](by_out)[0]

    def by_input(x: jax.Array, kernel: jax.Array, by_out: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: convolve(x, kernel), x)[1](by_out)[0]

    def called(function: Callable[..., jax.Array], *arrays: jax.Array) -> Callable[[], object]:
        program = jax.jit(function).lower(*arrays).compile(compiler_options=CPU_OPTIONS)
        return lambda: program(*arrays).block_until_ready()

    arrays = jax.device_put(x), jax.device_put(kernel)
    by_out = jax.numpy.ones_like(convolve(*arrays))
    return {
        "forward": called(convolve, *arrays),
        "kernel's gradient": called(by_kernel, *arrays, by_out),
        "input's gradient": called(by_input, *arrays, by_out),
    }


def _pytorch(kind: Convolution, x: np.ndarray, kernel: np.ndarray) -> dict[str, Callable[[], object]]:
    maps, weight = (
        torch.from_numpy(rearrange(array, how).copy()).contiguous(memory_format=torch.channels_last)
        for array, how in ((x, "b h w c -> b c h w"), (kernel, "h w c f -> f c h w"))
    )
    stride, padding = (kind.stride,) * 2, (kind.size // 2,) * 2

    def forward() -> torch.Tensor:
        return torch.nn.functional.conv2d(maps, weight, None, stride, padding)

    def backward(mask: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            by_out, maps, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask
        )

    by_out = torch.ones_like(forward())
    return {
        "forward": forward,
        "kernel's gradient": backward([False, True, False]),
        "input's gradient": backward([True, False, False]),
    }


if __name__ == "__main__":
    main(__doc__, measure)
