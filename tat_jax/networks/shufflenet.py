"""ShuffleNets for CIFAR, whose attributes carry RepDistiller's names.

ShuffleNet, Zhang et al., CVPR 2018, of three groups, and ShuffleNet V2, Ma et al., ECCV 2018, of width 1,
both behind a 1×1 stem and without a max-pool. The taps of stages are behind their last ReLU, those of
`_preact` before it.
"""

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import DTypeLike

from tat_jax.batch import Where
from tat_jax.networks.cifar import CLASSES, CifarNetwork, Maps, Out, Taps, architecture
from tat_jax.networks.layers import BatchNorm, conv, torch_uniform

_STEM, _GROUPS = 24, 3
_LAST = 1024  # channels before the head of ShuffleNet V2


def shuffle(x: Maps, groups: int) -> Out:
    """Return the channels of so many groups in turns, each group's first one before all second ones."""
    return rearrange(x, "b h w (g c) -> b h w (c g)", g=groups)


class ShuffleUnit(nnx.Module):
    """1×1 by groups, shuffle, 3×3 of each channel, 1×1 by groups; beside a mean where maps are halved."""

    def __init__(
        self, in_features: int, features: int, stride: int, *, bn_group: int | None, **of_convs: Any
    ):
        self.halves = stride > 1
        self.groups = 1 if in_features == _STEM else _GROUPS
        out = features - in_features if self.halves else features
        middle = out // 4
        self.conv1 = conv(in_features, middle, 1, groups=self.groups, **of_convs)
        self.conv2 = conv(middle, middle, 3, stride=stride, groups=middle, **of_convs)
        self.conv3 = conv(middle, out, 1, groups=_GROUPS, **of_convs)
        of_norms = {"group": bn_group, "dtype": of_convs["dtype"]}
        self.bn1, self.bn2 = BatchNorm(middle, **of_norms), BatchNorm(middle, **of_norms)
        self.bn3 = BatchNorm(out, **of_norms)

    def before_relu(self, x: Maps, *, train: bool, where: Where | None) -> Out:
        """Return the sum of both branches, or both one after the other."""
        y = nnx.relu(self.bn1(self.conv1(x), train=train, where=where))
        y = nnx.relu(self.bn2(self.conv2(shuffle(y, self.groups)), train=train, where=where))
        y = self.bn3(self.conv3(y), train=train, where=where)
        if not self.halves:
            return y + x
        # Zeros around the map count as its positions do.
        beside = nnx.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=True)
        return jnp.concatenate([y, beside], axis=-1)


class ShuffleNetV1(CifarNetwork):
    """Classify images by three stages of such units, each of half the height and width of the one before.

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
        of_convs: dict[str, Any] = {"dtype": dtype, "kernel_init": torch_uniform, "rngs": rngs}
        self.conv1 = conv(3, _STEM, 1, **of_convs)
        self.bn1 = BatchNorm(_STEM, group=bn_group, dtype=dtype)
        self.stages = ("layer1", "layer2", "layer3")
        features = _STEM
        for name, width, depth in zip(self.stages, (240, 480, 960), (4, 8, 4), strict=True):
            units = [ShuffleUnit(features, width, 2, bn_group=bn_group, **of_convs)]
            units += [ShuffleUnit(width, width, 1, bn_group=bn_group, **of_convs) for _ in range(depth - 1)]
            setattr(self, name, nnx.List(units))
            features = width
        self._add_head(features, num_classes, dtype=dtype, rngs=rngs)

    def maps(self, images: Maps, *, train: bool, where: Where | None) -> tuple[Out, Taps]:
        """Return the last stage's maps, and the taps."""
        x = nnx.relu(self.bn1(self.conv1(images), train=train, where=where))
        stages = (getattr(self, name) for name in self.stages)
        return self._by_sums(x, stages, train=train, where=where)


