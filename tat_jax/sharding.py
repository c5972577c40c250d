"""The devices as one axis, `data`, and the ways an array lies on them."""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tat_jax.weights.store import digest

_Tree = TypeVar("_Tree")
# What starts several processes says so in the environment: SLURM, Open MPI, a TPU pod, or a person.
_CLUSTER_SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Seconds after which a process that is not heard of counts as lost, and all others end; and those that an
# ordinary end waits for the others.
_join = functools.partial(
    jax.distributed.initialize, heartbeat_timeout_seconds=40, shutdown_timeout_seconds=60
)


def start_processes() -> None:
    """Join the other processes of this job, where the environment says that there are any.

    A process that waits five minutes in vain is ended by JAX.

    Raises:
        ValueError: it says so by hand and not in full.
    """
    by_hand = [os.environ.get(name) for name in _BY_HAND]
    in_cluster = any(int(os.environ.get(name, 1)) > 1 for name in _CLUSTER_SIZES)
    # A machine with TPUs asks its pod; that of one machine alone, or without any TPU, gives no address.
    may_be_pod = find_spec("libtpu") is not None or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if not (any(by_hand) or in_cluster or may_be_pod):
        return
    waiting = threading.Timer(
        15, print, ["waiting for the other processes of this job"], {"file": sys.stderr}
    )
    waiting.daemon = True
    waiting.start()
    try:
        if any(by_hand):
            address, count, index = by_hand
            if not (address and count and index):
                raise ValueError(f"of {', '.join(_BY_HAND)} either all or none must be set")
            _join(address, int(count), int(index))
        else:
            try:
                _join()
            except ValueError as error:
                if in_cluster:
                    said = " and ".join(f"{n}={os.environ[n]}" for n in _CLUSTER_SIZES if n in os.environ)
                    raise ValueError(
                        f"{said}: this job has several processes, and srun or mpirun, which start them, "
                        "did not start this one; start it so, or alone by: "
                        f"env {' '.join(f'-u {name}' for name in _CLUSTER_SIZES)} COMMAND"
                    ) from error
    finally:
        waiting.cancel()


def find_devices() -> None:
    """Start the devices of this process.

    Raises:
        OSError: there are none, or not those that JAX_PLATFORMS names; with those that there are.
    """
    asked = os.environ.get("JAX_PLATFORMS")
    try:
        jax.devices()
    except Exception as error:  # whatever the plug-in of a platform raises
        reason = str(error).split("\n")[0].partition(" (set JAX_PLATFORMS")[0].partition(" (you may need")[0]
        if not asked:
            raise OSError(f"no devices: {reason}; JAX_PLATFORMS=cpu computes without them") from error
        there = _platforms()
        raise OSError(
            f"no devices: JAX_PLATFORMS={asked}, {reason or 'of which this machine has none'}; "
            f"there are {there}; take one of them, or none and leave the choice to JAX"
        ) from error


def _platforms() -> str:
    """Return the platforms of devices that there are, whatever JAX_PLATFORMS says."""
    jax.config.update("jax_platforms", "")
    try:
        return ", ".join(sorted({device.platform for device in jax.devices()} | {"cpu"}))
    except Exception:  # whatever the plug-in of a platform raises
        return "cpu"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of all devices of all processes, or of those given, with the one axis `data`."""
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of parameters: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batches: the first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split(array: Any, mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is split: its longest axis that the devices share evenly.

    Vectors, arrays without such an axis, and what is no number in floating point lie whole on every device.
    """
    axes = [axis for axis, length in enumerate(array.shape) if length % mesh.size == 0]
    if array.ndim < 2 or not axes or not jnp.issubdtype(array.dtype, jnp.floating):
        return replicated(mesh)
    longest = max(axes, key=lambda axis: array.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*([None] * longest), "data"))


