"""Weights under torchvision's names, or those of the public DeepLabV3+ checkpoints, into ours and back.

Most differ in the last part alone: `weight` is `kernel` or `scale` here, and `running_mean` is `mean`. timm
names its residual networks as torchvision does. Where modules have other names in PyTorch, too, or arrays in
further libraries, their `Architecture` says so.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from tat_jax import networks
from tat_jax.weights import store
from tat_jax.weights.prefixes import Names, find
from tat_jax.weights.store import StoredNetwork
from tat_jax.weights.tensors import Entries

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def convert_entries(
    entries: Mapping[str, np.ndarray],
    architecture: str,
    *,
    head: Literal["fresh", "none"] | None = None,
    prefix: str | None = None,
    ema: bool = False,
    source: str,
) -> StoredNetwork:
    """Return a network with the weights of `entries`, which carry torchvision's names, under any prefix.

    They may be MLX's or Flax's spelling of them. Width, stem and number of classes are read from the shapes;
    `num_batches_tracked` means nothing here. Half-precision entries become float32, which is exact.

    Args:
        entries: tensors by name.
        architecture: a name of a network.
        head: leave the head out, and start one for the classes of ImageNet, or VOC, "fresh"; or have "none".
            None takes the one that is there, without which only a network that is published so converts.
        prefix: under which to look, where several networks are there.
        ema: take the moving average of the network instead of the network.
        source: what errors call the entries, and the network its origin; the origin says what was `taken`,
            where there was a choice.

    Raises:
        ValueError: entries are missing, extra, empty, of another shape, not finite or whole numbers; each is
            named. Or no network is there, or several.
    """
    of_head = _head(architecture)
    entries, taken = _of_network(entries, architecture, prefix=prefix, ema=ema, source=source)
    entries = _without_doubles(entries, architecture, source)
    if head is not None:
        entries = {name: array for name, array in entries.items() if name not in of_head}
    empty = [name for name, array in entries.items() if not array.size]
    if empty:  # Its shape may claim any width and any number of classes.
        raise ValueError(f"{source} has no numbers in {', '.join(empty)}")
    entries, arguments, shapes = _laid_out(entries, architecture, head, source)
    headless = head is None and not any(name in entries for name in of_head)
    if headless and arguments["num_classes"] and _body(architecture) <= entries.keys():
        raise ValueError(
            f"{source} has no head ({', '.join(of_head)}); "
            "--head fresh starts one afresh, --head none goes without"
        )
    expected = _in_torch(shapes, architecture)
    if head == "fresh":
        expected = {name: shape for name, shape in expected.items() if name not in of_head}
    store.check_entries({name: a.shape for name, a in entries.items()}, expected, source=source)
    _check_numbers(entries, source)
    names = {path: torch_names(path, architecture)[0] for path in shapes}
    weights: store.Weights = {
        path: to_ours(path, entries[name]) for path, name in names.items() if name in entries
    }
    if head == "fresh":
        own = store.network_weights(networks.construct(arguments, rngs=nnx.Rngs(0)))
        weights |= {path: value for path, value in own.items() if names[path] in of_head}
    state = store.NO_HEAD if not arguments["num_classes"] else head or "trained"
    origin = {"head": state, "source": source} | ({"taken": taken} if taken else {})
    return StoredNetwork(weights, arguments, origin)


def _torch_head(architecture: str) -> str:
    found = networks.find(architecture)
    return found.torch_modules(found.head)[0]


def _head(architecture: str) -> tuple[str, str]:
    module = _torch_head(architecture)
    return f"{module}.weight", f"{module}.bias"


@functools.cache
def _body(architecture: str) -> frozenset[str]:
    """Return the names of a network's arrays, but for its head's."""
    return frozenset(torch_names(path, architecture)[0] for path in _paths(architecture)) - {
        *_head(architecture)
    }


@functools.cache
def _paths(architecture: str) -> tuple[str, ...]:
    """Return the paths of the arrays that every network of an architecture has."""
    return tuple(
        _shapes({"architecture": architecture, "num_classes": 1, **networks.find(architecture).least})
    )


def _of_network(
    entries: Mapping[str, np.ndarray], architecture: str, *, source: str, **choice: Any
) -> tuple[Entries, str]:
    """Return the entries of the network under its own names, and what was chosen of which."""
    entries, body = _in_torch_names(entries, source), _body(architecture)
    entries = networks.find(architecture).translate(entries)
    own = Names(architecture, body, _torch_head(architecture))
    # MLX counts the layers of a sequence below that name, which other networks have of their own.
    without = {re.sub(r"\.layers\.(?=\d)", ".", name): array for name, array in entries.items()}
    if len(without) == len(entries) and len(body & without.keys()) > len(body & entries.keys()):
        entries = without
    found = find(entries, own, source=source, **choice)
    return {name: entries[place] for name, place in found.names.items()}, found.said


def _without_doubles(entries: Entries, architecture: str, source: str) -> Entries:
    """Return the entries without those that PyTorch has under a further name."""
    entries = dict(entries)
    for path in _paths(architecture):
        first, *others = torch_names(path, architecture)
        for name in others:
            double = entries.pop(name, None)
            if double is not None and not np.array_equal(double, entries.get(first, double)):
                raise ValueError(
                    f"{source} has other numbers in {name} than in {first}, which are one module"
                )
    return entries


def _in_torch_names(entries: Mapping[str, np.ndarray], source: str) -> Entries:
    """Return the entries without counters, Flax's leaves and layouts being PyTorch's."""
    kept = {name: array for name, array in entries.items() if not name.endswith("num_batches_tracked")}
    if not any(name.endswith(".kernel") for name in kept):
        return kept
    found = {}
    for path, array in kept.items():
        found[torch_name(path)] = to_torch(path, array) if array.ndim in (2, 4) else array
    if len(found) < len(kept):
        raise ValueError(f"{source} has tensors with PyTorch's names and Flax's, which would be the same")
    return found


def _laid_out(
    entries: Entries, architecture: str, head: str | None, source: str
) -> tuple[Entries, dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return the entries in PyTorch's layout, what builds the network, and the shapes of its own arrays.

    MLX has the features of a kernel last. Where that does not make all kernels fit, they stay as they are.
    """
    found = []
    for layout in ("o i h w", "o h w i"):
        turned = {n: rearrange(a, f"{layout} -> o i h w") if a.ndim == 4 else a for n, a in entries.items()}
        arguments = _arguments(turned, architecture, head, source)
        shapes = _shapes(arguments)
        found.append((turned, arguments, shapes))
        expected = _in_torch(shapes, architecture)
        if all(a.ndim != 4 or expected.get(n, a.shape) == a.shape for n, a in turned.items()):
            return found[-1]
    return found[0]


