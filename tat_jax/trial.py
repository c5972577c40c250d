"""The first steps of a training, for what they tell: reading, memory, the loss, time.

Each function returns what it finds in words, and what the next one needs.
"""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.build import Built
from tat_jax.data.pipeline import Pipeline
from tat_jax.distill import TrainState
from tat_jax.quantities import duration, size
from tat_jax.step import jit_train_step

_SECONDS = 1.0  # that reading is timed for, at least
_STEPS = 3  # that are timed after the first, if they fit into `_LIMIT`
_LIMIT = 60.0  # seconds: no longer step is taken, nor further ones in all
_FEW = 16  # images of the first look


class Reading(NamedTuple):
    """The first batch of a training, this process's rows, and the images/s that all processes read."""

    first: Batch
    rate: float


class Step(NamedTuple):
    """The compiled step of a training, and what it takes besides the state."""

    program: Any
    others: tuple[nnx.State | None, Batch]


class Taken(NamedTuple):
    """A step that was taken: the state after it, what it measured of how many images, and its seconds.

    The state is None where it was not that of the training; the seconds are reckoned then.
    """

    state: TrainState | None
    metrics: dict[str, float]
    images: int
    seconds: float


def time_reading(config: ConfigDict, data: Pipeline) -> tuple[str, Reading]:
    """Read the first batches of the training as it will, with nothing else to do.

    Raises:
        ValueError: a file cannot be read.
    """
    data.start()
    since = time.monotonic()
    reader = data.epoch(0)
    first = next(reader)
    images, seconds = int(first.where.sum()), time.monotonic() - since
    while seconds < _SECONDS and (batch := next(reader, None)):
        images += int(batch.where.sum())
        seconds = time.monotonic() - since
    reader.close()
    data.close()
    rate = images / seconds * jax.process_count()
    finding = f"{rate:,.0f} images/s with {data.readers()}, in at most {size(data.memory)} of memory"
    return finding, Reading(first, rate)


def look(config: ConfigDict, built: Built, reading: Reading, mesh: Mesh) -> tuple[str, Taken | None]:
    """Take a step on the first few images, for what a step on all would take nobody knows before.

    Raises:
        FloatingPointError: a term of its loss or its gradient is not finite.
    """
    shared = math.lcm(mesh.size, config.bn_group) if config.bn_group and config.bn_group < _FEW else mesh.size
    images = -(-_FEW // shared) * shared
    if config.batch_size < 2 * images:
        return "left out: a batch is as small", None
    rows = images // jax.process_count()
    few = reading._replace(first=jax.tree.map(lambda of_all: of_all[:rows], reading.first))
    _, step = compile_step(built, few, mesh)
    for _ in range(2):  # the first one also warms up
        taken = _take(step, jax.tree.map(jnp.copy, built.state), images)
    seconds = _slowest(taken.seconds) * config.batch_size / images
    finding = (
        f"{images} images: loss {taken.metrics['loss']:.4g}, {duration(taken.seconds)}; "
        f"{config.batch_size:,} would take about {duration(seconds)}"
    )
    _check_finite(taken.metrics, finding)
    return finding, taken._replace(state=None, seconds=seconds)


def compile_step(built: Built, reading: Reading, mesh: Mesh) -> tuple[str, Step]:
    """Compile the step, and compare what it needs with what a device has.

    Raises:
        MemoryError: that is less.
    """
    since = time.monotonic()
    first = sharding.put_batch(reading.first, mesh)
    others = built.teacher, first
    program: Any = jit_train_step(built.recipe, mesh).lower(built.state, *others).compile()
    seconds = time.monotonic() - since
    sizes = program.memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    has = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    finding = (
        f"{size(needed)} on each device: {size(sizes.argument_size_in_bytes)} of arguments, "
        f"{size(sizes.temp_size_in_bytes)} of temporaries"
    )
    if has is not None:
        finding += f"; it has {size(has)}"
        if needed > has:
            raise MemoryError(f"{finding}: lower batch_size, set dtype=bfloat16 or take more devices")
    return f"{finding}; compiled in {duration(seconds)}", Step(program, others)


def take_first_step(config: ConfigDict, built: Built, step: Step, few: Taken | None) -> tuple[str, Taken]:
    """Take the first step of the training, and say what its loss is made of.

    Raises:
        FloatingPointError: a term of its loss or its gradient is not finite.
    """
    weights = {
        name: float(w(built.state.step)) if callable(w) else w for name, w in built.recipe.weights.items()
    }
    taken = few if few and few.seconds > _LIMIT else _take(step, built.state, config.batch_size)
    metrics = taken.metrics
    loss, norm = metrics["loss"], metrics["gradient_norm"]
    of_few = f", of {taken.images} images alone, as a step of all takes long" if taken is few else ""
    lines = [f"{loss:.4g}, gradient norm {norm:.4g}{of_few}"]
    for name, weight in weights.items():
        value = weight * metrics[name]
        share = value / loss if loss else 0.0  # of schedules that begin with 0 there may be nothing
        lines.append(f"{weight:g}·{name} = {weight:g} · {metrics[name]:.4g}, {share:.1%} of the loss")
    finding = "\n".join(lines)
    _check_finite(metrics, finding)
    return finding, taken


def time_steps(
    config: ConfigDict, data: Pipeline, reading: Reading, step: Step, taken: Taken
) -> tuple[str, None]:
    """Take further steps on the same batch, and reckon from them how long the training takes."""
    steps = min(_STEPS, int(_LIMIT / max(_slowest(taken.seconds), 1e-9)))
    seconds, state = taken.seconds, taken.state
    if state is not None and steps:
        since = time.monotonic()
        for _ in range(steps):
            state, metrics = step.program(state, *step.others)
        jax.block_until_ready((state, metrics))
        seconds = (time.monotonic() - since) / steps
    to_read = config.batch_size / reading.rate
    total = config.epochs * data.steps_per_epoch
    pace = "reading keeps up" if to_read <= seconds else "reading is slower and sets the pace"
    return (
        f"{1000 * seconds:,.0f} ms a step, {config.batch_size / seconds:,.0f} images/s, {pace}: "
        f"{total:,} steps in about {duration(total * max(seconds, to_read))}, without evaluations"
    ), None


def _take(step: Step, state: TrainState, images: int) -> Taken:
    since = time.monotonic()
    state, measured = step.program(state, *step.others)
    metrics = {name: float(value) for name, value in measured.items()}
    return Taken(state, metrics, images, time.monotonic() - since)


def _slowest(seconds: float) -> float:
    """Return the longest time of all processes, so that they decide alike."""
    if jax.process_count() == 1:
        return seconds
    return float(multihost_utils.process_allgather(np.float32(seconds)).max())


def _check_finite(metrics: dict[str, float], finding: str) -> None:
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f"not finite: {', '.join(wrong)}; look at the networks and the first images, "
            f"or compute in float32\n{finding}"
        )
