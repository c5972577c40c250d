"""A network as a stranger wrote it in Flax's nnx: images as PyTorch has them, results by name."""

import jax.numpy as jnp
from flax import nnx


class Network(nnx.Module):
    """Two convolutions and a head; called as `network(images, rngs=rngs)`."""

    def __init__(self, num_labels, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=4, rngs=rngs)
        self.stage = nnx.Conv(8, 16, (3, 3), strides=4, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)
        self.head = nnx.Linear(16, num_labels, rngs=rngs)

    def __call__(self, images, rngs):
        x = nnx.relu(self.stem(jnp.moveaxis(images, 1, -1)))
        features = nnx.relu(self.norm(self.stage(x)))
        pooled = self.dropout(features.mean((1, 2)), rngs=rngs)
        return {"features": jnp.moveaxis(features, -1, 1), "scores": self.head(pooled)}