def _arguments(entries: Entries, architecture: str, head: str | None, source: str) -> dict[str, Any]:
    """Return what builds the network that entries fit, with the head that is wanted."""
    try:
        found = networks.find(architecture).read_arguments(entries)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if head == "none":
        found["num_classes"] = 0
    elif head == "fresh":
        found["num_classes"] = found["num_classes"] or 1000  # of ImageNet
    return {"architecture": architecture, **found}


def _check_numbers(entries: Entries, source: str) -> None:
    whole = [name for name, array in entries.items() if not jnp.issubdtype(array.dtype, jnp.floating)]
    if whole:
        raise ValueError(
            f"{source} has numbers that are no floating-point ones, as quantised networks have, in "
            f"{', '.join(whole)}; convert the network from before"
        )
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinity, here as in training.
        broken = [name for name, array in entries.items() if not np.isfinite(array.astype(np.float32)).all()]
    if broken:
        raise ValueError(f"{source} has NaN or infinity in {', '.join(broken)}")


def export_entries(network: StoredNetwork, own: nnx.Module | None = None) -> Entries:
    """Return the weights of a network under the names that it has in PyTorch, in PyTorch's layouts.

    Args:
        network: the weights.
        own: the network, where it is one of the user's; its names are then those of its own attributes.

    Raises:
        ValueError: the network is the user's and not given, or has a layer that PyTorch has not.
    """
    if own is not None:
        _check_kernels(network.weights, own)
    elif not network.arguments:
        raise ValueError("this is a network of your own; name what builds it, as --student mine.py:build")
    architecture = None if own is not None else network.arguments["architecture"]
    return {
        name: np.ascontiguousarray(to_torch(path, np.asarray(array)))
        for path, array in network.weights.items()
        for name in torch_names(path, architecture)
    }


def _check_kernels(weights: Mapping[str, Any], network: nnx.Module) -> None:
    """Raise a ValueError where a kernel is none of those whose layout `to_torch` knows."""
    layers = {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(network)}
    for path, array in weights.items():
        module, _, leaf = path.rpartition(".")
        layer = layers.get(module)
        if leaf == "kernel" and not (isinstance(layer, nnx.Conv | nnx.Linear) and np.ndim(array) in (2, 4)):
            raise ValueError(
                f"{path} is the kernel of a {type(layer).__name__}, whose layout in PyTorch is not known here"
            )


def torch_name(path: str) -> str:
    """Return PyTorch's name of an attribute path, its module having the same."""
    module, dot, leaf = path.rpartition(".")
    return f"{module}{dot}{_LEAVES.get(leaf, leaf)}"


def torch_names(path: str, architecture: str | None) -> tuple[str, ...]:
    """Return PyTorch's names of an attribute path of an architecture; of None, which is the user's own."""
    if architecture is None:
        return (torch_name(path),)
    module, _, leaf = path.rpartition(".")
    modules = networks.find(architecture).torch_modules(module) if module else ("",)
    return tuple(torch_name(f"{name}.{leaf}" if name else leaf) for name in modules)


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


def _in_torch(shapes: dict[str, tuple[int, ...]], architecture: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a network's arrays have in PyTorch, by their names there."""
    return {
        torch_names(path, architecture)[0]: to_torch(path, np.broadcast_to(np.float32(0), shape)).shape
        for path, shape in shapes.items()
    }


def _shapes(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a network, without making one."""
    model = nnx.eval_shape(lambda: networks.construct(arguments, rngs=nnx.Rngs(0)))
    return {path: leaf.shape for path, leaf in store.network_weights(model).items()}
