"""Each kind of convolution of a network, forward and its two gradients: ours beside PyTorch's.

`python -m proofs.bench.convolutions [NETWORK …] [--json FILE]`. ResNet-18 at 224², batch 16, what DeepLabV3+
adds to it at 513², batch 2, CIFAR's ResNet-32×4 at 32², batch 64, and the depthwise ones of ConvNeXt-T and
MobileNetV2 at 224², batch 8; else all. In float32 on a CPU, compiled as the training step is; PyTorch is
channels-last. It tells where the step's time goes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import torch
from einops import rearrange

from proofs.bench.sidebyside import Row, compare_times, main
from proofs.command import add_parts
from proofs.report import announce
from tat_jax.networks.depthwise import depthwise_conv
from tat_jax.step import CPU_OPTIONS


class Convolution(NamedTuple):
    """A convolution without bias, padded so that without a stride the map stays as large.

    Attributes:
        side: of the maps that it reads.
        channels: that it reads.
        features: that it writes.
        size: of its windows.
        stride: of its windows.
        dilation: of its windows.
        depthwise: each channel has a kernel of its own.
    """

    side: int
    channels: int
    features: int
    size: int
    stride: int = 1
    dilation: int = 1
    depthwise: bool = False

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        dilation = f", dilation {self.dilation}" if self.dilation > 1 else ""
        window = f"{self.size}×{self.size}{stride}{dilation}"
        if self.depthwise:
            return f"{window} depthwise, {self.side}² × {self.channels}"
        return f"{window}, {self.side}² × {self.channels} → {self.features}"

    @property
    def padding(self) -> tuple[int, int]:
        """Return the padding above and below, and left and right."""
        return (self.dilation * (self.size // 2),) * 2


KINDS: Mapping[str, tuple[int, tuple[Convolution, ...]]] = {  # a batch, and what it passes
    "resnet18": (
        16,
        (
            Convolution(224, 3, 64, 7, stride=2),
            Convolution(56, 64, 64, 3),
            Convolution(56, 64, 128, 3, stride=2),
            Convolution(28, 128, 128, 3),
            Convolution(14, 256, 256, 3),
            Convolution(7, 512, 512, 3),
        ),
    ),
    "resnet32x4": (
        64,
        (
            Convolution(32, 3, 32, 3),
            Convolution(32, 64, 64, 3),
            Convolution(16, 128, 128, 3),
            Convolution(8, 256, 256, 3),
        ),
    ),
    "deeplab": (
        2,
        (
            Convolution(129, 64, 64, 3),
            Convolution(33, 512, 512, 3, dilation=2),
            Convolution(33, 512, 256, 1),
            Convolution(33, 512, 256, 3, dilation=6),
            Convolution(33, 512, 256, 3, dilation=12),
            Convolution(33, 512, 256, 3, dilation=18),
            Convolution(129, 304, 256, 3),
            Convolution(129, 256, 256, 3),
        ),
    ),
    "convnext_tiny": (
        8,
        (
            Convolution(56, 96, 96, 7, depthwise=True),
            Convolution(28, 192, 192, 7, depthwise=True),
            Convolution(14, 384, 384, 7, depthwise=True),
            Convolution(7, 768, 768, 7, depthwise=True),
        ),
    ),
    "mobilenet_v2": (
        8,
        (
            Convolution(112, 32, 32, 3, depthwise=True),
            Convolution(112, 96, 96, 3, stride=2, depthwise=True),
            Convolution(28, 192, 192, 3, depthwise=True),
            Convolution(14, 576, 576, 3, dilation=2, depthwise=True),
            Convolution(7, 960, 960, 3, depthwise=True),
        ),
    ),
}


def measure(parts: Sequence[str]) -> list[Row]:
    """Compare every kind of the named networks; of those that read images, the input needs no gradient."""
    jax.config.update("jax_platforms", "cpu")
    chosen = [KINDS[name] for name in parts or KINDS]
    return [
        row
        for batch, kinds in chosen
        for kind in kinds
        for row in measure_one(kind, images=kind.channels > 3, batch=batch)
    ]


def measure_one(kind: Convolution, *, images: bool, batch: int) -> list[Row]:
    """Compare one kind: forward, the gradient of its kernel and, if asked for, that of what it reads."""
    announce(str(kind))
    rng = np.random.default_rng(0)
    x = rng.random((batch, kind.side, kind.side, kind.channels), np.float32)
    inputs = 1 if kind.depthwise else kind.channels
    kernel = rng.random((kind.size, kind.size, inputs, kind.features), np.float32)
    ours, theirs = _ours(kind, x, kernel), _pytorch(kind, x, kernel)
    names = ("forward", "kernel's gradient", "input's gradient")[: 3 if images else 2]
    return [compare_times(f"{kind}: {name}", ours[name], theirs[name], bound=None) for name in names]


def _ours(kind: Convolution, x: np.ndarray, kernel: np.ndarray) -> dict[str, Callable[[], object]]:
    padding = tuple((pad, pad) for pad in kind.padding)
    strides, dilation = (kind.stride,) * 2, (kind.dilation,) * 2

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        by_platform = depthwise_conv if kind.depthwise else jax.lax.conv_general_dilated
        return by_platform(
            x,
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=kind.channels if kind.depthwise else 1,
        )

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
    stride, padding, dilation = (kind.stride,) * 2, kind.padding, (kind.dilation,) * 2
    groups = kind.channels if kind.depthwise else 1

    def forward() -> torch.Tensor:
        return torch.nn.functional.conv2d(maps, weight, None, stride, padding, dilation, groups)

    def backward(mask: list[bool]) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            by_out, maps, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )

    by_out = torch.ones_like(forward())
    return {
        "forward": forward,
        "kernel's gradient": backward([False, True, False]),
        "input's gradient": backward([True, False, False]),
    }


if __name__ == "__main__":
    main(__doc__, measure, add_options=lambda parser: add_parts(parser, KINDS, metavar="NETWORK"))
