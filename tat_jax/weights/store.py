"""Networks on disk, through Orbax.

A network is a folder of two items: `student`, its weights under the model's own attribute paths, and
`network`, the arguments that build it and where it came from. That is all an evaluation reads, all a folder
of converted weights holds, and a part of each checkpoint of a run. `network` holds the SHA-256 of the
weights, and of what it says itself, so that one changed bit is seen when it is read. Where a run keeps a
moving average of its student, a third item of its checkpoints holds it, whose folder is named as a network's.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from tat_jax.weights.orbax_quiet import abandoned_unheard, reason, try_to_read, wait_for_abandoned

Weights = dict[str, Any]
NO_HEAD = "none"  # what an origin says of the head of a network without one, which gives no logits
EMA = "student_ema"  # the item of the moving average
_NAMED = 30  # entries in an error
# What the items `network` and `data` held before they were sealed.
_UNSEALED = ({"arguments", "origin"}, {"epoch", "batch"})  # and more


class StoredNetwork(NamedTuple):
    """A network as read from disk.

    Attributes:
        weights: arrays by attribute path, as in `layer1.0.conv1.kernel`.
        arguments: what builds the network, as `networks.Network` has them.
        origin: where the weights came from, with `head`: "trained", or "fresh" if its logits mean nothing.
        usage: what its images must be and its classes are called, as `usage.usage_of` has it; empty where
            nobody said.
    """

    weights: Weights
    arguments: dict[str, Any]
    origin: dict[str, str]
    usage: Mapping[str, Any] = MappingProxyType({})


def flatten(state: nnx.State) -> Weights:
    """Return the arrays of `state` by attribute path, as in `layer1.0.conv1.kernel`; keys as numbers."""
    return {".".join(map(str, path)): _numbers(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


def unflatten(weights: Mapping[str, Any], like: nnx.State) -> nnx.State:
    """Return `like` with its arrays replaced by those of the same paths in `weights`."""

    def replaced(path: tuple[Any, ...], leaf: nnx.Variable) -> nnx.Variable:
        array, before = weights[".".join(map(str, path))], leaf.get_value()
        if _is_key(before):
            array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(before))
        return leaf.replace(array)

    return nnx.from_flat_state([(path, replaced(path, leaf)) for path, leaf in nnx.to_flat_state(like)])


def _numbers(array: Any) -> Any:
    return jax.random.key_data(array) if _is_key(array) else array


def _is_key(array: Any) -> bool:
    return jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key)


def network_weights(model: nnx.Module) -> Weights:
    """Return parameters and running statistics of `model` by attribute path."""
    return flatten(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))


def set_weights(model: nnx.Module, weights: Mapping[str, Any], *, source: str) -> None:
    """Write `weights` into `model`, in the model's own types.

    Raises:
        ValueError: entries are missing, extra or of another shape; each is named, and nothing is written.
    """
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    own = flatten(state)
    check_entries(
        {name: np.shape(value) for name, value in weights.items()},
        {name: value.shape for name, value in own.items()},
        source=source,
    )
    cast = {name: jax.numpy.asarray(weights[name], value.dtype) for name, value in own.items()}
    nnx.update(model, unflatten(cast, state))


def check_entries(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, source: str
) -> None:
    """Raise a ValueError that names the entries of `found` that are missing, extra or of another shape."""
    lines = [f"  missing: {name} {expected[name]}" for name in sorted(expected) if name not in found]
    lines += [f"  extra: {name} {found[name]}" for name in sorted(found) if name not in expected]
    lines += [
        f"  wrong shape: {name} is {found[name]}, the network has {expected[name]}"
        for name in sorted(expected)
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if lines:
        more = [f"  and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
        raise ValueError("\n".join([f"{source} does not hold this network:", *lines[:_NAMED], *more]))


def save_network(folder: Path, network: StoredNetwork) -> None:
    """Write a network alone, as the conversion of published weights does; whole, or nothing.

    Raises:
        FileExistsError: `folder` exists; nothing is overwritten.
        OSError: it cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or name another folder")
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        with abandoned_unheard(""):
            _save_items(partial, network_items(network))
        partial.rename(folder)
    except Exception as error:  # Orbax raises whatever its storage layers raise.
        raise OSError(f"cannot write {folder}: {_of_disk(error)}") from None
    finally:
        for left in folder.parent.glob(f"{glob.escape(partial.name)}*"):  # Orbax's own have a longer name
            shutil.rmtree(left, ignore_errors=True)


