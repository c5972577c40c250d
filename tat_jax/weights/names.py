"""Weights under torchvision's names, into ours and back.

Both differ in the last part alone: `weight` is `kernel` or `scale` here, and `running_mean` is `mean`. timm
names its residual networks as torchvision does.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from tat_jax import networks
from tat_jax.weights import store
from tat_jax.weights.store import StoredNetwork
from tat_jax.weights.torch_file import Entries

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def convert_entries(
    entries: Mapping[str, np.ndarray], architecture: str, *, fresh_head: bool = False, source: str
) -> StoredNetwork:
    """Return a network with the weights of `entries`, which carry torchvision's names and layouts.

    Width, stem and number of classes are read from the shapes; `num_batches_tracked` means nothing here.
    Half-precision entries become float32, which is exact.

    Args:
        entries: tensors by name.
        architecture: a name of a network.
        fresh_head: leave the head out, and start one for ImageNet's 1,000 classes afresh.
        source: what errors call the entries, and the network its origin.

    Raises:
        ValueError: entries are missing, extra, empty, of another shape or not finite; each is named.
    """
    head = _head(architecture)
    entries = {
        name: array
        for name, array in entries.items()
        if not name.endswith("num_batches_tracked") and not (fresh_head and name in head)
    }
    if not fresh_head and not any(name in entries for name in head):
        raise ValueError(f"{source} has no head ({', '.join(head)}); --head fresh starts one afresh")
    empty = [name for name, array in entries.items() if not array.size]
    if empty:  # Its shape may claim any width and any number of classes.
        raise ValueError(f"{source} has no numbers in {', '.join(empty)}")
    arguments = {
        "architecture": architecture,
        **networks.find(architecture).read_arguments(entries),
    }
    expected = _torch_shapes(arguments)
    if fresh_head:
        expected = {name: shape for name, shape in expected.items() if name not in head}
    store.check_entries({name: a.shape for name, a in entries.items()}, expected, source=source)
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinity, here as in training.
        broken = [name for name, array in entries.items() if not np.isfinite(array.astype(np.float32)).all()]
    if broken:
        raise ValueError(f"{source} has NaN or infinity in {', '.join(broken)}")
    weights = {}
    for path in _shapes(arguments):
        if torch_name(path) in entries:
            weights[path] = to_ours(path, entries[torch_name(path)])
    if fresh_head:
        own = store.network_weights(networks.construct(arguments, rngs=nnx.Rngs(0)))
        weights |= {path: value for path, value in own.items() if torch_name(path) in head}
    return StoredNetwork(weights, arguments, {"head": "fresh" if fresh_head else "trained", "source": source})


def _head(architecture: str) -> tuple[str, str]:
    module = networks.find(architecture).head
    return f"{module}.weight", f"{module}.bias"


def export_entries(network: StoredNetwork) -> Entries:
    """Return the weights of a network under torchvision's names, in PyTorch's layouts.

    Raises:
        ValueError: the network is not one of this package's.
    """
    if not network.arguments:
        raise ValueError("this network is not one of torchvision's kind, so it has no names there")
    return {
        torch_name(path): np.ascontiguousarray(to_torch(path, np.asarray(array)))
        for path, array in network.weights.items()
    }


def torch_name(path: str) -> str:
    """Return torchvision's name of one of our attribute paths."""
    module, leaf = path.rsplit(".", 1)
    return f"{module}.{_LEAVES[leaf]}"


def to_ours(path: str, array: np.ndarray) -> np.ndarray:
    """Return PyTorch's array for the attribute `path` in our layout, in float32 at least."""
    array = array.astype(
        np.promote_types(array.dtype, np.float32) if array.dtype != jnp.bfloat16 else np.float32
    )
    if not path.endswith("kernel"):
        return array
    return rearrange(array, "o i h w -> h w i o" if array.ndim == 4 else "o i -> i o")


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """Return our array at the attribute `path` in PyTorch's layout, as a view."""
    if path.endswith("kernel"):
        array = rearrange(array, "h w i o -> o i h w" if array.ndim == 4 else "i o -> o i")
    return array


def _torch_shapes(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        torch_name(path): to_torch(path, np.broadcast_to(np.float32(0), shape)).shape
        for path, shape in _shapes(arguments).items()
    }


def _shapes(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a network, without making one."""
    model = nnx.eval_shape(lambda: networks.construct(arguments, rngs=nnx.Rngs(0)))
    return {path: leaf.shape for path, leaf in store.network_weights(model).items()}
