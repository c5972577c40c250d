"""Networks and training states on disk, through Orbax.

A checkpoint is a folder of items. `student` and `network` are a network: its weights under the model's own
attribute paths, and the arguments that build it. They are all an evaluation reads, and all a folder of
converted weights holds. `training` (optimiser, embeddings, step) and `data` (the position in data and log)
let a run continue. A teacher is never saved. `network` and `data` hold the SHA-256 of the arrays they belong
to, and of what they say themselves, so that one changed bit is seen when a checkpoint is read.
"""

import contextlib
import functools
import gc
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from tat_jax.distill import TrainState

T = TypeVar("T")
Weights = dict[str, Any]
_NAMED = 30  # entries in an error
_STUDENT = "student."  # where the student lies in what is trained


class Network(NamedTuple):
    """A network as read from disk.

    Attributes:
        weights: arrays by attribute path, as in `layer1.0.conv1.kernel`.
        arguments: the keyword arguments of `ResNet` that build the network.
        origin: where the weights came from, with `head`: "trained", or "fresh" if its logits mean nothing.
    """

    weights: Weights
    arguments: dict[str, Any]
    origin: dict[str, str]


def flatten(state: nnx.State) -> Weights:
    """Return the arrays of `state` by attribute path, as in `layer1.0.conv1.kernel`."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _unflatten(weights: Weights, like: nnx.State) -> nnx.State:
    """Return `like` with its arrays replaced by those of the same paths in `weights`."""
    return nnx.from_flat_state(
        [(path, leaf.replace(weights[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(like)]
    )


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
    nnx.update(model, _unflatten(cast, state))


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


def save_network(folder: Path, network: Network) -> None:
    """Write a network alone, as the conversion of published weights does.

    Raises:
        FileExistsError: `folder` exists; nothing is overwritten.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or name another folder")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, _network_items(network))


def _network_items(network: Network) -> ocp.args.Composite:
    said = {"arguments": network.arguments, "origin": network.origin, "arrays": _digest(network.weights)}
    return ocp.args.Composite(
        student=ocp.args.StandardSave(network.weights), network=ocp.args.JsonSave(_seal(said))
    )


def load_network(folder: Path) -> Network:
    """Read the network of a checkpoint or of converted weights onto the host.

    Raises:
        FileNotFoundError: there is none in `folder`.
        ValueError: what is there cannot be read.
    """
    folder = Path(folder).absolute()
    if not (folder / "student").is_dir() or not (folder / "network").is_dir():
        raise FileNotFoundError(f"no network in {folder} (it would hold the folders student and network)")
    network, wrong = _try_to_read(_read_network, folder)
    if network is None:
        raise ValueError(f"cannot read the network in {folder}: {wrong}")
    return network


def _read_network(folder: Path) -> Network:
    said = _read_sealed(folder / "network")
    weights = dict(load_item(folder / "student"))
    _check_digest(weights, said["arrays"])
    return Network(weights, said["arguments"], said["origin"])


def load_item(folder: Path) -> Any:
    """Read the arrays of one item of a checkpoint onto the host."""
    folder = Path(folder).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=on_host))


def _seal(said: dict[str, Any]) -> dict[str, Any]:
    """Add to what a JSON item says the SHA-256 of it."""
    text = json.dumps(said, sort_keys=True)
    return {**said, "seal": hashlib.sha256(text.encode()).hexdigest()}


def _read_sealed(folder: Path) -> dict[str, Any]:
    """Read a JSON item.

    Raises:
        ValueError: it does not say what was written.
    """
    said = ocp.JsonCheckpointHandler().restore(folder.absolute())
    seal = said.pop("seal") if isinstance(said, dict) and "seal" in said else None
    if seal is None or seal != _seal(said)["seal"]:
        raise ValueError(f"{folder.name} does not say what was written")
    return said