def _save_items(folder: Path, items: ocp.args.Composite) -> None:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder, items)
    except Exception:
        wait_for_abandoned()
        raise


def _of_disk(error: Exception) -> str:
    """Return what the system said where it did not let something be written."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
    said = [os.strerror(number) for number in numbers]
    said += [error.strerror] if isinstance(error, OSError) and error.strerror else []
    return next((text for text in said if text in str(error)), reason(error))


def network_items(network: StoredNetwork, ema: Weights | None = None) -> ocp.args.Composite:
    """Return the two items of a network as Orbax saves them, and that of its moving average if any."""
    said = {
        "arguments": network.arguments,
        "origin": network.origin,
        "usage": dict(network.usage),
        "arrays": digest(network.weights),
    }
    items = {"student": ocp.args.StandardSave(network.weights)}
    if ema is not None:
        said["arrays_of_ema"] = digest(ema)
        items[EMA] = ocp.args.StandardSave(ema)
    return ocp.args.Composite(**items, network=ocp.args.JsonSave(seal(said)))


def load_network(folder: Path) -> StoredNetwork:
    """Read the network of a checkpoint, of its moving average or of converted weights onto the host.

    Raises:
        FileNotFoundError: there is none in `folder`.
        ValueError: what is there cannot be read.
    """
    folder = Path(folder).absolute()
    is_ema = folder.name == EMA and not (folder / "student").is_dir()
    parent, item = (folder.parent, EMA) if is_ema else (folder, "student")
    if not (parent / item).is_dir() or not (parent / "network").is_dir():
        raise FileNotFoundError(f"no network in {folder} (it would hold the folders student and network)")
    network, wrong = try_to_read(_read_network, parent, item)
    if network is None:
        raise ValueError(f"cannot read the network in {folder}: {wrong}")
    return network


def _read_network(folder: Path, item: str) -> StoredNetwork:
    said = read_sealed(folder / "network")
    weights = dict(load_item(folder / item))
    check_digest(weights, said["arrays_of_ema" if item == EMA else "arrays"])
    return StoredNetwork(weights, said["arguments"], said["origin"], said.get("usage", {}))


def load_item(folder: Path) -> Any:
    """Read the arrays of one item of a checkpoint onto the host."""
    folder = Path(folder).absolute()
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        tree = handler.metadata(folder).tree  # the checkpointer's warns of a file that only it would write
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=on_host))


def seal(said: dict[str, Any]) -> dict[str, Any]:
    """Add to what a JSON item says the SHA-256 of it."""
    text = json.dumps(said, sort_keys=True)
    return {**said, "seal": hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(folder: Path) -> dict[str, Any]:
    """Read a JSON item.

    Raises:
        ValueError: it does not say what was written.
    """
    said = ocp.JsonCheckpointHandler().restore(folder.absolute())
    if isinstance(said, dict) and any(said.keys() >= keys for keys in _UNSEALED) and "arrays" not in said:
        raise ValueError("an earlier version of tat-jax wrote it, without checksums; use that version")
    found = said.pop("seal") if isinstance(said, dict) and "seal" in said else None
    if found is None or found != seal(said)["seal"]:
        raise ValueError(f"{folder.name} does not say what was written")
    return said


def digest(arrays: Any) -> str:
    """Return the SHA-256 of a tree of arrays: of their paths, types, shapes and numbers."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.ascontiguousarray(jax.device_get(_numbers(leaf)))
        sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        sha.update(array.reshape(-1).view(np.uint8))
    return sha.hexdigest()


def check_digest(arrays: Any, expected: str) -> None:
    """Raise a ValueError unless the arrays have this digest."""
    if digest(arrays) != expected:
        raise ValueError("its arrays are not those that were written")
