"""The training step as the devices of a mesh run it."""

import jax
from flax import nnx
from jax.sharding import Mesh

from tat_jax import distill, sharding
from tat_jax.batch import Batch
from tat_jax.distill import Metrics, Recipe, TrainState

# On a CPU, XLA's YNNPACK convolutions take a third more time for a step than its others; its reductions less.
CPU_OPTIONS: dict[str, str | bool] = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


def jit_train_step(recipe: Recipe, mesh: Mesh) -> jax.stages.Wrapped:
    """Return the step of a recipe, compiled for the devices of a mesh; the state passed to it is donated."""
    whole = sharding.replicated(mesh)

    def train_step(state: TrainState, teacher: nnx.State | None, batch: Batch) -> tuple[TrainState, Metrics]:
        return distill.train_step(recipe, state, sharding.gathered(teacher, mesh), batch)

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(whole, whole),
        compiler_options=CPU_OPTIONS if mesh.devices.flat[0].platform == "cpu" else None,
    )
