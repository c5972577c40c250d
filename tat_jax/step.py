"""The training step as the devices of a mesh run it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
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
    return _jit(_train_step_on(recipe, mesh), mesh)


@dataclass(frozen=True)
class FlatState:
    """A state as the list of its arrays; a call makes it.

    Of 3.4 ms that a step of small networks takes on a GPU, Python takes 0.7 to take Flax's variables apart
    and to make them. So they are made only where they are asked for.

    Attributes:
        arrays: of the state.
        structure: what they make.
    """

    arrays: list[jax.Array]
    structure: Any

    def __call__(self) -> TrainState:
        return jax.tree.unflatten(self.structure, self.arrays)


def flatten_state(state: TrainState) -> FlatState:
    """Return a state as the list of its arrays."""
    return FlatState(*jax.tree.flatten(state))


class TrainStep:
    """The step of a recipe under a teacher, compiled once, for the first batch that it is called with.

    Attributes:
        memory: bytes of its arguments and its temporaries on a device; None before the first batch.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, teacher: nnx.State | None):
        self._train_step, self._mesh = _train_step_on(recipe, mesh), mesh
        self._teacher, self._of_teacher = jax.tree.flatten(teacher)
        self._program: Any = None
        self.memory: int | None = None

    def __call__(self, state: FlatState, batch: Batch) -> tuple[FlatState, Metrics]:
        if self._program is None:
            self._program = self._jit(state.structure).lower(state.arrays, self._teacher, batch).compile()
            sizes = self._program.memory_analysis()
            self.memory = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
        arrays, metrics = self._program(state.arrays, self._teacher, batch)
        return FlatState(arrays, state.structure), metrics

    def _jit(self, of_state: Any) -> jax.stages.Wrapped:
        def step(arrays: list[Any], teacher: list[Any], batch: Batch) -> tuple[list[Any], Metrics]:
            state = jax.tree.unflatten(of_state, arrays)
            after, metrics = self._train_step(state, jax.tree.unflatten(self._of_teacher, teacher), batch)
            return jax.tree.leaves(after), metrics

        return _jit(step, self._mesh)


def _train_step_on(recipe: Recipe, mesh: Mesh) -> Callable[..., tuple[TrainState, Metrics]]:
    def train_step(state: TrainState, teacher: nnx.State | None, batch: Batch) -> tuple[TrainState, Metrics]:
        after, metrics = distill.train_step(recipe, state, sharding.gathered(teacher, mesh), batch)
        return jax.lax.with_sharding_constraint(after, places_of(after, mesh)), metrics

    return train_step


def _jit(train_step: Callable[..., Any], mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(None, sharding.replicated(mesh)),  # None: as the step constrains them
        compiler_options=options_for(mesh),
    )
