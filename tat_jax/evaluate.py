"""Exact evaluation: every image of the split once, whatever the batch size and the number of devices."""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from tat_jax import buckets, experiment, networks, probe, sharding
from tat_jax.batch import Batch
from tat_jax.buckets import Place
from tat_jax.build import Built
from tat_jax.data.pipeline import Pipeline, check_same, open_pipeline
from tat_jax.data.source import class_names, notes
from tat_jax.distill import TrainState
from tat_jax.metrics import progress
from tat_jax.networks import Network, OwnNetwork
from tat_jax.tasks import task_of
from tat_jax.tasks.task import Task
from tat_jax.usage import other_classes
from tat_jax.weights import folders, remote, store

HELD_OUT = "held_out_"  # before the names of measures on what is held out of training


class Evaluation(NamedTuple):
    """What a task measured on so many `images`; `skipped` ones could not be read.

    `confusion` is [truth, prediction] where the task counts that.
    """

    task: Task
    measures: dict[str, float]
    images: int
    skipped: int
    confusion: np.ndarray | None = None

    def with_ema(self, ema: "Evaluation") -> "Evaluation":
        """Return it with the measures of the student's moving average beside its own, with `ema_` before."""
        further = {f"{folders.OF_EMA}{name}": value for name, value in ema.measures.items()}
        return self._replace(measures=self.measures | further)

    def with_held_out(self, measures: Mapping[str, float]) -> "Evaluation":
        """Return it with measures of what is held out of training beside its own, with `held_out_` before."""
        further = {f"{HELD_OUT}{name}": value for name, value in measures.items()}
        return self._replace(measures=self.measures | further)

    def __str__(self) -> str:
        skipped = f" ({self.skipped} unreadable skipped)" if self.skipped else ""
        return f"{describe(self.task, self.measures)}  on {self.images:,} images{skipped}"

    def report(self) -> str:
        """Return all of it in lines."""
        return "\n".join(filter(None, (str(self), self.task.table({"": self.measures}))))


def describe(task: Task, measures: Mapping[str, float]) -> str:
    """Return the measures in a line, with those of what is held out, and those of the moving average."""
    said = task.describe(measures)
    for prefix, title in ((HELD_OUT, "held out"), (folders.OF_EMA, "EMA")):
        found = {
            name.removeprefix(prefix): value for name, value in measures.items() if name.startswith(prefix)
        }
        said += f"  {title} {describe(task, found)}" if found else ""
    return said


class Stopped(Exception):
    """An evaluation was asked to stop by a signal of this number."""


def run(
    config: ConfigDict, folder: str | Place, which: str, *, student: OwnNetwork | None = None
) -> Evaluation:
    """Evaluate a network on the validation images of `config`.

    Args:
        config: names the task, the data, the batch size and the compute type.
        folder: a run, on this machine or in a bucket.
        which: "best" or "last" of its checkpoints, "best_ema" or "last_ema" of their moving averages, or a
            folder of weights or another run instead, wherever.
        student: a network of your own, as in `train.run`, where the folder holds weights of one.

    Raises:
        FileNotFoundError: the network or the data are not there.
        ValueError: the config is no training's, or the classes of the network are not those of the data.
    """
    experiment.check(config)
    network, named = load(config, folder, which, student=student)
    mesh = sharding.make_mesh()
    pipeline = open_pipeline(config, "val", batch_size=sharding.round_up(config.batch_size, mesh))
    check_same(config, pipeline)
    if wrong := other_classes(network, pipeline.source.num_classes, class_names(pipeline.source)):
        raise ValueError(f"{named} has other classes: {wrong}; name data of its own")
    show, task = jax.process_index() == 0, task_of(config)
    for line in (*notes(pipeline.source), *other_sizes(network, named, task, config)) if show else ():
        print(f"note: {line}", file=sys.stderr)
    graph, state = nnx.split(network.view)
    state = sharding.put_whole(state, mesh, what="the weights")
    with contextlib.closing(open_evaluator(config, pipeline, mesh)) as evaluator:
        return evaluator(graph, state, show=show)