def _digest(arrays: Any) -> str:
    """Return the SHA-256 of a tree of arrays: of their paths, types, shapes and numbers."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _check_digest(arrays: Any, expected: str) -> None:
    if _digest(arrays) != expected:
        raise ValueError("its arrays are not those that were written")


def _try_to_read(read: Callable[..., T], *arguments: Any) -> tuple[T | None, str]:
    """Return what a function returns, and why it did not where it raised."""
    with _abandoned_unheard(""):
        try:
            return read(*arguments), ""
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            return None, _reason(error)


@contextlib.contextmanager
def _abandoned_unheard(said: str) -> Iterator[None]:
    """Print no stack trace of each read and write that Orbax abandons beside one that fails.

    Args:
        said: how what Python says of one begins; all begins with "".
    """
    hook, log = sys.unraisablehook, logging.getLogger("asyncio")
    disabled, log.disabled = log.disabled, True

    def unless_abandoned(raised: "sys.UnraisableHookArgs") -> None:
        if not str(raised.exc_value).startswith(said):
            hook(raised)

    sys.unraisablehook = unless_abandoned
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook, log.disabled = hook, disabled


def _reason(error: BaseException) -> str:
    """Return what the first cause of an error says, without the places in source files that libraries add."""
    while error.__cause__:
        error = error.__cause__
    return str(error).strip().split("\n")[0].split(" [")[0] or type(error).__name__


class Restored(NamedTuple):
    """What a run continues from.

    Attributes:
        state: what is trained.
        position: in the data and in the log, as it was saved.
        set_aside: of each checkpoint that could not be read why, and where it is now.
    """

    state: TrainState
    position: dict[str, Any]
    set_aside: list[str]


class RunCheckpoints:
    """The checkpoints of one training run: the two latest, and the best by validation top-1.

    Saving is asynchronous: it returns when the arrays are copied, and a checkpoint counts once it is whole.
    What a kill leaves half-written is never read, and removed when the next one is saved.

    Args:
        folder: the run's folder; checkpoints lie in `folder/checkpoints/<step>`.
    """

    def __init__(self, folder: Path):
        self._run = folder
        self._open = contextlib.ExitStack()

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Opened after `restore` has set aside what it could not read.
        return ocp.CheckpointManager(
            _checkpoints(self._run).absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_top1,
                preservation_policy=AnyPreservationPolicy(
                    # Two, so that there is another one where the latest turns out to be damaged.
                    [LatestN(2), BestN(n=1, get_metric_fn=_top1, keep_checkpoints_without_metrics=False)]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> Self:
        self._open.enter_context(_abandoned_unheard("Event loop is closed"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
        with self._open:
            if lost or "_manager" not in self.__dict__:
                return  # a process that is gone would be waited for
            try:
                self._manager.close()
            except Exception as failure:  # Orbax raises whatever its storage layers raise.
                if error is None:
                    raise self._not_saved(failure) from failure

    def save(
        self,
        state: TrainState,
        *,
        arguments: dict[str, Any],
        position: dict[str, Any],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Save a state; one that was saved without `metrics` before may be saved with them.

        Args:
            state: what is trained. Its student counts as one with a trained head.
            arguments: the keyword arguments of `ResNet` that build the student.
            position: in the data and in the log.
            metrics: `top1` at least, where the state has been evaluated.

        Raises:
            OSError: this checkpoint, or the one before, could not be written.
        """
        step = int(state.step)
        origin = {"head": "trained", "source": f"step {step}"}
        said = {"position": position, "metrics": metrics, "arrays": _digest(_training(state))}
        try:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **_network_items(Network(_student(state), arguments, origin)),
                    training=ocp.args.StandardSave(_training(state)),
                    data=ocp.args.JsonSave(_seal(said)),
                ),
                metrics=metrics,
            )
        except Exception as failure:  # Orbax raises whatever its storage layers raise.
            raise self._not_saved(failure) from failure

    def check(self) -> None:
        """Raise an OSError if a checkpoint could not be written since the last call."""
        try:
            self._manager.check_for_errors()
        except Exception as failure:  # Orbax raises whatever its storage layers raise.
            raise self._not_saved(failure) from failure

    def _not_saved(self, failure: Exception) -> OSError:
        whole = steps(self._run)
        kept = f"the checkpoint of step {whole[-1]} is kept" if whole else "there is none before it"
        return OSError(
            f"cannot save a checkpoint in {_checkpoints(self._run)}: {_reason(failure)}; {kept}. "
            "Where the disk is full, make room, and run the same command again"
        )

    def latest_step(self) -> int | None:
        """Wait for what is being written, and return the step of the newest checkpoint, if there is one."""
        self._manager.wait_until_finished()
        return max(steps(self._run), default=None)

    def restore(self, like: TrainState) -> Restored | None:
        """Return the latest state that can be read, or None if nothing is saved.

        What cannot be read moves to `damaged/` in the run's folder, and the checkpoint before it is taken.

        Args:
            like: a state of the same shapes, types and shardings.

        Raises:
            ValueError: there are checkpoints, and none is of this training and can be read; or each process
                finds others. None is moved.
        """
        wrong: dict[int, str] = {}
        found = None
        there = steps(self._run)
        self._agree(there[-1] if there else 0)
        for step in reversed(there):
            folder = _checkpoints(self._run) / str(step)
            _, reason = _try_to_read(_read_evaluation, folder)
            if not reason and found is None:
                found, reason = _try_to_read(_read_training, folder, like)
            if reason:
                wrong[step] = reason
        if wrong and found is None:
            lines = [f"  {_checkpoints(self._run) / str(step)}: {reason}" for step, reason in wrong.items()]
            raise ValueError(
                "\n".join(["no checkpoint can be continued from; another --workdir starts anew:", *lines])
            )
        self._agree(int(found[0].step) if found else 0)
        return Restored(*found, [self._set_aside(*item) for item in wrong.items()]) if found else None

    def _agree(self, step: int) -> None:
        """Raise a ValueError unless all processes say the same."""
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(np.array(step)).tolist()
            if len(set(found)) > 1:
                raise ValueError(f"processes find other checkpoints in {self._run}; its disk must be shared")

    def _set_aside(self, step: int, reason: str) -> str:
        """Move a checkpoint out of the way of those that follow, and return what to say of it."""
        place = self._run / "damaged" / str(step)
        while place.exists():
            place = place.with_name(f"{place.name}_")
        if jax.process_index() == 0:
            place.parent.mkdir(exist_ok=True)
            (_checkpoints(self._run) / str(step)).rename(place)
        multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")
        return f"the checkpoint of step {step} cannot be read ({reason}) and is now in {place}"


