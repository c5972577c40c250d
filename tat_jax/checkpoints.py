"""The checkpoints of a run, through Orbax.

A checkpoint is a folder of items. `student` and `network` are the student as any network on disk, see
`weights.store`, and `student_ema` its moving average, where one is kept. `training` (optimiser, what the
losses hold, step) and `data` (the position in data and log) let a run continue. A teacher is never saved.
`data` holds the SHA-256 of the arrays of `training`.
"""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from tat_jax import checkpoint_layout
from tat_jax.distill import TrainState
from tat_jax.ema import student_of
from tat_jax.weights import folders
from tat_jax.weights.orbax_quiet import abandoned_unheard, reason, try_to_read, wait_for_abandoned
from tat_jax.weights.store import (
    EMA,
    NO_HEAD,
    StoredNetwork,
    Weights,
    check_digest,
    digest,
    flatten,
    network_items,
    read_sealed,
    seal,
    unflatten,
)

_STUDENT = "student.network."  # where the student lies in what is trained


class Restored(NamedTuple):
    """What a run continues from.

    Attributes:
        state: what is trained.
        position: in the data and in the log, as it was saved.
        can_go_on: whether the state is whole; where the training was dropped, only its student is.
        set_aside: of each checkpoint that could not be read why, and where it is now.
    """

    state: TrainState
    position: dict[str, Any]
    can_go_on: bool
    set_aside: list[str]


def read_provenance(run: Path) -> dict[str, Any]:
    """Return what a run was made of by its newest checkpoint that can be read; empty where none says it."""
    for step in reversed(folders.steps(run)):
        said, _ = try_to_read(read_sealed, folders.checkpoints(run) / str(step) / "data")
        if said:
            return said.get("provenance", {})
    return {}


