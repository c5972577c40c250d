"""ConvNeXt, whose attributes carry timm's names.

A ConvNet for the 2020s, Liu et al., CVPR 2022, as https://github.com/facebookresearch/ConvNeXt has it. Those
of DINOv3 are the same networks without a head.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.fields import Field, or_none, whole
from tat_jax.networks import taps
from tat_jax.networks.architecture import Architecture
from tat_jax.networks.convnext_names import translate
from tat_jax.networks.depthwise import depthwise_conv
from tat_jax.networks.layers import LayerNorm, at_least_float32, normal
from tat_jax.networks.resnet import Depths, Maps, Where

_STRIDE = 32  # of the last stage
_DEVIATION = 0.02  # of all kernels at the start


def _of_layers(dtype: DTypeLike, rngs: nnx.Rngs) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "param_dtype": at_least_float32(dtype),
        "kernel_init": normal(_DEVIATION),
        "rngs": rngs,
    }


def _patches(channels: int, features: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Conv:
    """Make a convolution of patches that do not overlap; what is left at the edges is not read."""
    window = (size, size)
    return nnx.Conv(channels, features, window, strides=window, padding="VALID", **_of_layers(dtype, rngs))


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU between them, on every position alike."""

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(channels, 4 * channels, **_of_layers(dtype, rngs))
        self.fc2 = nnx.Linear(4 * channels, channels, **_of_layers(dtype, rngs))

    def __call__(self, x: Maps) -> Maps:
        """Return the features."""
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """y = x + γ · MLP(LayerNorm(depthwise 7×7 convolution of x))."""

    scale: ClassVar[float] = 1e-6  # γ at the start

    def __init__(self, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv_dw = nnx.Conv(
            channels,
            channels,
            (7, 7),
            feature_group_count=channels,
            padding=((3, 3), (3, 3)),
            conv_general_dilated=depthwise_conv,
            **_of_layers(dtype, rngs),
        )
        self.norm = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(channels, dtype=dtype, rngs=rngs)
        self.gamma = nnx.Param(jnp.full(channels, self.scale, at_least_float32(dtype)))

    def __call__(self, x: Maps) -> Maps:
        """Return the block's output."""
        return x + self.mlp(self.norm(self.conv_dw(x))) * self.gamma[...].astype(x.dtype)[None, None, None]


class Stage(nnx.Module):
    """Blocks one after the other, before all but the first stage's a halving of height and width."""

    def __init__(self, before: int | None, channels: int, depth: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.downsample = (
            nnx.List(
                [
                    LayerNorm(before, dtype=dtype, rngs=rngs),
                    _patches(before, channels, 2, dtype=dtype, rngs=rngs),
                ]
            )
            if before is not None
            else None
        )
        self.blocks = nnx.List([Block(channels, dtype=dtype, rngs=rngs) for _ in range(depth)])

    def __call__(self, x: Maps) -> Float[Array, "batch h w features"]:
        """Return the stage's maps."""
        for layer in (*(self.downsample or ()), *self.blocks):
            x = layer(x)
        return x


class Head(nnx.Module):
    """A normalisation and the layer that makes logits, which a network without a head has not."""

    def __init__(self, channels: int, num_classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = LayerNorm(channels, dtype=dtype, rngs=rngs)
        self.fc = nnx.Linear(channels, num_classes, **_of_layers(dtype, rngs)) if num_classes else None


class ConvNeXt(nnx.Module):
    """Classify images by four stages of large depthwise convolutions.

    Its taps are `stage0` … `stage3`, what the stages return, and `pooled`, their last maps averaged over all
    positions and normed, which the head reads. Stochastic depth, by which published ones were trained, is
    left out: what is trained here has none.

    Args:
        depths: blocks in each stage.
        width: channels of the first stage; each later stage has twice those of the one before.
        num_classes: the number of logits; 0 is a network without a head, whose logits are None.
        dtype: the type of activations. Parameters are float32, or float64 if `dtype` is, and so are
            statistics.
        rngs: the key stream `params`.
    """

    def __init__(
        self,
        depths: Depths,
        width: int,
        *,
        num_classes: int = 1000,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        self.stem = nnx.List(
            [_patches(3, width, 4, dtype=dtype, rngs=rngs), LayerNorm(width, dtype=dtype, rngs=rngs)]
        )
        channels = [width * 2**i for i in range(len(depths))]
        self.stages = nnx.List(
            [
                Stage(before, here, depth, dtype=dtype, rngs=rngs)
                for before, here, depth in zip([None, *channels], channels, depths, strict=False)
            ]
        )
        self.head = Head(channels[-1], num_classes, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        train: bool = False,
        where: Where | None = None,
    ) -> Float[Array, "batch classes"] | None:
        """Return the logits of normalised images.

        Args:
            images: normalised images.
            train: no difference, as there are no statistics over the batch, nor is anything dropped.
            where: likewise.

        Raises:
            ValueError: the images are too small for four stages.
        """
        height, width = images.shape[1:3]
        if min(height, width) < _STRIDE:
            raise ValueError(f"ConvNeXt wants images of {_STRIDE} pixels and more, not {height}×{width}")
        x = images.astype(self.dtype)
        for layer in self.stem:
            x = layer(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            taps.show(self, **{f"stage{i}": x})
        pooled = reduce(x.astype(at_least_float32(x.dtype)), "b h w c -> b c", "mean")
        pooled = self.head.norm(pooled).astype(self.dtype)
        taps.show(self, pooled=pooled)
        return self.head.fc(pooled) if self.head.fc else None


def _build(
    depths: Depths,
    width: int,
    *,
    stage_depth: int | None = None,
    stem_width: int | None = None,
    bn_group: int | None = None,  # there is no normalisation by the batch
    **of_network: Any,
) -> ConvNeXt:
    return ConvNeXt(depths if stage_depth is None else (stage_depth,) * 4, stem_width or width, **of_network)


def _read_arguments(depths: Depths, width: int, entries: Mapping[str, np.ndarray]) -> dict[str, Any]:
    stem, head = entries.get("stem.0.weight"), entries.get("head.fc.weight")
    # A stem with less behind each feature than colours and pixels may claim a width of any size.
    found = len(stem) if stem is not None and stem.shape[1:] == (3, 4, 4) else width
    return {
        "num_classes": 0 if head is None else len(head) if head.ndim == 2 else 1000,
        "stage_depth": _stage_depth(depths, entries),
        "stem_width": found if found != width else None,
    }


def _stage_depth(depths: Depths, entries: Mapping[str, np.ndarray]) -> int | None:
    blocks = {tuple(name.split(".")[1:4:2]) for name in entries if re.match(r"stages\.\d\.blocks\.\d", name)}
    found = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(len(depths)))
    if found == depths:
        return None
    if min(found) and found == (found[0],) * len(found):
        return found[0]
    said, wanted = (", ".join(map(str, counts)) for counts in (found, depths))
    raise ValueError(
        f"this ConvNeXt has {said} blocks in its stages, not {wanted}: name the architecture that has"
    )


OPTIONS = {
    "stage_depth": Field(
        int, or_none(whole(1)), "blocks in each stage; None: as many as the architecture has"
    ),
    "stem_width": Field(int, or_none(whole(1)), "channels of the first stage; None: the architecture's"),
}


def architecture(depths: Depths, width: int, **published: Any) -> Architecture:
    """Return the ConvNeXt of so many blocks in each stage, as a config can name it."""
    return Architecture(
        build=functools.partial(_build, depths, width),
        head="head.fc",
        options=OPTIONS,
        read_arguments=functools.partial(_read_arguments, depths, width),
        translate=translate,
        least={"stage_depth": 1},
        **published,
    )


# The files are torchvision's IMAGENET1K_V1.
ARCHITECTURES = {
    "convnext_tiny": architecture((3, 3, 9, 3), 96, published="convnext_tiny-983f1562.pth", resize=236),
    "convnext_small": architecture((3, 3, 27, 3), 96, published="convnext_small-0c510722.pth", resize=230),
    "convnext_base": architecture((3, 3, 27, 3), 128, published="convnext_base-6075fbad.pth", resize=232),
}
