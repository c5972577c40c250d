"""A network as a stranger wrote it in Linen, with a module that is called twice and one that sows."""

import jax
from flax import linen as nn


class Block(nn.Module):
    """A convolution and its norm."""

    width: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (3, 3), strides=4)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        self.sow("intermediates", "squared", x**2)
        return x


class Network(nn.Module):
    """Two blocks and a head."""

    num_labels: int

    @nn.compact
    def __call__(self, images, train):
        x = Block(8, name="stem")(images, train)
        x = Block(16, name="stage")(x, train)
        return nn.Dense(self.num_labels)(x.mean((1, 2)))


def load(num_labels):
    """Return the network and its variables, as if they were read."""
    network = Network(num_labels)
    images = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    return network, network.init(jax.random.key(0), images, train=True)
