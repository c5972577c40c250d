"""The student and the teacher a config names, with their weights."""

from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from tat_jax import checkpoint
from tat_jax.resnet import ResNet

RANDOM = "random"  # weights drawn from the seed instead of read from a folder


class BuiltNetwork(NamedTuple):
    """A network with its weights in place.

    Attributes:
        model: the network.
        arguments: what builds it again: the keyword arguments of `ResNet`. Empty for a network of your own.
        origin: where its weights came from; `head` is "fresh" where its logits mean nothing yet.
    """

    model: nnx.Module
    arguments: dict[str, Any]
    origin: dict[str, str]


def restore(folder: str | Path, *, dtype: str = "float32") -> BuiltNetwork:
    """Build the network of a folder of converted weights, of a checkpoint, or the best one of a run.

    Raises:
        FileNotFoundError: there is no network in `folder`.
        ValueError: what is there cannot be read.
    """
    return _with_weights(checkpoint.load_network(checkpoint.network_folder(Path(folder))), folder, dtype)


def _with_weights(network: checkpoint.Network, source: str | Path, dtype: str) -> BuiltNetwork:
    if not network.arguments:
        raise ValueError(f"{source} holds a network of your own; build it, then set its weights")
    model = ResNet(**network.arguments, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    checkpoint.set_weights(model, network.weights, source=str(source))
    return BuiltNetwork(model, network.arguments, {**network.origin, "source": str(source)})


def student(
    config: ConfigDict, *, num_classes: int, dtype: str, bn_group: int | None, seed: int
) -> BuiltNetwork:
    """Build the student of a config for `num_classes`, from its `weights`, which may be "random".

    A head that is missing there, or has another number of classes, starts fresh.

    Raises:
        FileNotFoundError: the weights do not exist.
        ValueError: they are another network's.
    """
    arguments = _arguments(config, num_classes)
    model = ResNet(**arguments, dtype=jnp.dtype(dtype), bn_group=bn_group, rngs=nnx.Rngs(seed))
    if config.weights == RANDOM:
        return BuiltNetwork(model, arguments, {"head": "fresh", "source": f"random weights, seed {seed}"})
    network = _load(config)
    weights, origin = network.weights, {**network.origin, "source": config.weights}
    if origin["head"] == "fresh" or network.arguments["num_classes"] != num_classes:
        own = checkpoint.network_weights(model)
        weights = weights | {name: own[name] for name in ("fc.kernel", "fc.bias")}
        origin["head"] = "fresh"
    checkpoint.set_weights(model, weights, source=config.weights)
    return BuiltNetwork(model, arguments, origin)


def teacher(config: ConfigDict, *, num_classes: int, dtype: str, seed: int) -> BuiltNetwork:
    """Build the teacher of a config from its `weights`; "random" ones, for trials, have `num_classes`.

    Raises:
        FileNotFoundError: the weights do not exist.
        ValueError: they are another network's.
    """
    if config.weights == RANDOM:
        arguments = _arguments(config, num_classes)
        model = ResNet(**arguments, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(seed))
        return BuiltNetwork(model, arguments, {"head": "trained", "source": f"random weights, seed {seed}"})
    return _with_weights(_load(config), config.weights, dtype)


def _arguments(config: ConfigDict, num_classes: int) -> dict[str, Any]:
    return {
        "architecture": config.architecture,
        "num_classes": num_classes,
        "small_images": config.small_images,
        "width": config.width,
    }


def _load(config: ConfigDict) -> checkpoint.Network:
    """Read the network a config names, and check that it is the one it describes."""
    try:
        network = checkpoint.load_network(checkpoint.network_folder(Path(config.weights)))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no weights in {config.weights}; make them with: "
            f"python -m tat_jax.convert {config.architecture} --to {config.weights}"
        ) from error
    for name, wanted in _arguments(config, network.arguments.get("num_classes", 0)).items():
        found = network.arguments.get(name)
        if found != wanted:
            raise ValueError(f"{config.weights} holds a network of {name}={found}, the config has {wanted}")
    return network
