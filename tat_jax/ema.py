"""The exponential moving average (EMA) of a student, which is often better than the student itself."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx


def student_of(params: nnx.State, variables: nnx.State) -> nnx.State:
    """Return of what is trained the student: its parameters and running statistics."""

    def is_students(path: tuple[Any, ...], leaf: Any) -> bool:
        return path[0] == "student" and isinstance(leaf, nnx.Param | nnx.BatchStat)

    return nnx.filter_state(nnx.merge_state(params, variables), is_students)


def follow(decay: float, ema: nnx.State, student: nnx.State, opt_state: Any) -> nnx.State:
    """Return decay · ema + (1 − decay) · student, of running statistics, too; what is whole is the student's.

    As timm's ModelEmaV2, which begins as the student and counts updates: batches of which several make one
    (`optimizer.accumulate`) leave it as it is until the last of them.
    """

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.floating):
            return new
        return decay * old + (1 - decay) * new

    followed = jax.tree.map(average, ema, student)
    waiting = optax.tree.get(opt_state, "mini_step")  # of optax.MultiSteps: batches since the last update
    if waiting is None:
        return followed
    return jax.tree.map(lambda new, old: jnp.where(waiting == 0, new, old), followed, ema)
