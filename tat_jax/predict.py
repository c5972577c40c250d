"""Predictions for a folder of images that nobody has labelled, written as the task has them."""

import contextlib
import functools
import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int
from ml_collections import ConfigDict

from tat_jax import evaluate, experiment, sharding
from tat_jax.batch import Batch
from tat_jax.buckets import Place
from tat_jax.data.pipeline import Pipeline, check_same, pipeline_of
from tat_jax.data.rows import Transform, decoding
from tat_jax.data.source import Source, notes
from tat_jax.data.transforms import decode
from tat_jax.data.unlabelled import UnlabelledFolder, sized
from tat_jax.metrics import progress
from tat_jax.networks import OwnNetwork
from tat_jax.predictions import WRITERS, Writer
from tat_jax.quantities import count
from tat_jax.signals import Interrupted, StopSignals
from tat_jax.tasks import task_of
from tat_jax.tasks.task import Task


class Predicted(NamedTuple):
    """What was written.

    Attributes:
        images: how many were predicted.
        skipped: a line for each one that could not be read.
        where: what lies where, in words.
        seconds: that it took, without starting.
    """

    images: int
    skipped: list[str]
    where: str
    seconds: float

    def __str__(self) -> str:
        skipped = f" ({len(self.skipped)} unreadable skipped)" if self.skipped else ""
        rate = self.images / max(self.seconds, 1e-9)
        return f"{count(self.images, 'image')}{skipped}, {rate:,.1f} images/s: {self.where}"


def run(
    config: ConfigDict,
    folder: str | Place,
    which: str,
    images: Path,
    out: Path,
    *,
    student: OwnNetwork | None = None,
) -> Predicted:
    """Predict every image of a folder and of all within it, transformed as the config evaluates.

    An image that cannot be read is left out, and named at the end. Of what lies in `out` already, only files
    of the names that are written are replaced, each at once.

    Args:
        config: names the task, how images are transformed, the batch size and the compute type.
        folder: a run, on this machine or in a bucket.
        which: the network, as `evaluate.run` has it.
        images: the folder of images; of several processes all see the same.
        out: where predictions go. A table is the first process's; label maps each process writes of its own
            share of the images.
        student: a network of your own, as in `train.run`, where the folder holds weights of one.

    Raises:
        FileNotFoundError: the network or the images are not there.
        ValueError: nothing could be read, what is written would be read, or the config is no training's.
        OSError: `out` cannot be written.
        Interrupted: SIGINT or SIGTERM came.
    """
    experiment.check(config)
    if config.task not in WRITERS:
        raise ValueError(f"nothing is known of how to write predictions of task={config.task!r}")
    source = UnlabelledFolder(images)
    _check_apart(source, images, out)
    network, named = evaluate.load(config, folder, which, student=student)
    mesh, task = sharding.make_mesh(), task_of(config)
    config = config.copy_and_resolve_references()
    config.data.skip_broken = True
    batch_size = sharding.round_up(min(config.batch_size, len(source)), mesh)
    pipeline = pipeline_of(config, source, _Alone(task), batch_size=batch_size, train=False)
    check_same(config, pipeline)
    sharding.check_same({"the list of images": _digest(source)})
    show = jax.process_index() == 0
    for line in (*notes(source), *evaluate.other_sizes(network, named, task, config)) if show else ():
        print(f"note: {line}", file=sys.stderr)
    graph, state = nnx.split(network.view)
    state = sharding.put_whole(state, mesh, what="the weights")
    decoder = functools.partial(decode, **decoding(config.data))
    with WRITERS[config.task](out, source, network, decoder, mesh) as writer, StopSignals() as signals:
        since = time.monotonic()
        seen = _predict(graph, state, pipeline, mesh, writer, signals, show=show)
        if not seen.any():
            reason = source.why_unread(0, decoder)
            raise ValueError(f"none of the {count(len(source), 'image')} in {images} could be read: {reason}")
        where = writer.finish()
        seconds = time.monotonic() - since
    skipped = [source.why_unread(index, decoder) for index in np.flatnonzero(~seen).tolist() if show]
    return Predicted(int(seen.sum()), skipped, where, seconds)


@dataclass(frozen=True)
class _Alone:
    """How a task transforms images to evaluate them; in the place of labels, which there are none, sizes."""

    task: Task

    @property
    def transform(self) -> Transform:
        """Return a transform that gives the size of an image before it in the place of a label."""
        return functools.partial(sized, self.task.transform)

    def check(self, data: ConfigDict) -> None:
        """Raise a ValueError if `data` asks for what the task cannot do."""
        self.task.check(data)

    def blank_label(self, data: ConfigDict, source: Source, *, train: bool) -> Int[np.ndarray, "1 2"]:
        """Return the size of no image."""
        return np.zeros((1, 2), np.int32)


def _predict(
    graph: nnx.GraphDef,
    state: nnx.State,
    pipeline: Pipeline,
    mesh: Mesh,
    writer: Writer,
    signals: StopSignals,
    *,
    show: bool,
) -> Bool[np.ndarray, " images"]:
    """Predict and write one batch after the other, and return which images could be read.

    Raises:
        Interrupted: any process received a signal.
    """
    forward, agreement = _jit_forward(mesh), sharding.Agreement(mesh)
    seen = np.zeros(len(pipeline.source), bool)
    pending = None

    def write(started: tuple[int, Array, Any] | None) -> int:
        if started is None:
            return 0
        first, where, found = started
        rows = np.flatnonzero(np.asarray(where))
        seen[first + rows] = True
        writer.write(first, rows, found)
        return len(rows)

    bar = progress(len(seen), description="predict", leave=False, show=show)
    with contextlib.closing(pipeline), bar:
        for step, batch in enumerate(pipeline.epoch(0)):
            if number := agreement([signals.received])[0]:
                done = f"stopped after {seen.sum():,} of {count(len(seen), 'image')}"
                raise Interrupted(done, number, then="begins anew")
            on_devices = sharding.put_batch(batch, mesh)
            logits, where = forward(graph, state, on_devices)
            signals.listen()  # nothing is lost while the first batch is compiled
            started = step * len(where), where, writer.compute(logits, on_devices, batch)
            bar.update(write(pending))
            pending = started
        bar.update(write(pending))
    return seen


@functools.cache
def _jit_forward(mesh: Mesh) -> jax.stages.Wrapped:
    """Return what gives the logits of a batch, split like it, and in all processes which rows are images."""

    def forward(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> tuple[Array, Any]:
        logits = nnx.merge(graph, state)(batch.image).logits
        if logits is None:
            raise ValueError("the network gives no logits, from which to predict")
        return logits, batch.where

    shardings = sharding.batched(mesh), sharding.replicated(mesh)
    return jax.jit(forward, static_argnums=0, out_shardings=shardings)


def _check_apart(source: UnlabelledFolder, images: Path, out: Path) -> None:
    """Raise a ValueError where what is written would be among the images."""
    here, there = Path(os.path.realpath(out)), Path(os.path.realpath(images))
    # Nor within it: `labels` beside a folder of images may hold the truth.
    looked_into = (Path(os.path.realpath(folder)) for folder in source.folders)
    if here.is_relative_to(there) or any(folder.is_relative_to(here) for folder in looked_into):
        raise ValueError(
            f"--out={out} and --images={images} lie in each other: name a folder beside the images"
        )


def _digest(source: UnlabelledFolder) -> str:
    """Return the SHA-256 of the list of images."""
    names = "\0".join(source.path(index) for index in range(len(source)))
    return hashlib.sha256(os.fsencode(names)).hexdigest()