def _read_training(folder: Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Read the state of a checkpoint, and the position that belongs to it."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    said, of_student = _read_sealed(folder / "data"), _read_sealed(folder / "network")
    with ocp.StandardCheckpointer() as checkpointer:
        student = checkpointer.restore(folder.absolute() / "student", _student(abstract))
        training = checkpointer.restore(folder.absolute() / "training", _training(abstract))
    trained = {f"{_STUDENT}{path}": value for path, value in student.items()} | training["embeddings"]
    params, batch_stats = (_unflatten(trained, state) for state in (like.params, like.batch_stats))
    state = TrainState(training["step"], params, batch_stats, training["opt_state"])
    _check_digest(_student(state), of_student["arrays"])
    _check_digest(_training(state), said["arrays"])
    return state, said["position"]


def _read_evaluation(folder: Path) -> dict[str, float] | None:
    """Return the metrics of a checkpoint, if it has been evaluated.

    Raises:
        ValueError: they are not those that were written.
    """
    metrics = _read_sealed(folder / "data")["metrics"]
    path = folder / "metrics" / "metrics"  # by which Orbax finds the best
    if metrics != (json.loads(path.read_text()) if path.exists() else None):
        raise ValueError("its metrics are not those that were written")
    return metrics


def network_folder(folder: Path) -> Path:
    """Return where the network of a folder of converted weights, or the best one of a run, lies.

    Raises:
        FileNotFoundError: `folder` is neither.
    """
    return Path(folder) if (Path(folder) / "student").is_dir() else best(folder)


def best(run: Path) -> Path:
    """Return the checkpoint of a run with the highest validation top-1.

    Raises:
        FileNotFoundError: the run has no evaluated checkpoint.
        ValueError: one of its checkpoints cannot be read.
    """
    evaluated = []
    for step in _existing(run):
        folder = _checkpoints(run) / str(step)
        metrics, wrong = _try_to_read(_read_evaluation, folder)
        if wrong:
            raise ValueError(
                f"cannot read {folder}: {wrong}; the command that trains sets it aside, and "
                "--checkpoint=FOLDER evaluates another one"
            )
        if metrics:
            evaluated.append((_top1(metrics), step))
    if not evaluated:
        raise FileNotFoundError(f"no checkpoint in {run} has been evaluated yet")
    return _checkpoints(run) / str(max(evaluated)[1])


def last(run: Path) -> Path:
    """Return the newest checkpoint of a run.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    return _checkpoints(run) / str(_existing(run)[-1])


def _checkpoints(run: Path) -> Path:
    return Path(run) / "checkpoints"


def steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints that are whole, rising; others have longer names until they are."""
    folder = _checkpoints(run)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _existing(run: Path) -> list[int]:
    found = steps(run)
    if not found:
        raise FileNotFoundError(f"no checkpoint in {run}: train one with main.py --workdir {run}")
    return found


def _top1(metrics: dict[str, float]) -> float:
    return metrics["top1"]


def _student(state: TrainState) -> Weights:
    trained = flatten(state.params) | flatten(state.batch_stats)
    return {
        path.removeprefix(_STUDENT): value for path, value in trained.items() if path.startswith(_STUDENT)
    }


def _training(state: TrainState) -> dict[str, Any]:
    """Return all of a state that is not the student."""
    trained = flatten(state.params) | flatten(state.batch_stats)
    embeddings = {path: value for path, value in trained.items() if not path.startswith(_STUDENT)}
    return {"step": state.step, "embeddings": embeddings, "opt_state": state.opt_state}