class RunCheckpoints:
    """The checkpoints of one training run: the two latest, and the one whose evaluation was best.

    Where a moving average is kept beside the student, the one of its best evaluation, too.

    Saving is asynchronous: it returns when the arrays are copied, and a checkpoint counts once it is whole.
    What a kill leaves half-written is never read, and removed when the next one is saved.

    Args:
        folder: the run's folder; checkpoints lie in `folder/checkpoints/<step>`.
        is_shared: whether all processes see the same one, and write it together; else process 0 writes alone.
    """

    def __init__(self, folder: Path, *, is_shared: bool = True):
        self._run, self._is_shared = folder, is_shared
        self._writes = is_shared or jax.process_index() == 0
        self._open = contextlib.ExitStack()

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Opened after `restore` has set aside what it could not read.
        folder = folders.checkpoints(self._run).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        processes = None if self._is_shared else {0}
        return ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
                best_fn=folders.first,
                preservation_policy=AnyPreservationPolicy(
                    # Two, so that there is another one where the latest turns out to be damaged.
                    [
                        LatestN(2),
                        *(
                            BestN(n=1, get_metric_fn=measure, keep_checkpoints_without_metrics=False)
                            for measure in (folders.first, folders.first_of_ema)
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> Self:
        self._open.enter_context(abandoned_unheard("Event loop is closed"))
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
                not_saved = self._not_saved(failure)
                if error is None:
                    raise not_saved from failure

    def save(
        self,
        state: TrainState,
        *,
        arguments: dict[str, Any],
        position: dict[str, Any],
        usage: Mapping[str, Any] = MappingProxyType({}),
        provenance: Mapping[str, Any] = MappingProxyType({}),
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Save a state; one that was saved without `metrics` before may be saved with them.

        Args:
            state: what is trained. Its student counts as one with a trained head, if it has any.
            arguments: what builds the student, as `networks.Network` has them.
            position: in the data and in the log.
            usage: of the student, see `usage.usage_of`.
            provenance: what the run is made of, see `provenance`.
            metrics: of its evaluation, if there was one; the first says which is the best.

        Raises:
            OSError: this checkpoint, or the one before, could not be written.
        """
        if not self._writes:
            return
        step = int(state.step)
        ema = None if state.ema is None else _of_student(state.ema)
        student, training = _student(state), _training(state)
        # A process that writes alone takes arrays whole: of copies on several devices, Orbax would have each
        # give a slice, and compile one for every shape.
        if not self._is_shared or jax.process_count() == 1:
            student, ema, training = jax.device_get((student, ema, training))
        head = NO_HEAD if arguments.get("num_classes") == 0 else "trained"
        origin = {"head": head, "source": f"step {step}"}
        said = {
            "position": position,
            "provenance": dict(provenance),
            "metrics": metrics,
            "layout": checkpoint_layout.NOW,
            "arrays": digest(training),
        }
        try:
            if step in self._manager.all_steps():
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **network_items(StoredNetwork(student, arguments, origin, usage), ema),
                    training=ocp.args.StandardSave(training),
                    data=ocp.args.JsonSave(seal(said)),
                ),
                metrics=metrics,
            )
        except Exception as failure:  # Orbax raises whatever its storage layers raise.
            raise self._not_saved(failure) from failure

    def check(self) -> None:
        """Raise an OSError if a checkpoint could not be written since the last call."""
        if not self._writes:
            return
        try:
            self._manager.check_for_errors()
        except Exception as failure:  # Orbax raises whatever its storage layers raise.
            raise self._not_saved(failure) from failure

    def _not_saved(self, failure: Exception) -> Exception:
        """Return what to raise of a save that failed: of the disk, or where a process is gone of that.

        What Orbax abandoned beside it has come to its end then.
        """
        wait_for_abandoned()
        cause: BaseException = failure
        while cause.__cause__:
            cause = cause.__cause__
        if isinstance(cause, jax.errors.JaxRuntimeError) or str(cause).startswith("UNKNOWN: Gloo"):
            return jax.errors.JaxRuntimeError(str(cause))
        whole = folders.steps(self._run)
        kept = f"the checkpoint of step {whole[-1]} is kept" if whole else "there is none before it"
        return OSError(
            f"cannot save a checkpoint in {folders.checkpoints(self._run)}: {reason(failure)}; {kept}. "
            "Where the disk is full, make room, and run the same command again"
        )

    def drop_training(self) -> None:
        """Keep of a finished run the last and the best networks alone, a quarter of what it took."""
        if not self._writes:
            return
        self._manager.wait_until_finished()
        kept = {folders.last(self._run), folders.best(self._run)}
        if (folders.last(self._run) / EMA).is_dir():
            kept.add(folders.best_ema(self._run).parent)
        for step in folders.steps(self._run):
            folder = folders.checkpoints(self._run) / str(step)
            if folder not in kept:
                self._manager.delete(step)
            elif jax.process_index() == 0 and (folder / "training").exists():
                _replace_data(folder, {**read_sealed(folder / "data"), "training": "dropped"})
                shutil.rmtree(folder / "training")

    def latest_step(self) -> int | None:
        """Wait for what is being written, and return the step of the newest checkpoint, if there is one."""
        if self._writes:
            self._manager.wait_until_finished()
        return max(folders.steps(self._run), default=None)

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
        there = folders.steps(self._run)
        self._agree(there[-1] if there else 0)
        for step in reversed(there):
            folder = folders.checkpoints(self._run) / str(step)
            _, why = try_to_read(folders.read_evaluation, folder)
            if not why and found is None:
                found, why = try_to_read(_read_training, folder, like)
            if why:
                wrong[step] = why
        if wrong and found is None:
            lines = [
                f"  {folders.checkpoints(self._run) / str(step)}: {reason}" for step, reason in wrong.items()
            ]
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
        if jax.process_index() == 0 or not self._is_shared:
            place.parent.mkdir(exist_ok=True)
            (folders.checkpoints(self._run) / str(step)).rename(place)
        multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")
        return f"the checkpoint of step {step} cannot be read ({reason}) and is now in {place}"


def _replace_data(folder: Path, said: dict[str, Any]) -> None:
    """Write the item `data` of a checkpoint anew, at once, so that a kill leaves the one or the other."""
    with tempfile.TemporaryDirectory(dir=folder.parents[1]) as beside:
        ocp.JsonCheckpointHandler().save(Path(beside).absolute(), args=ocp.args.JsonSave(seal(said)))
        for path in Path(beside).iterdir():
            path.replace(folder / "data" / path.name)


def _read_training(folder: Path, like: TrainState) -> tuple[TrainState, dict[str, Any], bool]:
    """Read the state of a checkpoint, the position that belongs to it, and whether it can go on."""
    said, of_student = read_sealed(folder / "data"), read_sealed(folder / "network")
    is_before = "layout" not in said
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _training(like))
    with ocp.StandardCheckpointer() as checkpointer:
        student = checkpointer.restore(
            folder.absolute() / "student", jax.tree.map(ocp.utils.to_shape_dtype_struct, _student(like))
        )
        check_digest(student, of_student["arrays"])
        if like.ema is not None:
            like = like._replace(ema=_read_ema(checkpointer, folder, like.ema, of_student["arrays_of_ema"]))
        if said.get("training") == "dropped":
            state = _with_student(like, student, _training(like)["embeddings"])
            step = jnp.full_like(like.step, int(folder.name))
            return state._replace(step=step), said["position"], False
        training = checkpointer.restore(
            folder.absolute() / "training",
            checkpoint_layout.renamed(abstract, checkpoint_layout.as_before) if is_before else abstract,
        )
    check_digest(training, said["arrays"])
    training = checkpoint_layout.renamed(training, checkpoint_layout.as_now) if is_before else training
    state = _with_student(like, student, training["embeddings"])
    return state._replace(step=training["step"], opt_state=training["opt_state"]), said["position"], True


def _read_ema(
    checkpointer: ocp.StandardCheckpointer, folder: Path, like: nnx.State, expected: str
) -> nnx.State:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _of_student(like))
    ema = checkpointer.restore(folder.absolute() / EMA, abstract)
    check_digest(ema, expected)
    return unflatten({f"{_STUDENT}{path}": value for path, value in ema.items()}, like)


def _with_student(state: TrainState, student: Weights, others: Weights) -> TrainState:
    """Return a state with the arrays of a student, and of all else that is trained."""
    trained = {f"{_STUDENT}{path}": value for path, value in student.items()} | others
    params, variables = (unflatten(trained, part) for part in (state.params, state.variables))
    return state._replace(params=params, variables=variables)


def _student(state: TrainState) -> Weights:
    """Return parameters and running statistics of the student under its own names."""
    return _of_student(student_of(state.params, state.variables))


def _of_student(state: nnx.State) -> Weights:
    return {path.removeprefix(_STUDENT): value for path, value in flatten(state).items()}


def _training(state: TrainState) -> dict[str, Any]:
    """Return all of a state that is not the student: what the losses hold, random streams, the optimiser."""
    student = {f"{_STUDENT}{path}" for path in _student(state)}
    trained = flatten(state.params) | flatten(state.variables)
    others = {path: value for path, value in trained.items() if path not in student}
    return {"step": state.step, "embeddings": others, "opt_state": state.opt_state}
