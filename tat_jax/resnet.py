"""Residual networks whose attributes carry torchvision's names.

Deep Residual Learning for Image Recognition, He et al., CVPR 2016, with the stride of a bottleneck on its
3×3 convolution, as torchvision has it. Because the names agree, a PyTorch state dict converts by renaming
leaves: `layer1.0.conv1.weight` is `layer1.0.conv1.kernel` here.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from einops import reduce
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from tat_jax.layers import BatchNorm, at_least_float32, conv, max_pool, torch_uniform, uniform

STAGES = ("layer1", "layer2", "layer3", "layer4")


class _Block(nnx.Module):
    """A residual branch of convolutions, each with its normalisation, and the shortcut around it."""

    expansion: ClassVar[int]

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int, int]],
        *,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        """Build from one (in_features, out_features, size, stride) per convolution."""
        self.depth = len(shapes)
        for i, (fan_in, fan_out, size, stride) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", conv(fan_in, fan_out, size, stride=stride, dtype=dtype, rngs=rngs))
            setattr(self, f"bn{i}", BatchNorm(fan_out, group=bn_group, dtype=dtype))
        fan_in, fan_out = shapes[0][0], shapes[-1][1]
        stride = max(stride for *_, stride in shapes)
        self.downsample: nnx.List[nnx.Module] = nnx.List([])
        if stride > 1 or fan_in != fan_out:
            self.downsample.append(conv(fan_in, fan_out, 1, stride=stride, dtype=dtype, rngs=rngs))
            self.downsample.append(BatchNorm(fan_out, group=bn_group, dtype=dtype))

    def __call__(self, x: Array, *, train: bool, where: Array | None) -> Array:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y), train=train, where=where)
            if i < self.depth:
                y = nnx.relu(y)
        if self.downsample:
            projection, norm = self.downsample
            x = norm(projection(x), train=train, where=where)
        return nnx.relu(y + x)


class BasicBlock(_Block):
    """Two 3×3 convolutions around an identity: the block of ResNet-18 and 34."""

    expansion = 1

    def __init__(self, in_features: int, width: int, stride: int, **kwargs):
        super().__init__([(in_features, width, 3, stride), (width, width, 3, 1)], **kwargs)


class Bottleneck(_Block):
    """1×1, 3×3 and 1×1 convolutions around an identity: the block of ResNet-50, 101 and 152."""

    expansion = 4

    def __init__(self, in_features: int, width: int, stride: int, **kwargs):
        super().__init__(
            [(in_features, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)], **kwargs
        )


ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nnx.Module):
    """Classify images; sow the output of every stage as a tap named `layer1` … `layer4`.

    Args:
        architecture: a key of `ARCHITECTURES`.
        num_classes: the number of logits.
        small_images: a 3×3 stem without stride and max-pool, for images of 64 pixels and less.
        width: channels of the first stage; each later stage has twice those of the one before.
        dtype: the type of activations. Parameters and statistics are float32, or float64 if `dtype` is.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.

    Raises:
        ValueError: no such architecture.
    """

    def __init__(
        self,
        architecture: str,
        *,
        num_classes: int = 1000,
        small_images: bool = False,
        width: int = 64,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        if architecture not in ARCHITECTURES:
            raise ValueError(f"no architecture {architecture!r}; there are {', '.join(ARCHITECTURES)}")
        block, depths = ARCHITECTURES[architecture]
        self.small_images = small_images
        self.dtype = jnp.dtype(dtype)
        size, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = conv(3, width, size, stride=stride, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(width, group=bn_group, dtype=dtype)
        features = width
        for stage, (name, depth) in enumerate(zip(STAGES, depths, strict=True)):
            blocks = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(
                    block(features, width << stage, stride, dtype=dtype, bn_group=bn_group, rngs=rngs)
                )
                features = (width << stage) * block.expansion
            setattr(self, name, nnx.List(blocks))
        self.fc = nnx.Linear(
            features,
            num_classes,
            dtype=dtype,
            param_dtype=at_least_float32(dtype),
            kernel_init=torch_uniform,
            bias_init=uniform(features**-0.5),
            rngs=rngs,
        )

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        train: bool = False,
        where: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch classes"]:
        """Return the logits of normalised images.

        Taps are read with `nnx.capture(model, nnx.Intermediate)(images)`; a plain call keeps nothing.

        Args:
            images: normalised images.
            train: normalise by batch statistics and update the running ones.
            where: the images that count in batch statistics; None is all.
        """
        x = self.conv1(images.astype(self.dtype))
        x = nnx.relu(self.bn1(x, train=train, where=where))
        if not self.small_images:
            x = max_pool(x)
        for name in STAGES:
            for block in getattr(self, name):
                x = block(x, train=train, where=where)
            # Outside a capture, sow would write into the model.
            if hasattr(self, "__captures__"):
                self.sow(nnx.Intermediate, name, x)
        pooled = reduce(x.astype(at_least_float32(x.dtype)), "b h w c -> b c", "mean")
        return self.fc(pooled.astype(self.dtype))
