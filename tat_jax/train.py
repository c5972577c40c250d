"""One training run: from a config to a folder of checkpoints, metrics and a picture."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Self

import jax
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import distill, fields, report, sharding
from tat_jax.checkpoint import Restored, RunCheckpoints
from tat_jax.data.pipeline import Pipeline, open_pipeline
from tat_jax.distill import Batch, Task, TrainState
from tat_jax.evaluate import Stopped, evaluate
from tat_jax.metrics import MetricWriter, Row, StepLog, progress, read_rows
from tat_jax.networks import BuiltNetwork
from tat_jax.task import prepare

# Fields with which a run may go on otherwise than it began. With another of the others what is saved would
# have no meaning: other arrays, another order of the images.
_MAY_CHANGE = {
    "epochs",
    "eval_every",
    "log_every",
    "checkpoint_minutes",
    "steps_left_out",
    "loss.alpha",
    "loss.beta",
    "loss.temperature",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.momentum",
    "optimizer.milestones",
    "optimizer.gamma",
    "data.root",
    "data.threads",
    "data.skip_broken",
    "data.crop_scale",
    "data.crop_ratio",
    "data.flip",
}
# On a CPU, XLA's YNNPACK convolutions take a third more time for a step than its others; its reductions less.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


class Interrupted(Exception):
    """Training was asked to stop, and what it had done is saved.

    Attributes:
        signal: what asked, as in `signal.SIGTERM`.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


