"""A network small enough to compile in a moment, of the kind that users bring along."""

import jax.numpy as jnp
from flax import nnx

from tat_jax.networks.interpolation import interpolate
from tat_jax.networks.layers import BatchNorm, at_least_float32, conv


class Tiny(nnx.Module):
    """Two convolutions with their taps, and a head."""

    def __init__(self, width, *, classes=5, dtype=jnp.float32, bn_group=None, rngs):
        self.conv1 = conv(3, width, 3, stride=2, dtype=dtype, rngs=rngs)
        self.bn1 = BatchNorm(width, group=bn_group, dtype=dtype)
        self.conv2 = conv(width, 2 * width, 3, stride=2, dtype=dtype, rngs=rngs)
        self.bn2 = BatchNorm(2 * width, group=bn_group, dtype=dtype)
        self.fc = nnx.Linear(2 * width, classes, dtype=dtype, param_dtype=at_least_float32(dtype), rngs=rngs)
        self.dtype = dtype

    def __call__(self, images, *, train=False, where=None):
        """Return logits and sow `layer1` and `layer2`."""
        x = nnx.relu(self.bn1(self.conv1(images.astype(self.dtype)), train=train, where=where))
        self.sow(nnx.Intermediate, "layer1", x)
        x = nnx.relu(self.bn2(self.conv2(x), train=train, where=where))
        self.sow(nnx.Intermediate, "layer2", x)
        return self.fc(x.mean((1, 2)))


class Dropping(Tiny):
    """A network that drops half of its logits in training."""

    def __init__(self, width, *, rngs, **options):
        super().__init__(width, rngs=rngs, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images, *, train=False, where=None):
        logits = super().__call__(images, train=train, where=where)
        return self.dropout(logits, deterministic=not train)


class Segmenter(Tiny):
    """A network that classifies each pixel by its coarse maps, half of which it drops in training."""

    def __init__(self, width, *, rngs, **options):
        super().__init__(width, rngs=rngs, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images, *, train=False, where=None):
        """Return logits of the images' size and sow `decoder`."""
        x = nnx.relu(self.bn1(self.conv1(images.astype(self.dtype)), train=train, where=where))
        x = self.bn2(self.conv2(x), train=train, where=where)
        self.sow(nnx.Intermediate, "decoder", x)
        logits = self.fc(self.dropout(nnx.relu(x), deterministic=not train))
        return interpolate(logits, *images.shape[1:3])
