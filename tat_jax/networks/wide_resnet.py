"""Wide residual networks for CIFAR, whose attributes carry RepDistiller's names.

Wide Residual Networks, Zagoruyko & Komodakis, BMVC 2016: blocks of BatchNorm, ReLU and convolution, in this
order. The taps of stages are sums that no activation has seen, as is the stem's; those of `_preact` are the
sums behind the BatchNorm that comes next, before its ReLU.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from tat_jax.batch import Where
from tat_jax.networks.cifar import CLASSES, CifarNetwork, Maps, Out, Taps, architecture
from tat_jax.networks.layers import BatchNorm, conv


class WideBlock(nnx.Module):
    """Two 3×3 convolutions, each behind a BatchNorm and a ReLU, around an identity or a 1×1 convolution."""

    def __init__(
        self,
        in_features: int,
        width: int,
        stride: int,
        *,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        self.bn1 = BatchNorm(in_features, group=bn_group, dtype=dtype)
        self.conv1 = conv(in_features, width, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.conv2 = conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.convShortcut = (
            conv(in_features, width, 1, stride=stride, dtype=dtype, rngs=rngs)
            if in_features != width
            else None
        )

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> tuple[Out, Maps]:
        """Return the sum of both branches, and what the first BatchNorm made of the input."""
        normalised = self.bn1(x, train=train, where=where)
        activated = nnx.relu(normalised)
        y = nnx.relu(self.bn2(self.conv1(activated), train=train, where=where))
        shortcut = self.convShortcut(activated) if self.convShortcut else x
        return shortcut + self.conv2(y), normalised


class WideResNet(CifarNetwork):
    """Classify images by three stages of such blocks, the second and third of half the height and width.

    Args:
        depth: layers in all, 6n + 4.
        factor: widths of the stages in units of 16, 32 and 64.
        num_classes: the number of logits; 0 is a network without a head.
        dtype: the type of activations. Parameters and statistics are float32, or float64 if `dtype` is.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.
    """

    def __init__(
        self,
        depth: int,
        factor: int,
        *,
        num_classes: int = CLASSES,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        features = 16
        self.conv1 = conv(3, features, 3, dtype=dtype, rngs=rngs)
        self.stages = ("block1", "block2", "block3")
        for name, width, stride in zip(self.stages, (16, 32, 64), (1, 2, 2), strict=True):
            blocks: nnx.List[WideBlock] = nnx.List([])
            for i in range((depth - 4) // 6):
                of_block: dict[str, Any] = {"dtype": dtype, "bn_group": bn_group, "rngs": rngs}
                blocks.append(WideBlock(features, width * factor, stride if i == 0 else 1, **of_block))
                features = width * factor
            setattr(self, name, nnx.Dict(layer=blocks))
        self.bn1 = BatchNorm(features, group=bn_group, dtype=dtype)
        zeros = nnx.initializers.zeros_init()
        self._add_head(features, num_classes, dtype=dtype, rngs=rngs, bias_init=zeros)

    def maps(self, images: Maps, *, train: bool, where: Where | None) -> tuple[Out, Taps]:
        """Return the last maps behind their BatchNorm and ReLU, and the taps."""
        x = self.conv1(images)
        taps: Taps = {"stem": x}
        for i, name in enumerate(self.stages, start=1):
            for j, block in enumerate(getattr(self, name).layer):
                x, normalised = block(x, train=train, where=where)
                if j == 0 and i > 1:
                    taps[f"stage{i - 1}_preact"] = normalised
            taps[f"stage{i}"] = x
        last = self.bn1(x, train=train, where=where)
        taps[f"stage{len(self.stages)}_preact"] = last
        return nnx.relu(last), taps


ARCHITECTURES = {
    f"wrn_{depth}_{factor}": architecture(functools.partial(WideResNet, depth, factor))
    for depth in (16, 40)
    for factor in (1, 2)
}