def run(
    config: ConfigDict,
    folder: str | Path,
    *,
    student: nnx.Module | None = None,
    teacher: nnx.Module | None = None,
) -> dict[str, Row]:
    """Train the student of `config` in `folder`, continuing where an earlier run of the same config stopped.

    The order within an epoch is fixed: steps, evaluation, log, checkpoint. So a checkpoint lacks nothing of
    what its step did, and what was logged after the latest one is dropped and done again.

    Args:
        config: as the functions in `configs/` return it.
        folder: where the run lives.
        student: a network of your own instead of the config's: called as `student(images, train=…, where=…)`
            it returns logits and sows its taps.
        teacher: likewise.

    Returns:
        The rows of the evaluation after the `last` epoch and after the `best` (of equal ones, the later),
        with `eval/top1`.

    Raises:
        FileNotFoundError: data or weights are missing.
        ValueError: the config is no training, or not that of `folder`, or another run is at work there.
        OSError: the folder cannot be written.
        FloatingPointError: a loss term or the gradient is not finite, more often than `steps_left_out`.
        Interrupted: SIGINT or SIGTERM came.
    """
    fields.check(config)
    folder = Path(folder)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.batch_size, mesh)
    train_data, eval_data = open_pipeline(config, "train"), open_pipeline(config, "val")
    images, steps = len(train_data.source), train_data.steps_per_epoch
    last_step = config.epochs * steps
    task, state, teacher_state, network = prepare(
        config,
        mesh,
        num_classes=train_data.source.num_classes,
        steps_per_epoch=steps,
        student=student,
        teacher=teacher,
    )
    differences = changes(config, folder)
    step_fn = jit_train_step(task, mesh)
    show = jax.process_index() == 0

    with (
        _only_run(folder) as check_is_there,
        RunCheckpoints(folder) as checkpoints,
        _StopSignals() as signals,
    ):
        restored = checkpoints.restore(state)
        position: dict[str, Any] = restored.position if restored else {"images": images, "evaluated": True}
        if position["images"] != images:
            raise ValueError(
                f"{folder} was trained on {position['images']:,} images, and data.root holds {images:,} now"
            )
        state = restored.state if restored else state
        step, evaluated = int(state.step), position["evaluated"]
        _write_config(config, folder, step, changed=bool(differences))
        if show:
            print(
                _summary(folder, network, task, train_data, eval_data, mesh, restored, differences),
                flush=True,
            )
        done = step // steps * images + step % steps * config.batch_size
        with (
            progress(config.epochs * images, initial=done, description=folder.name, show=show) as bar,
            MetricWriter(folder, step, evaluated=evaluated, active=show) as writer,
        ):
            log = StepLog(
                writer,
                bar,
                config.log_every,
                describe=functools.partial(_describe, train_data, checkpoints, folder),
                leave_out=config.steps_left_out,
                position=position.get("log"),
            )
            agreement = sharding.Agreement(mesh)
            saved_step, saved_at = step, time.monotonic()

            def wishes() -> list[int]:
                """Return the signal that any process received, and whether any finds a checkpoint overdue."""
                overdue = time.monotonic() - saved_at > 60 * config.checkpoint_minutes
                return agreement((signals.received, overdue))

            def save(metrics: dict[str, float] | None = None) -> None:
                nonlocal saved_step, saved_at
                log.flush()
                if step != saved_step or metrics:
                    writer.sync()
                    check_is_there()
                    where = {"epoch": step // steps, "batch": step % steps, "images": images}
                    checkpoints.save(
                        state,
                        arguments=network.arguments,
                        position=where | {"evaluated": evaluated, "log": log.position},
                        metrics=metrics,
                    )
                saved_step, saved_at = step, time.monotonic()

            while step < last_step or not evaluated:
                epoch, batch_index = divmod(step, steps)
                batches = train_data.epoch(epoch, start_step=batch_index) if evaluated else iter(())
                for batch in sharding.put_batches(batches, mesh):
                    with jax.transfer_guard("disallow"):  # all that a step needs is on the devices
                        state, metrics = step_fn(state, teacher_state, Batch(**batch))
                    signals.listen()
                    log.add(
                        metrics,
                        step,
                        images=min(config.batch_size, images - step % steps * config.batch_size),
                    )
                    step += 1
                    evaluated = step < last_step and step % (steps * config.eval_every) > 0
                    stop, overdue = wishes()
                    if stop or (overdue and evaluated):
                        save()
                    if stop:
                        raise Interrupted(f"stopped at step {step} of {last_step}", stop)
                    checkpoints.check()
                if not evaluated:
                    signals.listen()  # of a run that continues with its evaluation
                    log.flush()
                    try:
                        accuracy = evaluate(
                            *_network(task, state),
                            eval_data,
                            mesh,
                            show=show,
                            stop_signal=lambda: wishes()[0],
                        )
                    except Stopped as stopped:
                        save()
                        raise Interrupted(f"stopped at step {step} of {last_step}", *stopped.args) from None
                    evaluated = True
                    row: Row = {"eval/top1": accuracy.top1, "eval/top5": accuracy.top5}
                    writer.write(step, row | {"epoch": step // steps, "skipped": len(train_data.skipped)})
                    if show:
                        bar.write(f"{folder.name}: epoch {step // steps}/{config.epochs}  {accuracy}")
                        if train_data.skipped:
                            bar.write(f"  {len(train_data.skipped)} unreadable training images skipped")
                    save({"top1": accuracy.top1, "top5": accuracy.top5})

        rows = read_rows(folder)
        if show:
            report.plot_run(rows, folder / "curves.png")
    evaluated_rows = [row for row in rows if "eval/top1" in row]
    best = max(evaluated_rows, key=lambda row: (row["eval/top1"], row["step"]))
    return {"last": evaluated_rows[-1], "best": best}


def jit_train_step(task: Task, mesh: Mesh) -> jax.stages.Wrapped:
    """Return the step of a task, compiled for the devices of a mesh; the state passed to it is donated."""
    whole = sharding.replicated(mesh)
    return jax.jit(
        functools.partial(distill.train_step, task),
        donate_argnums=0,
        out_shardings=(whole, whole),
        compiler_options=_CPU_OPTIONS if mesh.devices.flat[0].platform == "cpu" else None,
    )


def _network(task: Task, state: TrainState) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the structure and the arrays of the student."""
    return nnx.split(nnx.merge(task.distillation, state.params, state.batch_stats).student)


def _describe(data: Pipeline, checkpoints: RunCheckpoints, folder: Path, step: int) -> str:
    """Say what a step was made of, where a run that ends with it stands, and what to do."""
    names = data.names(*divmod(step, data.steps_per_epoch))
    path = folder / f"step{step}_process{jax.process_index()}_images.txt"
    path.write_text("\n".join(names) + "\n")
    saved = checkpoints.latest_step()
    return (
        f"its images: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}, all {len(names)} in {path}. "
        f"{'Nothing was saved before' if saved is None else f'The checkpoint of step {saved} is kept'}. "
        "Look at the images, lower optimizer.learning_rate in another --workdir, or go on without some such "
        "steps: --config.steps_left_out=10"
    )


class _StopSignals:
    """SIGINT and SIGTERM: the first is noted for the loop to see, the second acts as always.

    Attributes:
        received: the number of the first, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def listen(self) -> None:
        """Note signals from now on; while the first step is compiled they act as always: nothing is lost."""
        if not self._before:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        self._restore()
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may be at work already

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def _only_run(folder: Path) -> Iterator[Callable[[], None]]:
    """Make the run's folder, keep other runs out of it, and yield a check that it is still there.

    Raises:
        OSError: it cannot be written, its disk is full, or it was moved or deleted.
        ValueError: another run is at work in it.
    """
    try:
        with _lock(folder) if jax.process_index() == 0 else contextlib.nullcontext(lambda: True) as is_there:

            def check_is_there() -> None:
                if not is_there():
                    raise OSError(
                        f"{folder} was moved or deleted while its run was at work: nothing more is saved"
                    )

            try:
                yield check_is_there
            except OSError:
                check_is_there()
                raise
    except OSError as error:
        # What comes of writing to an open file does not name it.
        is_of_folder = error.filename is None or str(error.filename).startswith(str(folder))
        is_of_writing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)
        if not (is_of_folder and is_of_writing):
            raise
        raise OSError(
            f"cannot write in {folder}: {error.strerror}; make room there, and run the same command again, "
            "or choose another --workdir"
        ) from error


@contextmanager
def _lock(folder: Path) -> Iterator[Callable[[], bool]]:
    """Make and lock a folder, and yield whether its path still leads to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is at work in {folder}; choose another --workdir") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # not every disk has locks
                raise
        locked = os.open(folder, os.O_RDONLY)

        def is_there() -> bool:
            try:
                return os.path.samestat(os.fstat(locked), folder.stat())
            except OSError:
                return False

        try:
            yield is_there
        finally:
            if not is_there():
                _remove_remade(folder)
            os.close(locked)


def _remove_remade(folder: Path) -> None:
    """Remove what Orbax made anew of a folder that was moved while it saved; a run would continue from it."""
    for _ in range(10):  # two seconds, in which the writes that it abandoned come to their end
        if folder.is_dir() and [path.name for path in folder.iterdir()] == ["checkpoints"]:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)


def changes(config: ConfigDict, folder: Path) -> list[str]:
    """Return how the config differs from the one that lies in the run's folder, a line each.

    Raises:
        ValueError: the run cannot continue with it; every field that hinders is named.
    """
    path = folder / "config.json"
    if not path.exists():
        return []
    try:
        old = flatten_dict(json.loads(path.read_text()), sep=".")
    except (ValueError, AttributeError):
        raise ValueError(
            f"{path} is damaged; remove it, and the run continues with the config at hand"
        ) from None
    now = flatten_dict(json.loads(config.to_json()), sep=".")
    taken: list[str] = []
    refused: list[str] = []
    for name in sorted(old.keys() | now.keys()):
        before, after = old.get(name), now.get(name)
        if before != after:
            embeddings_stay = fnmatch(name, "tat.*.weight") and before and after
            fits = name in _MAY_CHANGE or embeddings_stay
            (taken if fits else refused).append(f"{name}: {before} there, {after} now")
    if refused:
        head = f"{folder} holds a run of another config; choose another --workdir:"
        raise ValueError("\n  ".join([head, *refused]))
    return taken


def _write_config(config: ConfigDict, folder: Path, step: int, *, changed: bool) -> None:
    """Write the config into the run's folder, and keep one with which the run came to `step`."""
    if jax.process_index() != 0:
        return
    path = folder / "config.json"
    if changed:
        (folder / f"config_until_step{step}.json").write_text(path.read_text())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    temporary.replace(path)  # at once, for other processes may be reading


def _summary(
    folder: Path,
    student: BuiltNetwork,
    task: Task,
    train_data: Pipeline,
    eval_data: Pipeline,
    mesh: Mesh,
    restored: Restored | None,
    differences: list[str],
) -> str:
    terms = [f"{weight:g}·{name}" for name, weight in task.weights.of_logits().items()]
    terms += [f"{tat.weight:g}·tat({tap}, {tat.heads} heads)" for tap, tat in task.weights.of_taps().items()]
    return "\n".join(
        [
            f"{folder}: {f'continues from step {int(restored.state.step)}' if restored else 'starts'}",
            *(f"  damaged  {line}" for line in (restored.set_aside if restored else ())),
            *(f"  changed  {line}" for line in differences),
            f"  student  {student.arguments.get('architecture', type(student.model).__name__)}"
            f" from {student.origin['source']}, head {student.origin['head']}",
            f"  loss     {' + '.join(terms)}",
            f"  data     {len(train_data.source):,} training images, {len(eval_data.source):,} to validate,"
            f" {train_data.source.num_classes} classes, {train_data.steps_per_epoch:,} steps an epoch",
            f"  devices  {mesh.size} × {mesh.devices.flat[0].device_kind}",
        ]
    )
