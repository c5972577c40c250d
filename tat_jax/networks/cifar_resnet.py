"""Residual networks for CIFAR, whose attributes carry RepDistiller's names.

Deep Residual Learning for Image Recognition, He et al., CVPR 2016, section 4.2, of 6n + 2 layers, with a
projection wherever stride or width change; and the ResNet-50 of ImageNet with a 3×3 stem. The taps of stages
are after their last ReLU, those of `_preact` before it.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from tat_jax.batch import Where
from tat_jax.networks.cifar import CLASSES, CifarNetwork, Maps, Out, Taps, architecture
from tat_jax.networks.layers import BatchNorm, conv
from tat_jax.networks.resnet import BasicBlock, Block, Bottleneck, Stage


class CifarResNet(CifarNetwork):
    """Classify images by stages of residual blocks, each but the first of half the height and width.

    Args:
        block: what the stages consist of.
        depths: blocks in each stage.
        widths: of the stem and of each stage's 3×3 convolutions.
        num_classes: the number of logits; 0 is a network without a head.
        dtype: the type of activations. Parameters and statistics are float32, or float64 if `dtype` is.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.
    """

    def __init__(
        self,
        block: Block,
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int = CLASSES,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        features, *of_stages = widths
        self.conv1 = conv(3, features, 3, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(features, group=bn_group, dtype=dtype)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, (name, depth, width) in enumerate(zip(self.stages, depths, of_stages, strict=True)):
            stride, dilations = 1 if i == 0 else 2, (1,) * depth
            of_blocks = {"dtype": dtype, "bn_group": bn_group, "rngs": rngs}
            setattr(self, name, Stage(block, features, width, stride, dilations=dilations, **of_blocks))
            features = block.expansion * width
        self._add_head(features, num_classes, dtype=dtype, rngs=rngs)

    def maps(self, images: Maps, *, train: bool, where: Where | None) -> tuple[Out, Taps]:
        """Return the last stage's maps, and the taps."""
        x = nnx.relu(self.bn1(self.conv1(images), train=train, where=where))
        stages = (getattr(self, name) for name in self.stages)
        return self._by_sums(x, stages, train=train, where=where)


_NARROW, _WIDE = (16, 16, 32, 64), (32, 64, 128, 256)


def _of_layers(layers: int, widths: tuple[int, ...]) -> functools.partial[CifarResNet]:
    return functools.partial(CifarResNet, BasicBlock, ((layers - 2) // 6,) * 3, widths)


def _named_resnet50(path: str) -> str:
    return path.replace("downsample", "shortcut")


ARCHITECTURES = {
    **{f"resnet{n}": architecture(_of_layers(n, _NARROW)) for n in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{n}x4": architecture(_of_layers(n, _WIDE)) for n in (8, 32)},
    "cifar_resnet50": architecture(
        functools.partial(CifarResNet, Bottleneck, (3, 4, 6, 3), (64, 64, 128, 256, 512)),
        head="linear",
        torch_modules=_named_resnet50,
    ),
}