def load(
    config: ConfigDict, folder: str | Place, which: str, *, student: OwnNetwork | None = None
) -> tuple[Network, str]:
    """Return the network that is to be evaluated, and what lines call it; the arguments are those of `run`.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it has no head that was trained, and the task needs one.
    """
    if choose := folders.CHOICES.get(which):
        with remote.at_hand(buckets.place(folder)) as here:
            network = networks.restore(choose(here), dtype=config.dtype, network=student)
    else:
        network = networks.restore(which, dtype=config.dtype, network=student)
    named = f"the {which} checkpoint of {folder}" if choose else which
    if not task_of(config).needs_head:
        return network, named
    if network.origin["head"] == store.NO_HEAD:
        raise ValueError(
            f"{named} has no head: train one, as --config finetune --config.student.weights does, or measure "
            "its features by --config.task=features"
        )
    if network.origin["head"] == "fresh":
        raise ValueError(f"{named} has a head that was never trained: its logits mean nothing")
    return network, named


def other_sizes(network: Network, named: str, task: Task, config: ConfigDict) -> list[str]:
    """Return what is to be noted where a network was trained for images of other sizes than the config's."""
    known, here = network.usage.get("image"), task.sizes(config.data)
    if not known or known == here:
        return []
    then, now = (", ".join(f"{name} {size}" for name, size in sizes.items()) for sizes in (known, here))
    return [f"{named} was trained for {then}; its images have {now} here (data.image_size, data.eval_resize)"]


class Evaluator(Protocol):
    """Evaluates networks, one after the other, on images that it holds open."""

    def __call__(
        self,
        graph: nnx.GraphDef,
        state: nnx.State,
        trained: TrainState | None = None,
        *,
        show: bool = True,
        stop_signal: Callable[[], int] = lambda: 0,
    ) -> Evaluation:
        """Evaluate a network; the arguments are those of `evaluate`.

        Args:
            graph: the structure of its `View`.
            state: its arrays.
            trained: all that is trained with it; None where it is not being trained.
            show: draw a progress bar.
            stop_signal: asked before each batch; not 0 stops.
        """

    def close(self) -> None:
        """End what reads images that it opened itself."""


def open_evaluator(
    config: ConfigDict,
    pipeline: Pipeline,
    mesh: Mesh,
    built: Built | None = None,
    held_out: Pipeline | None = None,
) -> Evaluator:
    """Return what evaluates as the task of a config has it.

    Args:
        config: names the task, and what else it measures by.
        pipeline: the images to validate, without augmentation.
        mesh: the devices.
        built: the training, whose teacher and losses may be measured, too; None where nothing is trained.
        held_out: the images that are held out of training, which are measured, too; None where none are.

    Raises:
        FileNotFoundError: images that it needs besides are not there.
        ValueError: they cannot be what they should be.
    """
    task = task_of(config)
    if task.needs_head:
        return _Counting(task, pipeline, mesh, held_out)
    return _Probing(task, probe.open_probe(config, pipeline, mesh, built))


class _Counting(NamedTuple):
    """Counts what a task counts over a split, and over what is held out of training where something is."""

    task: Task
    pipeline: Pipeline
    mesh: Mesh
    held_out: Pipeline | None

    def __call__(
        self, graph: nnx.GraphDef, state: nnx.State, trained: TrainState | None = None, **options: Any
    ) -> Evaluation:
        found = evaluate(graph, state, self.task, self.pipeline, self.mesh, **options)
        if self.held_out is None:
            return found
        return found.with_held_out(
            evaluate(graph, state, self.task, self.held_out, self.mesh, **options).measures
        )

    def close(self) -> None:
        """End what reads the images that are held out; whoever opened the others closes them."""
        if self.held_out is not None:
            self.held_out.close()


