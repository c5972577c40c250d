"""MobileNetV2, whose attributes carry torchvision's names.

MobileNetV2: Inverted Residuals and Linear Bottlenecks, Sandler et al., CVPR 2018. As a backbone it has the
strides, dilations and paddings of https://github.com/jfzhang95/pytorch-deeplab-xception.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.fields import Field, one_of
from tat_jax.networks.architecture import Architecture
from tat_jax.networks.layers import BatchNorm, ConvNorm, at_least_float32, conv, he_normal, normal, relu6
from tat_jax.networks.resnet import Maps, Where
from tat_jax.networks.taps import show

# Expansion, channels, blocks, and the stride of the first of them.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LOW_LEVEL = 3  # the block whose output is DeepLab's low-level map
_EXPANDED = {4: "layer1", 7: "layer2", 14: "layer3"}  # the blocks whose expansions are taps


class InvertedResidual(nnx.Module):
    """Expand by a 1×1 convolution, convolve each channel 3×3, project by a 1×1 convolution.

    Args:
        in_features: channels of its input.
        features: channels of its output.
        stride: of the 3×3 convolution.
        expansion: channels within, in units of those of the input.
        dilation: of the 3×3 convolution.
        pad_input: surround the input by zeros, which are then expanded, normalised and counted in batch
            statistics as pixels are, in the place of the input of the 3×3 convolution.
        of_layers: the types of activations, images in batch statistics, the initialisation and the keys.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        stride: int,
        expansion: int,
        *,
        dilation: int,
        pad_input: bool,
        **of_layers: Any,
    ):
        hidden = expansion * in_features
        self.ring = dilation if pad_input else 0
        self.is_added = stride == 1 and in_features == features
        expand = [ConvNorm(in_features, hidden, 1, **of_layers)] if expansion > 1 else []
        depthwise = ConvNorm(
            hidden,
            hidden,
            3,
            stride=stride,
            dilation=dilation,
            groups=hidden,
            padded=not pad_input,
            **of_layers,
        )
        bn_group, dtype = of_layers["bn_group"], of_layers["dtype"]
        of_conv = {name: value for name, value in of_layers.items() if name != "bn_group"}
        project = conv(hidden, features, 1, **of_conv)
        self.conv = nnx.List([*expand, depthwise, project, BatchNorm(features, group=bn_group, dtype=dtype)])

    def __call__(
        self, x: Maps, *, train: bool, where: Where | None
    ) -> tuple[Float[Array, "batch h w c"], Float[Array, "batch height width expanded"]]:
        """Return the block's output, and its expansion before the ReLU, without what surrounds it."""
        *expand, depthwise, project, norm = self.conv
        around = (self.ring, self.ring)
        y = jnp.pad(x, ((0, 0), around, around, (0, 0)))
        for layer in expand:
            y = layer(y, train=train, where=where)
        height, width = x.shape[1:3]
        expanded = y[:, self.ring : self.ring + height, self.ring : self.ring + width]
        y = relu6(y) if expand else y
        y = relu6(depthwise(y, train=train, where=where))
        y = norm(project(y), train=train, where=where)
        return (x + y if self.is_added else y), expanded


class MobileNetV2(nnx.Module):
    """Classify images by inverted residuals, of width 1.

    Args:
        num_classes: the number of logits; 0 is a network without a head, which gives none, and None one of
            which `stages` alone is called.
        output_stride: of the last block, 32; or 16 or 8, with dilations in the place of strides. A stage
            without its stride has the dilation that the stages before it have earned, so that of stride 16
            only the last block is dilated.
        padding: "ordinary" as torchvision's, or "input", see `InvertedResidual`.
        kernel_init: draws the kernels of convolutions.
        dtype: the type of activations. Parameters and statistics are float32, or float64 if `dtype` is.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key streams `params` and `dropout`.
    """

    def __init__(
        self,
        *,
        num_classes: int | None = 1000,
        output_stride: int = 32,
        padding: str = "ordinary",
        kernel_init: nnx.Initializer = he_normal,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        of_layers: dict[str, Any] = {
            "dtype": dtype,
            "bn_group": bn_group,
            "kernel_init": kernel_init,
            "rngs": rngs,
        }
        self.features: nnx.List[Any] = nnx.List([ConvNorm(3, 32, 3, stride=2, **of_layers)])
        channels, reached, earned = 32, 2, 1
        for expansion, features, depth, stride in _STAGES:
            dilation = 1
            if reached == output_stride:
                dilation, earned, stride = earned, earned * stride, 1
            reached *= stride
            for i in range(depth):
                block = InvertedResidual(
                    channels,
                    features,
                    1 if i else stride,
                    expansion,
                    dilation=dilation,
                    pad_input=padding == "input",
                    **of_layers,
                )
                self.features.append(block)
                channels = features
        self.low_level_features, self.out_features = 24, channels
        if num_classes is not None:
            self.features.append(ConvNorm(channels, 1280, 1, **of_layers))
        if num_classes:
            head = nnx.Linear(
                1280,
                num_classes,
                dtype=dtype,
                param_dtype=at_least_float32(dtype),
                kernel_init=normal(0.01),
                rngs=rngs,
            )
            self.classifier = nnx.List([nnx.Dropout(0.2, rngs=rngs), head])

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        train: bool = False,
        where: Where | None = None,
    ) -> Float[Array, "batch classes"] | None:
        """Return the logits of normalised images, and show what they are made of, the tap `pooled`.

        Args:
            images: normalised images.
            train: normalise by batch statistics and update the running ones, and drop features.
            where: the images that count in batch statistics; None is all.
        """
        x = self.stages(images, train=train, where=where)["layer4"]
        x = relu6(self.features[-1](x, train=train, where=where))
        pooled = reduce(x.astype(at_least_float32(x.dtype)), "b h w c -> b c", "mean")
        show(self, pooled=pooled)
        if not hasattr(self, "classifier"):
            return None
        dropout, head = self.classifier
        return head(dropout(pooled.astype(self.dtype), deterministic=not train))

    def stages(
        self, images: Float[Array, "batch height width 3"], *, train: bool, where: Where | None
    ) -> dict[str, Float[Array, "batch _ _ _"]]:
        """Return DeepLab's `low_level` map, expansions before their ReLU where stages end, and the last map.

        Those are `layer1` of 144 channels, `layer2` of 192, `layer3` of 576; and `layer4` of 320, which has
        no ReLU.
        """
        stem, *others = self.features
        blocks = [layer for layer in others if isinstance(layer, InvertedResidual)]
        x = relu6(stem(images.astype(self.dtype), train=train, where=where))
        maps = {}
        for i, block in enumerate(blocks, 1):
            x, expanded = block(x, train=train, where=where)
            if i == LOW_LEVEL:
                maps["low_level"] = x
            if i in _EXPANDED:
                maps[_EXPANDED[i]] = expanded
        maps["layer4"] = x
        return maps


OPTIONS = {
    "padding": Field(
        "input",
        one_of("input", "ordinary"),
        "what zeros surround: the input of each block, as published, or that of its 3×3 convolution",
    ),
}


def _read_arguments(entries: Mapping[str, np.ndarray]) -> dict[str, Any]:
    head = entries.get("classifier.1.weight")
    return {"num_classes": len(head) if head is not None and head.ndim == 2 else 1000}


ARCHITECTURES = {
    "mobilenet_v2": Architecture(
        build=MobileNetV2,
        head="classifier.1",
        options={},
        read_arguments=_read_arguments,
        published="mobilenet_v2-b0353104.pth",  # torchvision's IMAGENET1K_V1
    )
}
