"""Residual networks whose attributes carry torchvision's names.

Deep Residual Learning for Image Recognition, He et al., CVPR 2016, with the stride of a bottleneck on its
3×3 convolution, as torchvision has it. Because the names agree, a PyTorch state dict converts by renaming
leaves: `layer1.0.conv1.weight` is `layer1.0.conv1.kernel` here.
"""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from tat_jax.fields import YES_OR_NO, Field, whole
from tat_jax.networks.architecture import Architecture
from tat_jax.networks.layers import BatchNorm, at_least_float32, conv, torch_uniform, uniform
from tat_jax.networks.stem import StemConv, max_pool

Maps = Float[Array, "batch height width channels"]
Where = Bool[Array, " batch"]


class Downsample(nnx.List):
    """The 1×1 convolution and its normalisation on a shortcut between different shapes."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        stride: int,
        *,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            [
                conv(in_features, out_features, 1, stride=stride, dtype=dtype, rngs=rngs),
                BatchNorm(out_features, group=bn_group, dtype=dtype),
            ]
        )

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch h w c"]:
        projection, norm = self
        return norm(projection(x), train=train, where=where)


class BasicBlock(nnx.Module):
    """Two 3×3 convolutions around an identity: the block of ResNet-18 and 34."""

    expansion: ClassVar[int] = 1

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
        self.conv1 = conv(in_features, width, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.conv2 = conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.downsample = (
            Downsample(in_features, width, stride, dtype=dtype, bn_group=bn_group, rngs=rngs)
            if stride > 1 or in_features != width
            else None
        )

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch h w c"]:
        y = nnx.relu(self.bn1(self.conv1(x), train=train, where=where))
        y = self.bn2(self.conv2(y), train=train, where=where)
        shortcut = self.downsample(x, train=train, where=where) if self.downsample else x
        return nnx.relu(y + shortcut)


class Bottleneck(nnx.Module):
    """1×1, 3×3 and 1×1 convolutions around an identity: the block of ResNet-50, 101 and 152."""

    expansion: ClassVar[int] = 4

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
        out_features = self.expansion * width
        self.conv1 = conv(in_features, width, 1, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.conv2 = conv(width, width, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.conv3 = conv(width, out_features, 1, dtype=dtype, rngs=rngs)
        self.bn3 = BatchNorm(out_features, group=bn_group, dtype=dtype)
        self.downsample = (
            Downsample(in_features, out_features, stride, dtype=dtype, bn_group=bn_group, rngs=rngs)
            if stride > 1 or in_features != out_features
            else None
        )

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch h w c"]:
        y = nnx.relu(self.bn1(self.conv1(x), train=train, where=where))
        y = nnx.relu(self.bn2(self.conv2(y), train=train, where=where))
        y = self.bn3(self.conv3(y), train=train, where=where)
        shortcut = self.downsample(x, train=train, where=where) if self.downsample else x
        return nnx.relu(y + shortcut)


Block = type[BasicBlock] | type[Bottleneck]
Depths = tuple[int, int, int, int]


class Stage(nnx.List):
    """Blocks one after the other, the first of which may halve height and width."""

    def __init__(self, block: Block, depth: int, in_features: int, width: int, stride: int, **kwargs: Any):
        super().__init__([block(in_features, width, stride, **kwargs)])
        for _ in range(1, depth):
            self.append(block(width * block.expansion, width, 1, **kwargs))

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch h w c"]:
        for block in self:
            x = block(x, train=train, where=where)
        return x


class ResNet(nnx.Module):
    """Classify images by four stages of residual blocks; what they return are the taps `layer1` … `layer4`.

    Args:
        block: what the stages consist of.
        depths: blocks in each stage.
        num_classes: the number of logits.
        small_images: a 3×3 stem without stride and max-pool, for images of 64 pixels and less.
        width: channels of the first stage; each later stage has twice those of the one before.
        dtype: the type of activations. Parameters and statistics are float32, or float64 if `dtype` is.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.
    """

    def __init__(
        self,
        block: Block,
        depths: Depths,
        *,
        num_classes: int = 1000,
        small_images: bool = False,
        width: int = 64,
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
        stage = functools.partial(Stage, dtype=dtype, bn_group=bn_group, rngs=rngs)
        features = block.expansion * width
        self.layer1 = stage(block, depths[0], width, width, 1)
        self.layer2 = stage(block, depths[1], features, 2 * width, 2)
        self.layer3 = stage(block, depths[2], 2 * features, 4 * width, 2)
        self.layer4 = stage(block, depths[3], 4 * features, 8 * width, 2)
        self.fc = nnx.Linear(
            8 * features,
            num_classes,
            dtype=dtype,
            param_dtype=at_least_float32(dtype),
            kernel_init=torch_uniform,
            bias_init=uniform((8 * features) ** -0.5),
            rngs=rngs,
        )

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        train: bool = False,
        where: Where | None = None,
    ) -> Float[Array, "batch classes"]:
        """Return the logits of normalised images.

        Args:
            images: normalised images.
            train: normalise by batch statistics and update the running ones.
            where: the images that count in batch statistics; None is all.
        """
        x = self.conv1(images.astype(self.dtype))
        x = nnx.relu(self.bn1(x, train=train, where=where))
        if not self.small_images:
            x = max_pool(x)
        x = self.layer1(x, train=train, where=where)
        x = self.layer2(x, train=train, where=where)
        x = self.layer3(x, train=train, where=where)
        x = self.layer4(x, train=train, where=where)
        pooled = reduce(x.astype(at_least_float32(x.dtype)), "b h w c -> b c", "mean")
        return self.fc(pooled.astype(self.dtype))


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
