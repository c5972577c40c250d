"""DeepLabV3+ over ResNets and MobileNetV2, whose attributes carry the names of the public checkpoints.

Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation, Chen et al., ECCV 2018,
with the sizes and names of https://github.com/jfzhang95/pytorch-deeplab-xception.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.fields import YES_OR_NO, Field, one_of
from tat_jax.networks import mobilenet, resnet
from tat_jax.networks.architecture import Architecture
from tat_jax.networks.interpolation import convolve_interpolated, interpolate
from tat_jax.networks.layers import BatchNorm, at_least_float32, conv, he_normal_by_inputs, uniform
from tat_jax.networks.resnet import Maps, Where
from tat_jax.networks.taps import show

_CHANNELS, _LOW_LEVEL_CHANNELS = 256, 48
_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # of the pyramid's dilated convolutions, by output stride
_HEAD = "decoder.last_conv.8"
_CLASSES = 21  # of VOC, where weights do not tell


class Branch(nnx.Module):
    """A convolution of the pyramid, its normalisation and a ReLU."""

    def __init__(
        self,
        in_features: int,
        size: int,
        *,
        dilation: int = 1,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        self.atrous_conv = conv(
            in_features,
            _CHANNELS,
            size,
            dilation=dilation,
            dtype=dtype,
            kernel_init=he_normal_by_inputs,
            rngs=rngs,
        )
        self.bn = BatchNorm(_CHANNELS, group=bn_group, dtype=dtype)

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch height width c"]:
        return nnx.relu(self.bn(self.atrous_conv(x), train=train, where=where))


class ASPP(nnx.Module):
    """Atrous spatial pyramid pooling: what is near, far and everywhere, put together by a 1×1 convolution."""

    def __init__(
        self,
        in_features: int,
        *,
        output_stride: int,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        branch = functools.partial(Branch, in_features, dtype=dtype, bn_group=bn_group, rngs=rngs)
        one = functools.partial(conv, size=1, dtype=dtype, kernel_init=he_normal_by_inputs, rngs=rngs)
        near, far, farther = _RATES[output_stride]
        self.aspp1 = branch(1)
        self.aspp2 = branch(3, dilation=near)
        self.aspp3 = branch(3, dilation=far)
        self.aspp4 = branch(3, dilation=farther)
        norm = functools.partial(BatchNorm, _CHANNELS, group=bn_group, dtype=dtype)
        self.global_avg_pool: nnx.List[Any] = nnx.List([_average, one(in_features, _CHANNELS), norm()])
        self.conv1 = one(5 * _CHANNELS, _CHANNELS)
        self.bn1 = norm()

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Float[Array, "batch height width c"]:
        """Return its map before the ReLU, the tap `aspp`."""
        mode: dict[str, Any] = {"train": train, "where": where}
        branches = [branch(x, **mode) for branch in (self.aspp1, self.aspp2, self.aspp3, self.aspp4)]
        average, convolution, norm = self.global_avg_pool
        pooled = nnx.relu(norm(convolution(average(x)), **mode))
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        return self.bn1(self.conv1(jnp.concatenate(branches, axis=-1)), **mode)


def _average(x: Maps) -> Float[Array, "batch 1 1 channels"]:
    return reduce(x.astype(at_least_float32(x.dtype)), "b h w c -> b 1 1 c", "mean").astype(x.dtype)


class Decoder(nnx.Module):
    """Refine the pyramid's map by a larger one of the backbone's first layers, and classify its pixels."""

    def __init__(
        self,
        low_level_features: int,
        num_classes: int,
        *,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        of_layers: dict[str, Any] = {"dtype": dtype, "kernel_init": he_normal_by_inputs, "rngs": rngs}
        norm = functools.partial(BatchNorm, group=bn_group, dtype=dtype)
        self.conv1 = conv(low_level_features, _LOW_LEVEL_CHANNELS, 1, **of_layers)
        self.bn1 = norm(_LOW_LEVEL_CHANNELS)
        self.last_conv: nnx.List[Any] = nnx.List(
            [
                conv(_CHANNELS + _LOW_LEVEL_CHANNELS, _CHANNELS, 3, **of_layers),
                norm(_CHANNELS),
                nnx.relu,
                nnx.Dropout(0.5, rngs=rngs),
                conv(_CHANNELS, _CHANNELS, 3, **of_layers),
                norm(_CHANNELS),
                nnx.relu,
                nnx.Dropout(0.1, rngs=rngs),
                nnx.Conv(
                    _CHANNELS,
                    num_classes,
                    (1, 1),
                    param_dtype=at_least_float32(dtype),
                    bias_init=uniform(_CHANNELS**-0.5),
                    **of_layers,
                ),
            ]
        )

    def __call__(
        self, x: Maps, low_level: Float[Array, "batch h w low"], *, train: bool, where: Where | None
    ) -> Float[Array, "batch h w c"]:
        """Return its last map before the ReLU, the tap `decoder`, which is distilled."""
        mode: dict[str, Any] = {"train": train, "where": where}
        low_level = nnx.relu(self.bn1(self.conv1(low_level), **mode))
        first, norm1, relu, dropout, second, norm2, *_ = self.last_conv
        x = relu(norm1(_join(first.kernel[...], x, low_level), **mode))
        return norm2(second(dropout(x, deterministic=not train)), **mode)

    def classify(self, x: Maps, *, train: bool) -> Float[Array, "batch height width classes"]:
        """Return the logits of its last map."""
        *_, relu, dropout, head = self.last_conv
        return head(dropout(relu(x), deterministic=not train))


def _join(
    kernel: Float[Array, "size size both features"], x: Maps, low_level: Float[Array, "batch h w low"]
) -> Float[Array, "batch h w features"]:
    """Convolve interpolated maps with those beside them, each with its part of the kernel."""
    of_x, of_low_level = jnp.split(kernel, [x.shape[-1]], axis=2)
    y = convolve_interpolated(x, of_x, *low_level.shape[1:3])
    beside = jax.lax.conv_general_dilated(
        low_level,
        of_low_level.astype(low_level.dtype),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return (y + beside).astype(x.dtype)


class DeepLab(nnx.Module):
    """Classify every pixel; taps are `low_level`, `layer1` … `layer4`, `aspp` and `decoder`.

    Args:
        backbone: makes a ResNet or a MobileNetV2, called as `Architecture.build`.
        num_classes: the number of logits of a pixel, at least 1.
        output_stride: of the backbone's last map, 16 or 8.
        aspp_dropout: whether half of the pyramid's map is dropped in training, as in training without a
            teacher; the published distillation leaves it out.
        dtype: the type of activations. Parameters and statistics are float32, or float64 if `dtype` is.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key streams `params` and `dropout`.
        of_backbone: further options of the backbone.
    """

    def __init__(
        self,
        backbone: Callable[..., Any],
        *,
        num_classes: int = _CLASSES,
        output_stride: int = 16,
        aspp_dropout: bool = True,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
        **of_backbone: Any,
    ):
        if num_classes < 1:
            raise ValueError(
                "DeepLabV3+ classifies pixels, and there are no classes (num_classes=0): take its backbone "
                "alone to learn without labels, as resnet18"
            )
        of_layers: dict[str, Any] = {"dtype": dtype, "bn_group": bn_group, "rngs": rngs}
        self.backbone = backbone(num_classes=None, output_stride=output_stride, **of_backbone, **of_layers)
        self.aspp = ASPP(self.backbone.out_features, output_stride=output_stride, **of_layers)
        self.dropout = nnx.Dropout(0.5 if aspp_dropout else 0.0, rngs=rngs)
        self.decoder = Decoder(self.backbone.low_level_features, num_classes, **of_layers)

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        train: bool = False,
        where: Where | None = None,
    ) -> Float[Array, "batch height width classes"]:
        """Return the logits of each pixel of normalised images, in float32 at least.

        Args:
            images: normalised images.
            train: normalise by batch statistics and update the running ones, and drop features.
            where: the images that count in batch statistics; None is all.
        """
        maps = self.backbone.stages(images, train=train, where=where)
        show(self, **maps)
        x = nnx.relu(self.aspp(maps["layer4"], train=train, where=where))
        x = self.dropout(x, deterministic=not train)
        x = self.decoder(x, maps["low_level"], train=train, where=where)
        return interpolate(self.decoder.classify(x, train=train), *images.shape[1:3])


_OPTIONS = {
    "output_stride": Field(16, one_of(16, 8), "of the last map of a segmentation network's backbone"),
    "aspp_dropout": Field(
        True, YES_OR_NO, "drop half of the pyramid's map in training; published distillation does not"
    ),
}


def _architecture(
    name: str, backbone: Architecture, options: Mapping[str, Field], **build: Any
) -> Architecture:
    return Architecture(
        build=functools.partial(DeepLab, functools.partial(backbone.build, **build)),
        head=_HEAD,
        options={**_OPTIONS, **options},
        read_arguments=functools.partial(_read_arguments, backbone, options),
        free=tuple(_OPTIONS),
        backbone=name,
    )


def _torch_modules_of_mobilenet(path: str) -> tuple[str, ...]:
    """Return the public checkpoints' names, which count within blocks what torchvision has in pairs.

    The two halves of the backbone are further attributes of it.
    """
    found = re.fullmatch(r"backbone\.features\.(\d+)\.(.*)", path)
    if not found:
        return (path,)
    number, within = int(found[1]), found[2]
    if number:
        first, *pair = (int(part) for part in within.removeprefix("conv.").split("."))
        layers = 1 if number == 1 else 2  # that are pairs, and in PyTorch three modules each with their ReLU
        within = f"conv.{3 * first + pair[0] if pair else 3 * layers + first - layers}"
    half = "low" if number <= mobilenet.LOW_LEVEL else "high"
    return tuple(f"backbone.{part}.{number}.{within}" for part in ("features", f"{half}_level_features"))


def _read_arguments(
    backbone: Architecture, options: Mapping[str, Field], entries: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    below = {name.removeprefix("backbone."): a for name, a in entries.items() if name.startswith("backbone.")}
    told = backbone.read_arguments(below)
    head = entries.get(f"{_HEAD}.weight")
    of_options = {name: told.get(name, field.default) for name, field in options.items()}
    defaults = {name: field.default for name, field in _OPTIONS.items()}
    classes = len(head) if head is not None and head.ndim == 4 else _CLASSES
    return {"num_classes": classes, **defaults, **of_options}


ARCHITECTURES = {
    f"deeplab_{name}": _architecture(name, resnet.ARCHITECTURES[name], {"width": resnet.OPTIONS["width"]})
    for name in ("resnet18", "resnet34", "resnet50", "resnet101")
} | {
    "deeplab_mobilenet_v2": _architecture(
        "mobilenet_v2",
        mobilenet.ARCHITECTURES["mobilenet_v2"],
        mobilenet.OPTIONS,
        kernel_init=he_normal_by_inputs,
    )._replace(torch_modules=_torch_modules_of_mobilenet)
}
