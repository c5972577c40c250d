"""The first steps of a training, for what they tell: reading, memory, the loss, time.

Each function returns what it finds in words, and what the next one needs.
"""

import math
import time
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.build import Built
from tat_jax.data.pipeline import Pipeline
from tat_jax.distill import TrainState
from tat_jax.quantities import duration, size
from tat_jax.train import jit_train_step

_SECONDS = 1.0  # that reading is timed for, at least
_STEPS = 3  # that are timed after the first: as many in each process, for they wait for each other


class Reading(NamedTuple):
    """The first batch of a training, on the devices, and the images/s that all processes read."""

    first: Batch
    rate: float


class Step(NamedTuple):
    """The compiled step of a training, and what it takes besides the state."""

    program: Any
    others: tuple[nnx.State | None, Batch]


def time_reading(config: ConfigDict, data: Pipeline, mesh: Mesh) -> tuple[str, Reading]:
    """Read the first batches of the training as it will, with nothing else to do.

    Raises:
        ValueError: a file cannot be read.
    """
    first, images = None, 0
    since = time.monotonic()
    for batch in data.epoch(0):
        first = first or batch
        images += int(batch.where.sum())
        seconds = time.monotonic() - since
        if seconds > _SECONDS:
            break
    (on_devices,) = sharding.put_batches([first], mesh)
    rate = images / seconds * jax.process_count()
    return f"{rate:,.0f} images/s with data.threads={config.data.threads}", Reading(on_devices, rate)


def compile_step(built: Built, reading: Reading, mesh: Mesh) -> tuple[str, Step]:
    """Compile the step, and compare what it needs with what a device has.

    Raises:
        MemoryError: that is less.
    """
    since = time.monotonic()
    others = built.teacher, reading.first
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


def take_first_step(built: Built, step: Step) -> tuple[str, TrainState]:
    """Take the first step of the training, and say what its loss is made of.

    Raises:
        FloatingPointError: a term of its loss or its gradient is not finite.
    """
    weights = {
        name: float(w(built.state.step)) if callable(w) else w for name, w in built.recipe.weights.items()
    }
    state, measured = step.program(built.state, *step.others)
    metrics = {name: float(value) for name, value in measured.items()}
    loss, norm = metrics["loss"], metrics["gradient_norm"]
    lines = [f"{loss:.4g}, gradient norm {norm:.4g}"]
    for name, weight in weights.items():
        value = weight * metrics[name]
        share = value / loss if loss else 0.0  # of schedules that begin with 0 there may be nothing
        lines.append(f"{weight:g}·{name} = {weight:g} · {metrics[name]:.4g}, {share:.1%} of the loss")
    finding = "\n".join(lines)
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f"not finite: {', '.join(wrong)}; look at the networks and the first images, "
            f"or compute in float32\n{finding}"
        )
    return finding, state


def time_steps(
    config: ConfigDict, data: Pipeline, reading: Reading, step: Step, state: TrainState
) -> tuple[str, None]:
    """Take further steps on the same batch, and reckon from them how long the training takes."""
    since = time.monotonic()
    for _ in range(_STEPS):
        state, metrics = step.program(state, *step.others)
    jax.block_until_ready((state, metrics))
    seconds, to_read = (time.monotonic() - since) / _STEPS, config.batch_size / reading.rate
    total = config.epochs * data.steps_per_epoch
    pace = "reading keeps up" if to_read <= seconds else "reading is slower and sets the pace"
    return (
        f"{1000 * seconds:,.0f} ms a step, {config.batch_size / seconds:,.0f} images/s, {pace}: "
        f"{total:,} steps in about {duration(total * max(seconds, to_read))}, without evaluations"
    ), None