class SplitUnit(nnx.Module):
    """Leave half of the channels as they are, and convolve the other half 1×1, 3×3 each by itself, 1×1."""

    def __init__(self, features: int, *, bn_group: int | None, **of_convs: Any):
        half = features // 2
        of_norms = {"group": bn_group, "dtype": of_convs["dtype"]}
        self.conv1, self.bn1 = conv(half, half, 1, **of_convs), BatchNorm(half, **of_norms)
        self.conv2, self.bn2 = conv(half, half, 3, groups=half, **of_convs), BatchNorm(half, **of_norms)
        self.conv3, self.bn3 = conv(half, half, 1, **of_convs), BatchNorm(half, **of_norms)

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> tuple[Out, Out]:
        """Return the unit's output, and the same without ReLU and shuffle."""
        left, right = jnp.split(x, 2, axis=-1)
        y = nnx.relu(self.bn1(self.conv1(right), train=train, where=where))
        y = self.bn2(self.conv2(y), train=train, where=where)
        y = self.bn3(self.conv3(y), train=train, where=where)
        total = jnp.concatenate([left, y], axis=-1)
        return shuffle(jnp.concatenate([left, nnx.relu(y)], axis=-1), 2), total


class HalvingUnit(nnx.Module):
    """Halve height and width in two branches, 3×3 each and 1×1, and 1×1, 3×3 each and 1×1."""

    def __init__(self, in_features: int, features: int, *, bn_group: int | None, **of_convs: Any):
        half = features // 2
        of_norms = {"group": bn_group, "dtype": of_convs["dtype"]}
        each = {"stride": 2, **of_convs}
        self.conv1 = conv(in_features, in_features, 3, groups=in_features, **each)
        self.bn1 = BatchNorm(in_features, **of_norms)
        self.conv2, self.bn2 = conv(in_features, half, 1, **of_convs), BatchNorm(half, **of_norms)
        self.conv3, self.bn3 = conv(in_features, half, 1, **of_convs), BatchNorm(half, **of_norms)
        self.conv4, self.bn4 = conv(half, half, 3, groups=half, **each), BatchNorm(half, **of_norms)
        self.conv5, self.bn5 = conv(half, half, 1, **of_convs), BatchNorm(half, **of_norms)

    def __call__(self, x: Maps, *, train: bool, where: Where | None) -> Out:
        """Return both branches, shuffled."""
        left = self.bn1(self.conv1(x), train=train, where=where)
        left = nnx.relu(self.bn2(self.conv2(left), train=train, where=where))
        right = nnx.relu(self.bn3(self.conv3(x), train=train, where=where))
        right = self.bn4(self.conv4(right), train=train, where=where)
        right = nnx.relu(self.bn5(self.conv5(right), train=train, where=where))
        return shuffle(jnp.concatenate([left, right], axis=-1), 2)


class ShuffleNetV2(CifarNetwork):
    """Classify images by three stages of such units, and a 1×1 convolution to 1,024 channels.

    The channels of a `_preact` tap are in another order than those of its stage: no shuffle has seen them.

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
        of_convs: dict[str, Any] = {"dtype": dtype, "kernel_init": torch_uniform, "rngs": rngs}
        self.conv1 = conv(3, _STEM, 1, **of_convs)
        self.bn1 = BatchNorm(_STEM, group=bn_group, dtype=dtype)
        self.stages = ("layer1", "layer2", "layer3")
        features = _STEM
        for name, width, depth in zip(self.stages, (116, 232, 464), (3, 7, 3), strict=True):
            halving = HalvingUnit(features, width, bn_group=bn_group, **of_convs)
            units = [SplitUnit(width, bn_group=bn_group, **of_convs) for _ in range(depth)]
            setattr(self, name, nnx.List([halving, *units]))
            features = width
        self.conv2 = conv(features, _LAST, 1, **of_convs)
        self.bn2 = BatchNorm(_LAST, group=bn_group, dtype=dtype)
        self._add_head(_LAST, num_classes, dtype=dtype, rngs=rngs)

    def maps(self, images: Maps, *, train: bool, where: Where | None) -> tuple[Out, Taps]:
        """Return the maps of 1,024 channels, and the taps."""
        x = nnx.relu(self.bn1(self.conv1(images), train=train, where=where))
        taps: Taps = {"stem": x}
        for i, name in enumerate(self.stages, start=1):
            halving, *units = getattr(self, name)
            x = halving(x, train=train, where=where)
            for unit in units:
                x, total = unit(x, train=train, where=where)
            taps |= {f"stage{i}": x, f"stage{i}_preact": total}
        return nnx.relu(self.bn2(self.conv2(x), train=train, where=where)), taps


ARCHITECTURES = {
    "shufflenet_v1": architecture(ShuffleNetV1, head="linear"),
    "shufflenet_v2": architecture(ShuffleNetV2, head="linear"),
}
