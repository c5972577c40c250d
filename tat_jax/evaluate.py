"""Exact evaluation: every image of the split once, whatever the batch size and the number of devices."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import checkpoint, fields, networks, sharding
from tat_jax.data.pipeline import Pipeline, open_pipeline
from tat_jax.distill import Batch, eval_step
from tat_jax.metrics import progress

# One function for all evaluations of a process, so that each network is compiled once.
_eval_step = jax.jit(eval_step, static_argnums=0)


class Accuracy(NamedTuple):
    """Top-1 and top-5 accuracy as fractions of so many `images`; `skipped` ones could not be read."""

    top1: float
    top5: float
    images: int
    skipped: int

    def __str__(self) -> str:
        skipped = f" ({self.skipped} unreadable skipped)" if self.skipped else ""
        return f"top-1 {self.top1:.2%}  top-5 {self.top5:.2%}  on {self.images:,} images{skipped}"


class Stopped(Exception):
    """An evaluation was asked to stop by a signal of this number."""


def run(config: ConfigDict, folder: str | Path, which: str) -> Accuracy:
    """Evaluate a network on the validation images of `config`.

    Args:
        config: names the data, the batch size and the compute type.
        folder: a run.
        which: "best" or "last" of its checkpoints, or a folder of weights or another run instead.

    Raises:
        FileNotFoundError: the network or the data are not there.
        ValueError: the config is no training's.
    """
    fields.check(config)
    choose = {"best": checkpoint.best, "last": checkpoint.last}.get(which)
    network = networks.restore(choose(Path(folder)) if choose else which, dtype=config.dtype)
    mesh = sharding.make_mesh()
    pipeline = open_pipeline(config, "val", batch_size=sharding.round_up(config.batch_size, mesh))
    graph, weights = nnx.split(network.model)
    weights = jax.device_put(weights, sharding.replicated(mesh))
    return evaluate(graph, weights, pipeline, mesh, show=jax.process_index() == 0)


def evaluate(
    graph: nnx.GraphDef,
    network: nnx.State,
    pipeline: Pipeline,
    mesh: Mesh,
    *,
    show: bool = True,
    stop_signal: Callable[[], int] = lambda: 0,
) -> Accuracy:
    """Count right predictions over the whole split.

    Args:
        graph: the network's structure.
        network: its arrays, whole on every device.
        pipeline: the split, without augmentation.
        mesh: the devices.
        show: draw a progress bar.
        stop_signal: asked before each batch, by every process; not 0 stops.

    Raises:
        Stopped: `stop_signal` said so.
        RuntimeError: the images counted are not those of the split.
    """
    totals = {"count": 0, "top1": 0, "top5": 0}
    pending = None
    with progress(len(pipeline.source), description="evaluate", leave=False, show=show) as bar:
        for batch in sharding.put_batches(pipeline.epoch(0), mesh):
            if number := stop_signal():
                raise Stopped(number)
            counts = _eval_step(graph, network, Batch(**batch))
            if pending is not None:
                bar.update(_add(totals, pending))
            pending = counts
        bar.update(_add(totals, pending))
    skipped = len(pipeline.skipped)
    if jax.process_count() > 1:
        skipped = int(multihost_utils.process_allgather(skipped).sum())
    if totals["count"] + skipped != len(pipeline.source):
        raise RuntimeError(
            f"evaluated {totals['count']} and skipped {skipped} of {len(pipeline.source)} images"
        )
    images = totals["count"]
    if images == 0:
        raise ValueError("no image of the split could be read")
    return Accuracy(totals["top1"] / images, totals["top5"] / images, images, skipped)


def _add(totals: dict[str, int], counts: dict[str, jax.Array] | None) -> int:
    """Add the counts of a batch to the totals and return how many images it had."""
    read = jax.device_get(counts) or {}
    for name, value in read.items():
        totals[name] += int(value)
    return int(read.get("count", 0))
