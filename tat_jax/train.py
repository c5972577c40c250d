"""One training run: from a config to a folder of checkpoints, metrics and a picture."""

import functools
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import distill, fields, report, sharding
from tat_jax.checkpoint import RunCheckpoints
from tat_jax.data.pipeline import Pipeline, open_pipeline
from tat_jax.distill import Batch, Task, TrainState
from tat_jax.evaluate import evaluate
from tat_jax.metrics import MetricWriter, Row, StepLog, progress, read_rows
from tat_jax.networks import BuiltNetwork
from tat_jax.task import prepare

# Fields in which two runs of one folder may differ; any other makes it another training.
_MAY_CHANGE = {
    "epochs",
    "log_every",
    "checkpoint_minutes",
    "steps_left_out",
    "data.root",
    "data.threads",
    "data.skip_broken",
}
# On a CPU, XLA's YNNPACK convolutions take a third more time for a step than its others; its reductions less.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


class Interrupted(Exception):
    """Training was asked to stop, and what it had done is saved."""


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
        ValueError: the config is no training, or not that of `folder`.
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
    _keep_config(config, folder)
    step_fn = jit_train_step(task, mesh)
    show = jax.process_index() == 0

    with RunCheckpoints(folder) as checkpoints, _stop_requests() as stop_requested:
        state, position = checkpoints.restore(state) or (state, {"epoch": 0, "batch": 0})
        step = int(state.step)
        if show:
            print(_summary(folder, network, task, train_data, eval_data, mesh, step), flush=True)
        done = position["epoch"] * images + position["batch"] * config.batch_size
        with (
            progress(config.epochs * images, initial=done, description=folder.name, show=show) as bar,
            MetricWriter(folder, step, active=show) as writer,
        ):
            log = StepLog(
                writer,
                bar,
                config.log_every,
                describe=functools.partial(_describe, train_data, checkpoints, folder),
                leave_out=config.steps_left_out,
                left_out=position.get("left_out", 0),
            )
            saved = time.monotonic()
            for epoch in range(position["epoch"], config.epochs):
                start = position["batch"] if epoch == position["epoch"] else 0
                for batch in sharding.put_batches(train_data.epoch(epoch, start_step=start), mesh):
                    with jax.transfer_guard("disallow"):  # all that a step needs is on the devices
                        state, metrics = step_fn(state, teacher_state, Batch(**batch))
                    log.add(
                        metrics,
                        step,
                        images=min(config.batch_size, images - step % steps * config.batch_size),
                    )
                    step += 1
                    evaluation = None
                    if step == last_step or step % (steps * config.eval_every) == 0:
                        log.flush()
                        accuracy = evaluate(*_network(task, state), eval_data, mesh, show=show)
                        evaluation = {"top1": accuracy.top1, "top5": accuracy.top5}
                        row = {f"eval/{name}": value for name, value in evaluation.items()}
                        writer.write(step, row | {"epoch": epoch + 1, "skipped": len(train_data.skipped)})
                        bar.write(f"{folder.name}: epoch {epoch + 1}/{config.epochs}  {accuracy}")
                        if train_data.skipped:
                            bar.write(f"  {len(train_data.skipped)} unreadable training images skipped")
                    stopping = stop_requested()
                    overdue = time.monotonic() - saved > 60 * config.checkpoint_minutes
                    if evaluation or stopping or overdue:
                        log.flush()
                        position = {
                            "seed": config.seed,
                            "epoch": step // steps,
                            "batch": step % steps,
                            "left_out": log.left_out,
                        }
                        checkpoints.save(
                            state, arguments=network.arguments, data=position, metrics=evaluation
                        )
                        saved = time.monotonic()
                    if stopping and step < last_step:
                        raise Interrupted(f"stopped at step {step} of {last_step}")

    rows = read_rows(folder)
    if show:
        report.plot_run(rows, folder / "curves.png")
    evaluated = [row for row in rows if "eval/top1" in row]
    return {"last": evaluated[-1], "best": max(evaluated, key=lambda row: (row["eval/top1"], row["step"]))}


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


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request that the loop sees; the second acts as always."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    received = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        for number, handler in before.items():
            signal.signal(number, handler)
        print("\nstopping after this step; once more stops at once", flush=True)

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep_config(config: ConfigDict, folder: Path) -> None:
    """Write the config into the run's folder, or check that it is the one that lies there.

    Raises:
        ValueError: the folder holds another training; every field that differs is named.
    """
    path = folder / "config.json"
    new = json.loads(config.to_json())
    if path.exists():
        old, now = (flatten_dict(kept, sep=".") for kept in (json.loads(path.read_text()), new))
        changed = [
            f"  {name}: {old.get(name)} there, {now.get(name)} now"
            for name in sorted(old.keys() | now.keys())
            if old.get(name) != now.get(name) and name not in _MAY_CHANGE
        ]
        if changed:
            raise ValueError(
                "\n".join([f"{folder} holds a run of another config; choose another --workdir:", *changed])
            )
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(new, indent=2) + "\n")
        temporary.replace(path)  # at once, for other processes may be reading


def _summary(
    folder: Path,
    student: BuiltNetwork,
    task: Task,
    train_data: Pipeline,
    eval_data: Pipeline,
    mesh: Mesh,
    step: int,
) -> str:
    terms = [f"{weight:g}·{name}" for name, weight in task.weights.of_logits().items()]
    terms += [f"{tat.weight:g}·tat({tap}, {tat.heads} heads)" for tap, tat in task.weights.of_taps().items()]
    return "\n".join(
        [
            f"{folder}: {'continues from step ' + str(step) if step else 'starts'}",
            f"  student  {student.arguments.get('architecture', type(student.model).__name__)}"
            f" from {student.origin['source']}, head {student.origin['head']}",
            f"  loss     {' + '.join(terms)}",
            f"  data     {len(train_data.source):,} training images, {len(eval_data.source):,} to validate,"
            f" {train_data.source.num_classes} classes, {train_data.steps_per_epoch:,} steps an epoch",
            f"  devices  {mesh.size} × {mesh.devices.flat[0].device_kind}",
        ]
    )
