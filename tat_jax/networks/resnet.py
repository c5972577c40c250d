"""Residual networks whose attributes carry torchvision's names.

Deep Residual Learning for Image Recognition, He et al., CVPR 2016, with the stride of a bottleneck on its
3×3 convolution, as torchvision has it. Because the names agree, a PyTorch state dict converts by renaming
leaves: `layer1.0.conv1.weight` is `layer1.0.conv1.kernel` here.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from tat_jax.fields import YES_OR_NO, Field, whole
from tat_jax.networks.architecture import Architecture
from tat_jax.networks.heads import class_maps
from tat_jax.networks.layers import BatchNorm, ConvNorm, at_least_float32, conv, torch_uniform, uniform
from tat_jax.networks.stem import StemConv, max_pool
from tat_jax.networks.taps import show

Maps = Float[Array, "batch height width channels"]
Where = Bool[Array, " batch"]


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions around an identity: the block of ResNet-18 and 34."""

    expansion: ClassVar[int] = 1
    grid: ClassVar[tuple[int, ...]] = (1,)  # of DeepLab's dilations in the last stage, block by block

    def __init__(
        self,
        in_features: int,
        width: int,
        stride: int,
        *,
        dilation: int = 1,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        self.conv1 = conv(in_features, width, 3, stride=stride, dilation=dilation, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.conv2 = conv(width, width, 3, dilation=dilation, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.downsample = (
            ConvNorm(in_features, width, 1, stride=stride, dtype=dtype, bn_group=bn_group, rngs=rngs)
            if stride > 1 or in_features != width
            else None
        )

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch h w c"]:
        return nnx.relu(self.before_relu(x, train=train, where=where))

    def before_relu(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch h w c"]:
        """Return the sum of both branches."""
        y = nnx.relu(self.bn1(self.conv1(x), train=train, where=where))
        y = self.bn2(self.conv2(y), train=train, where=where)
        return y + (self.downsample(x, train=train, where=where) if self.downsample else x)


class Bottleneck(nnx.Module):
    """1×1, 3×3 and 1×1 convolutions around an identity: the block of ResNet-50, 101 and 152."""

    expansion: ClassVar[int] = 4
    grid: ClassVar[tuple[int, ...]] = (1, 2, 4)

    def __init__(
        self,
        in_features: int,
        width: int,
        stride: int,
        *,
        dilation: int = 1,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        out_features = self.expansion * width
        self.conv1 = conv(in_features, width, 1, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.conv2 = conv(width, width, 3, stride=stride, dilation=dilation, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.conv3 = conv(width, out_features, 1, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(out_features, group=bn_group, dtype=dtype)
        self.downsample = (
            ConvNorm(in_features, out_features, 1, stride=stride, dtype=dtype, bn_group=bn_group, rngs=rngs)
            if stride > 1 or in_features != out_features
            else None
        )

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch h w c"]:
        return nnx.relu(self.before_relu(x, train=train, where=where))

    def before_relu(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch h w c"]:
        """Return the sum of both branches."""
        y = nnx.relu(self.bn1(self.conv1(x), train=train, where=where))
        y = nnx.relu(self.bn2(self.conv2(y), train=train, where=where))
        y = self.bn3(self.conv3(y), train=train, where=where)
        return y + (self.downsample(x, train=train, where=where) if self.downsample else x)


Block = type[BasicBlock] | type[Bottleneck]
Depths = tuple[int, int, int, int]

# Of the four stages, by the stride of the last one's maps.
_STRIDES = {32: (1, 2, 2, 2), 16: (1, 2, 2, 1), 8: (1, 2, 1, 1)}
_DILATIONS = {32: (1, 1, 1, 1), 16: (1, 1, 1, 2), 8: (1, 1, 2, 4)}


class Stage(nnx.List):
    """Blocks one after the other, the first of which may halve height and width."""

    def __init__(
        self,
        block: Block,
        in_features: int,
        width: int,
        stride: int,
        *,
        dilations: Sequence[int],
        **of_blocks: Any,
    ):
        super().__init__([block(in_features, width, stride, dilation=dilations[0], **of_blocks)])
        for dilation in dilations[1:]:
            self.append(block(width * block.expansion, width, 1, dilation=dilation, **of_blocks))

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch h w c"]:
        for block in self:
            x = block(x, train=train, where=where)
        return x


class ResNet(nnx.Module):
    """Classify images by four stages of residual blocks, whose maps are the taps `layer1` … `layer4`.

    Args:
        block: what the stages consist of.
        depths: blocks in each stage.
        num_classes: the number of logits; 0 is a network without a head, which gives none, and None one of
            which `stages` alone is called.
        small_images: a 3×3 stem without stride and max-pool, for images of 64 pixels and less.
        width: channels of the first stage; each later stage has twice those of the one before.
        output_stride: of the last stage, 32; or 16 or 8, with dilations in the place of strides as DeepLab
            has them, whose last stage is a multi-grid unit where blocks are bottlenecks.
        dtype: the type of activations. Parameters and statistics are float32, or float64 if `dtype` is.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.
    """

    def __init__(
        self,
        block: Block,
        depths: Depths,
        *,
        num_classes: int | None = 1000,
        small_images: bool = False,
        width: int = 64,
        output_stride: int = 32,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.small_images = small_images
        self.dtype = jnp.dtype(dtype)
        self.conv1 = (
            conv(3, width, 3, dtype=dtype, rngs=rngs)
            if small_images
            else StemConv(width, dtype=dtype, rngs=rngs)
        )
        self.bn1 = BatchNorm(width, group=bn_group, dtype=dtype)
        stage = functools.partial(Stage, block, dtype=dtype, bn_group=bn_group, rngs=rngs)
        strides, features = _STRIDES[output_stride], block.expansion * width
        first, second, third, last = (
            (dilation,) * depth for dilation, depth in zip(_DILATIONS[output_stride], depths, strict=True)
        )
        if output_stride < 32:
            last = tuple(dilation * block.grid[i % len(block.grid)] for i, dilation in enumerate(last))
        self.layer1 = stage(width, width, strides[0], dilations=first)
        self.layer2 = stage(features, 2 * width, strides[1], dilations=second)
        self.layer3 = stage(2 * features, 4 * width, strides[2], dilations=third)
        self.layer4 = stage(4 * features, 8 * width, strides[3], dilations=last)
        self.low_level_features, self.out_features = features, 8 * features
        if num_classes:
            self.fc = nnx.Linear(
                self.out_features,
                num_classes,
                dtype=dtype,
                param_dtype=at_least_float32(dtype),
                kernel_init=torch_uniform,
                bias_init=uniform(self.out_features**-0.5),
                rngs=rngs,
            )

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        train: bool = False,
        where: Where | None = None,
    ) -> Float[Array, "batch classes"] | None:
        """Return the logits of normalised images, and show what makes them, as `pooled` and `class_maps`.

        Args:
            images: normalised images.
            train: normalise by batch statistics and update the running ones.
            where: the images that count in batch statistics; None is all.
        """
        x = self.stages(images, train=train, where=where)["layer4"]
        pooled = reduce(x.astype(at_least_float32(x.dtype)), "b h w c -> b c", "mean")
        if not hasattr(self, "fc"):
            show(self, pooled=pooled)
            return None
        show(self, pooled=pooled, class_maps=class_maps(x, self.fc))
        return self.fc(pooled.astype(self.dtype))

    def stages(
        self, images: Float[Array, "batch height width 3"], *, train: bool, where: Where | None
    ) -> dict[str, Float[Array, "batch _ _ _"]]:
        """Return the maps of the four stages, and the first one again as DeepLab's `low_level`."""
        x = self.conv1(images.astype(self.dtype))
        x = nnx.relu(self.bn1(x, train=train, where=where))
        if not self.small_images:
            x = max_pool(x)
        maps = {"low_level": (x := self.layer1(x, train=train, where=where)), "layer1": x}
        maps["layer2"] = x = self.layer2(x, train=train, where=where)
        maps["layer3"] = x = self.layer3(x, train=train, where=where)
        maps["layer4"] = self.layer4(x, train=train, where=where)
        return maps


OPTIONS = {
    "small_images": Field(False, YES_OR_NO, "a 3×3 stem without stride and max-pool, for 64 pixels and less"),
    "width": Field(64, whole(1), "channels of the first stage"),
}


def architecture(block: Block, depths: Depths, published: str | None = None) -> Architecture:
    """Return the ResNet of so many blocks in each stage, as a config can name it."""
    return Architecture(
        build=functools.partial(ResNet, block, depths),
        head="fc",
        options=OPTIONS,
        read_arguments=_read_arguments,
        published=published,
    )


def _read_arguments(entries: Mapping[str, np.ndarray]) -> dict[str, Any]:
    stem, head = entries.get("conv1.weight"), entries.get("fc.weight")
    # A stem with less behind each feature than colours and pixels may claim a width of any size.
    stem_told = stem is not None and stem.shape[1:] in ((3, 3, 3), (3, 7, 7))
    head_told = head is not None and head.ndim == 2
    return {
        "num_classes": len(head) if head is not None and head_told else 1000,
        "small_images": stem is not None and stem_told and stem.shape[2] == 3,
        "width": len(stem) if stem is not None and stem_told else 64,
    }


# The files are torchvision's IMAGENET1K_V1.
ARCHITECTURES = {
    "resnet18": architecture(BasicBlock, (2, 2, 2, 2), "resnet18-f37072fd.pth"),
    "resnet34": architecture(BasicBlock, (3, 4, 6, 3), "resnet34-b627a593.pth"),
    "resnet50": architecture(Bottleneck, (3, 4, 6, 3), "resnet50-0676ba61.pth"),
    "resnet101": architecture(Bottleneck, (3, 4, 23, 3), "resnet101-63fe2227.pth"),
    "resnet152": architecture(Bottleneck, (3, 8, 36, 3), "resnet152-394f9c45.pth"),
}
