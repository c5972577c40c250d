"""VGG networks for CIFAR, as RepDistiller has them.

Very Deep Convolutional Networks for Large-Scale Image Recognition, Simonyan & Zisserman, ICLR 2015, with
BatchNorm, one linear layer, and max-pools behind the first three of five stages alone. The taps `stem` and
`stage1` … are behind a stage's last ReLU, those of `_preact` before it.
"""

import functools
import re

import jax.numpy as jnp
from flax import nnx
from jaxtyping import DTypeLike

from tat_jax.batch import Where
from tat_jax.networks.cifar import CLASSES, CifarNetwork, Maps, Out, Taps, architecture
from tat_jax.networks.layers import BatchNorm, conv, normal

_WIDTHS = (64, 128, 256, 512, 512)
_POOLED = 3  # stages before a max-pool


class VGG(CifarNetwork):
    """Classify images by five stages of 3×3 convolutions.

    Args:
        depth: convolutions in each stage.
        num_classes: the number of logits; 0 is a network without a head.
        dtype: the type of activations. Parameters and statistics are float32, or float64 if `dtype` is.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = CLASSES,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        features = 3
        self.stages = tuple(f"block{i}" for i in range(len(_WIDTHS)))
        for name, width in zip(self.stages, _WIDTHS, strict=True):
            layers: nnx.List[nnx.Conv | BatchNorm] = nnx.List([])
            for _ in range(depth):
                layers.append(conv(features, width, 3, use_bias=True, dtype=dtype, rngs=rngs))
                layers.append(BatchNorm(width, group=bn_group, dtype=dtype))
                features = width
            setattr(self, name, layers)
        zeros = nnx.initializers.zeros_init()
        self._add_head(
            features, num_classes, dtype=dtype, rngs=rngs, kernel_init=normal(0.01), bias_init=zeros
        )

    def maps(self, images: Maps, *, train: bool, where: Where | None) -> tuple[Out, Taps]:
        """Return the last stage's maps, and the taps."""
        taps: Taps = {}
        x = images
        for i, name in enumerate(self.stages):
            layers = getattr(self, name)
            for convolution, norm in zip(layers[::2], layers[1::2], strict=True):
                normalised = norm(convolution(x), train=train, where=where)
                x = nnx.relu(normalised)
            taps |= {f"stage{i}": x, f"stage{i}_preact": normalised} if i else {"stem": x}
            if i < _POOLED:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return x, taps


def _in_torch(path: str) -> str:
    """Return where a layer stands in PyTorch, whose sequences count ReLUs, too."""
    return re.sub(r"^(block\d)\.(\d+)", lambda found: f"{found[1]}.{int(found[2]) * 3 // 2}", path)


ARCHITECTURES = {
    name: architecture(functools.partial(VGG, depth), head="classifier", torch_modules=_in_torch)
    for name, depth in (("vgg8", 1), ("vgg13", 2))
}
