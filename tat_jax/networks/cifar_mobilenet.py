"""MobileNetV2 of half the width for CIFAR, as RepDistiller has it.

MobileNetV2, Sandler et al., CVPR 2018, with a stem of stride 2, plain ReLUs, an expansion in every block and
1,280 channels before the head. Its taps are those of the groups of blocks that RepDistiller names, whose
outputs no activation has seen; so there is no `_preact`.
"""

import re
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from tat_jax.batch import Where
from tat_jax.networks.cifar import CLASSES, CifarNetwork, Maps, Out, Taps, architecture
from tat_jax.networks.layers import ConvNorm, normal

_STEM, _LAST = 16, 1280
# Expansion, channels, blocks, and the stride of the first of them.
_GROUPS = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
_TAPPED = {1: "stage1", 2: "stage2", 4: "stage3", 6: "stage4"}


class ExpandedResidual(nnx.Module):
    """Expand by a 1×1 convolution, convolve each channel 3×3, project by a 1×1 convolution."""

    def __init__(self, in_features: int, features: int, stride: int, expansion: int, **of_layers: Any):
        hidden = expansion * in_features
        self.is_added = stride == 1 and in_features == features
        self.conv = nnx.List(
            [
                ConvNorm(in_features, hidden, 1, **of_layers),
                ConvNorm(hidden, hidden, 3, stride=stride, groups=hidden, **of_layers),
                ConvNorm(hidden, features, 1, **of_layers),
            ]
        )

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Out:
        expand, depthwise, project = self.conv
        y = nnx.relu(expand(x, train=train, where=where))
        y = nnx.relu(depthwise(y, train=train, where=where))
        y = project(y, train=train, where=where)
        return x + y if self.is_added else y


class CifarMobileNetV2(CifarNetwork):
    """Classify images by groups of such blocks.

    Args:
        num_classes: the number of logits; 0 is a network without a head.
        dtype: the type of activations. Parameters and statistics are float32, or float64 if `dtype` is.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.
    """

    def __init__(
        self,
        *,
        num_classes: int = CLASSES,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        of_layers: dict[str, Any] = {"dtype": dtype, "bn_group": bn_group, "rngs": rngs}
        self.conv1 = ConvNorm(3, _STEM, 3, stride=2, **of_layers)
        features, groups = _STEM, []
        for expansion, width, depth, stride in _GROUPS:
            blocks = []
            for i in range(depth):
                blocks.append(
                    ExpandedResidual(features, width, stride if i == 0 else 1, expansion, **of_layers)
                )
                features = width
            groups.append(nnx.List(blocks))
        self.blocks = nnx.List(groups)
        self.conv2 = ConvNorm(features, _LAST, 1, **of_layers)
        zeros = nnx.initializers.zeros_init()
        self._add_head(_LAST, num_classes, dtype=dtype, rngs=rngs, kernel_init=normal(0.01), bias_init=zeros)

    def maps(self, images: Maps, *, train: bool, where: Where | None) -> tuple[Out, Taps]:
        """Return the maps of 1,280 channels, and the taps."""
        x = nnx.relu(self.conv1(images, train=train, where=where))
        taps: Taps = {"stem": x}
        for i, blocks in enumerate(self.blocks):
            for block in blocks:
                x = block(x, train=train, where=where)
            if i in _TAPPED:
                taps[_TAPPED[i]] = x
        return nnx.relu(self.conv2(x, train=train, where=where)), taps


def _in_torch(path: str) -> str:
    """Return where a layer stands in PyTorch, whose sequences count ReLUs, too, in one row."""

    def at(found: re.Match[str]) -> str:
        return f"{found[1]}.{3 * int(found[2]) + int(found[3])}"

    return re.sub(r"^(blocks\.\d+\.\d+\.conv)\.(\d+)\.(\d+)", at, path)


ARCHITECTURES = {
    "cifar_mobilenet_v2": architecture(CifarMobileNetV2, head="classifier.0", torch_modules=_in_torch)
}
