"""This package's training step as a compiled program: what it takes and what its devices send."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.build import build
from tat_jax.compiled import collectives
from tat_jax.distill import TrainState
from tat_jax.step import jit_train_step
from tat_jax.together import jit_train_steps

Arrays = Counter[tuple[int, ...]]  # how many there are of each shape


class CompiledStep(NamedTuple):
    """A program with what it is called with: `program(state, *others)`.

    Attributes:
        program: as it was compiled.
        state: before the first step.
        others: the teacher and a batch, or one for each seed.
    """

    program: Any
    state: TrainState
    others: tuple[Any, Batch | list[Batch]]

    def repeated(self, steps: int = 1) -> Callable[[], None]:
        """Return a function that takes so many further steps on the same batch, and waits for the last."""
        state = jax.tree.map(jnp.copy, self.state)  # which is donated

        def call() -> None:
            nonlocal state
            for _ in range(steps):
                state, metrics = self.program(state, *self.others)
            jax.block_until_ready(metrics)

        return call

    def sent(self) -> tuple[int, Arrays]:
        """Return how many collective operations it has, and the arrays that they carry."""
        operations, arrays = 0, Counter[tuple[int, ...]]()
        for collective in collectives(self.program.as_text()):
            operations += 1
            arrays.update(key(array.shape) for array in collective.arrays)
        return operations, arrays

    def bytes_sent(self) -> tuple[int, int]:
        """Return how many collective operations it has, and the bytes of the float32 arrays they carry."""
        operations, arrays = self.sent()
        return operations, float32_bytes(arrays)


def compile_step(
    config: ConfigDict,
    rows: Batch,
    *,
    devices: int = 1,
    num_classes: int = 10,
    images: int | None = None,
    options: dict[str, Any] | None = None,
    seeds: int | None = None,
) -> CompiledStep:
    """Compile the step of a config, on a batch of such rows, for the first so many devices.

    `images` are those of a training set, where a loss remembers them; `options` are XLA's, besides those of
    training. With `seeds`, it is the step of so many trainings at once, each on such a batch.
    """
    mesh = sharding.make_mesh(jax.devices()[:devices])
    built = build(
        config,
        mesh,
        num_classes=num_classes,
        steps_per_epoch=1,
        labels=None if images is None else lambda: np.arange(images) % num_classes,
    )
    batch = sharding.put_batch(rows, mesh)
    if seeds is None:
        step, state, others = jit_train_step(built.recipe, mesh), built.state, (built.teacher, batch)
    else:
        step, others = jit_train_steps(built.recipe, mesh), (built.teacher, [batch] * seeds)
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), built.state)
    return CompiledStep(step.lower(state, *others).compile(options), state, others)


def blank_rows(config: ConfigDict) -> Batch:
    """Return a batch of black images of class 0."""
    size = config.data.image_size
    maps = np.zeros((config.batch_size, size, size), np.uint8)
    return Batch(
        image=np.zeros((*maps.shape, 3), np.uint8),
        label=maps if config.task == "segmentation" else np.zeros(config.batch_size, np.int32),
        where=np.ones(config.batch_size, bool),
    )


def key(shape: Iterable[int]) -> tuple[int, ...]:
    """Return a shape without its ones, in an order of its own: the compiler transposes and reshapes."""
    return tuple(sorted(size for size in shape if size > 1))


def float32_bytes(arrays: Arrays) -> int:
    """Return the bytes of arrays in float32."""
    return sum(4 * math.prod(shape) * count for shape, count in arrays.items())