class _Probing(NamedTuple):
    """Measures features."""

    task: Task
    probe: probe.Probe | probe.HeldOut

    def __call__(
        self,
        graph: nnx.GraphDef,
        state: nnx.State,
        trained: TrainState | None = None,
        *,
        show: bool = True,
        stop_signal: Callable[[], int] = lambda: 0,
    ) -> Evaluation:
        def listen() -> None:
            if number := stop_signal():
                raise Stopped(number)

        return Evaluation(self.task, *self.probe.measure((graph, state), trained, show=show, listen=listen))

    def close(self) -> None:
        """End the processes that read the labelled images."""
        self.probe.close()


def evaluate(
    graph: nnx.GraphDef,
    state: nnx.State,
    task: Task,
    pipeline: Pipeline,
    mesh: Mesh,
    *,
    show: bool = True,
    stop_signal: Callable[[], int] = lambda: 0,
) -> Evaluation:
    """Count over the whole split what the task measures.

    Args:
        graph: the structure of a network's `View`.
        state: its arrays, whole on every device or split over them.
        task: that of the pipeline.
        pipeline: the split, without augmentation.
        mesh: the devices.
        show: draw a progress bar.
        stop_signal: asked before each batch, by every process; not 0 stops.

    Raises:
        Stopped: `stop_signal` said so.
        ValueError: no image could be read.
        RuntimeError: the images counted are not those of the split.
    """
    count = jit_eval_step(mesh)
    totals: dict[str, np.ndarray] = {}
    pending = None
    with progress(len(pipeline.source), description="evaluate", leave=False, show=show) as bar:
        for batch in sharding.put_batches(pipeline.epoch(0), mesh):
            if number := stop_signal():
                raise Stopped(number)
            counts = count(graph, task, state, batch)
            bar.update(_add(totals, pending))
            pending = counts
        bar.update(_add(totals, pending))
    skipped = len(pipeline.skipped)
    if jax.process_count() > 1:
        skipped = int(multihost_utils.process_allgather(skipped).sum())
    images = int(totals.get("count", 0))
    if images + skipped != len(pipeline.source):
        raise RuntimeError(f"evaluated {images} and skipped {skipped} of {len(pipeline.source)} images")
    if images == 0:
        raise ValueError("no image of the split could be read")
    measures = task.measures(totals, class_names(pipeline.source))
    return Evaluation(task, measures, images, skipped, totals.get("confusion"))


def eval_step(graph: nnx.GraphDef, task: Task, state: nnx.State, batch: Batch) -> dict[str, Array]:
    """Return what a task counts of a batch.

    Raises:
        ValueError: in numbers that round.
    """
    counts = task.count(nnx.merge(graph, state)(batch.image), batch)
    for name, value in counts.items():
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise ValueError(
                f"{type(task).__name__} counts `{name}` in {value.dtype}, which does not add up exactly"
            )
    return counts


@functools.cache
def jit_eval_step(mesh: Mesh) -> jax.stages.Wrapped:
    """Return the step for a mesh, the same at every call, so that a process compiles each network once."""

    def count(graph: nnx.GraphDef, task: Task, state: nnx.State, batch: Batch) -> dict[str, Array]:
        return eval_step(graph, task, sharding.gathered(state, mesh), batch)

    # Counts that are arrays lie whole on every device as well, so that each process can read them.
    return jax.jit(count, static_argnums=(0, 1), out_shardings=sharding.replicated(mesh))


def _add(totals: dict[str, np.ndarray], counts: Mapping[str, jax.Array] | None) -> int:
    """Add the counts of a batch to the totals, which no batch overflows, and return its images."""
    read = jax.device_get(counts) or {}
    for name, value in read.items():
        totals[name] = np.asarray(np.add(totals.get(name, 0), value, dtype=np.int64))
    return int(read.get("count", 0))