def split_rows(array: Any, mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose first axis is split, if the devices share it evenly."""
    return batched(mesh) if array.ndim and array.shape[0] % mesh.size == 0 else replicated(mesh)


def everywhere(arrays: Any, mesh: Mesh) -> Any:
    """Return for each array the sharding of one that lies whole on every device."""
    return jax.tree.map(lambda _: replicated(mesh), arrays)


def are_whole(arrays: Any) -> bool:
    """Return whether arrays lie whole on every device that they lie on."""
    return all(array.is_fully_replicated for array in jax.tree.leaves(arrays))


def gathered(arrays: _Tree, mesh: Mesh) -> _Tree:
    """Return, within a program, arrays that may be split as whole ones, each gathered where it is used."""
    if mesh.size == 1:
        return arrays
    return jax.lax.with_sharding_constraint(arrays, replicated(mesh))


def resharded(arrays: _Tree, places: Any) -> _Tree:
    """Return arrays that lie on devices as ones that lie where `places` says, one for each array."""
    if places == jax.tree.map(lambda array: array.sharding, arrays):
        return arrays
    return jax.jit(lambda same: same, out_shardings=places)(arrays)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise a ValueError unless the devices share a batch evenly."""
    if batch_size % mesh.size:
        raise ValueError(f"batch_size={batch_size} is not a multiple of the {mesh.size} devices")


def round_up(batch_size: int, mesh: Mesh) -> int:
    """Return the smallest size not below `batch_size` that the devices share evenly."""
    return -(-batch_size // mesh.size) * mesh.size


def check_same(digests: Mapping[str, str]) -> None:
    """Raise a ValueError unless all processes have the same things.

    Args:
        digests: the SHA-256 of each in hexadecimal, by what it is, as in "the config".
    """
    if jax.process_count() == 1:
        return
    own = np.array([list(bytes.fromhex(sha)) for sha in digests.values()], np.uint8)
    of_all = multihost_utils.process_allgather(own)
    for i, what in enumerate(digests):
        others = np.flatnonzero((of_all[:, i] != of_all[0, i]).any(axis=1)).tolist()
        if others:
            raise ValueError(
                f"{what} of process {others[0]} of {jax.process_count()} is another than of process 0: start "
                "all by the same command, on the same files"
            )


def put_whole(arrays: _Tree, mesh: Mesh, *, what: str) -> _Tree:
    """Return arrays that lie in each process as ones that lie whole on every device.

    `jax.device_put` would let each process gather every array of all the others, to compare them.

    Args:
        arrays: the same in all processes.
        mesh: the devices.
        what: they are, for the error.

    Raises:
        ValueError: they are not the same.
    """
    return put(arrays, everywhere(arrays, mesh), what=what)


def put(arrays: _Tree, places: Any, *, what: str) -> _Tree:
    """Return arrays likewise, each where its place of `places` is, and nowhere else on the way there."""
    if jax.process_count() == 1:
        return jax.device_put(arrays, places)
    check_same({what: digest(arrays)})

    def put_one(array: jax.Array, place: NamedSharding) -> jax.Array:
        if not place.is_fully_replicated:
            here = np.asarray(array)
            return jax.make_array_from_callback(array.shape, place, lambda part: here[part])
        on_each = [jax.device_put(array, device) for device in place.mesh.local_devices]
        return jax.make_array_from_single_device_arrays(array.shape, place, on_each)

    return jax.tree.map(put_one, arrays, places)


def on_host() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which arrays are made in the machine's own memory, where JAX has a CPU at hand."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return contextlib.nullcontext()


class Agreement:
    """Let all processes see at the same step what any of them asks for.

    Args:
        mesh: the devices.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = batched(mesh)
        self._highest = jax.jit(lambda asked: asked.max(0), out_shardings=replicated(mesh))
        self._pending: jax.Array | None = None

    def __call__(self, asked: Sequence[int]) -> list[int]:
        """Return of each number the highest that any process asked for; of several, at the call before.

        The answer comes one call late, so that no process waits for its devices.
        """
        if jax.process_count() == 1:
            return list(asked)
        answer, self._pending = self._pending, self._highest(self._everywhere(asked))
        return [0] * len(asked) if answer is None else np.asarray(answer).tolist()

    def _everywhere(self, asked: Sequence[int]) -> jax.Array:
        rows = np.tile(np.array(asked, np.int32), (jax.local_device_count(), 1))
        return jax.make_array_from_process_local_data(self._sharding, rows)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Return a batch of this process's rows as global arrays split over the devices."""
    sharding = batched(mesh)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def put_batches(batches: Iterable[Any], mesh: Mesh) -> Iterator[Any]:
    """Yield each batch as `put_batch` returns it.

    A thread reads and puts the next one while the devices are given their work on this one.
    """
    rows, has_float64 = iter(batches), jax.dtypes.canonicalize_dtype(float) == np.float64

    def put_next() -> Any:
        with jax.enable_x64(has_float64):  # which each thread has for itself
            return put_batch(next(rows, None), mesh)

    with ThreadPoolExecutor(1, thread_name_prefix="put_batches") as thread:
        coming = thread.submit(put_next)
        while (batch := coming.result()) is not None:
            coming = thread.submit(put_next)
            yield batch
