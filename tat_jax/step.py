"""The training step as the devices of a mesh run it."""

import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from tat_jax import distill, sharding
from tat_jax.batch import Batch
from tat_jax.distill import Metrics, Recipe, TrainState
from tat_jax.losses.loss import Rows

# On a CPU, XLA's YNNPACK convolutions take a third more time for a step than its others; its reductions less.
CPU_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def options_for(mesh: Mesh) -> dict[str, str | bool] | None:
    """Return what the compiler of a mesh is told of training steps."""
    return CPU_OPTIONS if mesh.devices.flat[0].platform == "cpu" else None


def places_of(state: TrainState, mesh: Mesh) -> TrainState:
    """Return where each array of a state lies: whole on every device, but for `Rows`, which are split."""

    def place(part: Any) -> Any:
        if isinstance(part, Rows):
            return jax.tree.map(functools.partial(sharding.split_rows, mesh=mesh), part)
        return sharding.everywhere(part, mesh)

    return jax.tree.map(place, state, is_leaf=lambda part: isinstance(part, nnx.Variable))


def jit_train_step(recipe: Recipe, mesh: Mesh) -> jax.stages.Wrapped:
    """Return the step of a recipe, compiled for the devices of a mesh; the state passed to it is donated."""

    def train_step(state: TrainState, teacher: nnx.State | None, batch: Batch) -> tuple[TrainState, Metrics]:
        after, metrics = distill.train_step(recipe, state, sharding.gathered(teacher, mesh), batch)
        return jax.lax.with_sharding_constraint(after, places_of(after, mesh)), metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(None, sharding.replicated(mesh)),  # None: as the step constrains them
        compiler_options=options_for(mesh),
    )


class TrainStep:
    """The step of a recipe, compiled once, for the first batch that it is called with.

    Attributes:
        memory: bytes of its arguments and its temporaries on a device; None before the first batch.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh):
        self._jitted = jit_train_step(recipe, mesh)
        self._program: Any = None
        self.memory: int | None = None

    def __call__(
        self, state: TrainState, teacher: nnx.State | None, batch: Batch
    ) -> tuple[TrainState, Metrics]:
        if self._program is None:
            self._program = self._jitted.lower(state, teacher, batch).compile()
            sizes = self._program.memory_analysis()
            self.memory = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        return self._program(state, teacher, batch)
