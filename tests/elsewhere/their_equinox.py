"""A network as a stranger wrote it in Equinox: of one image, with a state and dropout."""

import equinox as eqx
import jax


class Network(eqx.Module):
    """Two convolutions and a head."""

    stem: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    stage: eqx.nn.Conv2d
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, num_labels, key):
        keys = jax.random.split(key, 3)
        self.stem = eqx.nn.Conv2d(3, 8, 3, stride=4, padding=1, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.stage = eqx.nn.Conv2d(8, 16, 3, stride=4, padding=1, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(16, num_labels, key=keys[2])

    def __call__(self, image, state, key=None):
        x, state = self.norm(self.stem(image), state)
        features = jax.nn.relu(self.stage(jax.nn.relu(x)))
        pooled = self.dropout(features.mean((1, 2)), key=key)
        return (self.head(pooled), features), state


def load(num_labels):
    """Return the network and its state after a batch, as if they were read."""
    network, state = eqx.nn.make_with_state(Network)(num_labels, jax.random.key(0))
    images, keys = (
        jax.random.normal(jax.random.key(1), (4, 3, 32, 32)),
        jax.random.split(jax.random.key(2), 4),
    )
    run = jax.vmap(network, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    return network, run(images, state, keys)[1]
