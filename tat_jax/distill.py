"""The training step: both forward passes, the weighted losses, the gradient, the update, the measurements.

Nothing here reads or writes files, and nothing here knows of configs, epochs or devices.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from tat_jax import ema
from tat_jax.batch import Batch, Where
from tat_jax.losses.loss import Loss
from tat_jax.mixing import Mixing, mix
from tat_jax.networks.view import Outputs, View
from tat_jax.tasks.task import Task

Metrics = dict[str, Float[Array, ""]]


class Distillation(nnx.Module):
    """Everything that is trained: the student, and what the losses hold, by the names of their terms."""

    def __init__(self, student: View, losses: Mapping[str, Loss]):
        self.student = student
        self.losses = nnx.Dict(losses)


class Recipe(NamedTuple):
    """What a training step is made of, all of it static.

    Attributes:
        distillation: the structure of what is trained.
        teacher: the structure of the teacher's view; None where no term of the loss reads it.
        teacher_has_head: whether the teacher's logits mean anything.
        weights: of each term of the loss, a number or a function of the step.
        task: what is measured.
        optimizer: what turns gradients into updates.
        learning_rate: its rate by step, to be reported.
        leave_out_not_finite: whether a step whose loss or gradient is not finite changes nothing.
        teacher_in_training: whether the teacher takes the batch's statistics and drops out, as in training.
        mixing: how images are mixed before both networks see them; None leaves them as they are.
        ema_decay: of the moving average of the student that is kept beside it; None keeps none.
    """

    distillation: nnx.GraphDef
    teacher: nnx.GraphDef | None
    teacher_has_head: bool
    weights: Mapping[str, float | Callable[[Array], Array]]
    task: Task
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    leave_out_not_finite: bool = False
    teacher_in_training: bool = False
    mixing: Mixing | None = None
    ema_decay: float | None = None


class TrainState(NamedTuple):
    """What changes from step to step.

    Attributes:
        step: batches taken so far.
        params: parameters of the `Distillation`.
        variables: all else that it holds: running statistics, memories, random streams.
        opt_state: the optimiser's moments.
        ema: the moving average of the student's parameters and running statistics; None where none is kept.
    """

    step: Int[Array, ""]
    params: nnx.State
    variables: nnx.State
    opt_state: Any
    ema: nnx.State | None = None


def init_state(
    distillation: Distillation, optimizer: optax.GradientTransformation, *, with_ema: bool = False
) -> TrainState:
    """Return the state before the first step, in which the moving average, if any, is the student."""
    params, variables = nnx.state(distillation, nnx.Param, ...)
    # In memory of its own: a step takes that of the state that it is given, each array's once.
    average = jax.tree.map(jnp.copy, ema.student_of(params, variables)) if with_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, variables, optimizer.init(params), average)


def student_views(recipe: Recipe, state: TrainState) -> dict[str, tuple[nnx.GraphDef, nnx.State]]:
    """Return the structure and the arrays of the student's view; beside it as `ema` those of its average."""

    def view(average: nnx.State | None) -> tuple[nnx.GraphDef, nnx.State]:
        model = nnx.merge(recipe.distillation, state.params, state.variables, copy=True)
        if average is not None:
            nnx.update(model, average)
        return nnx.split(model.student)

    return {"": view(None)} | ({} if state.ema is None else {"ema": view(state.ema)})


def train_step(
    recipe: Recipe, state: TrainState, teacher: nnx.State | None, batch: Batch
) -> tuple[TrainState, Metrics]:
    """Take one optimiser step on the weighted sum of the losses.

    total = Σ weight · loss; the student and what the losses hold are trained. The teacher gets no
    gradient and stays as it is, whichever mode it runs in.

    Returns:
        The next state and the measurements of this batch, before the update.
    """
    if recipe.mixing:
        batch = mix(recipe.mixing, state.step, batch)
    told = jax.lax.stop_gradient(_teach(recipe, state.step, teacher, batch))
    weights = {name: w(state.step) if callable(w) else w for name, w in recipe.weights.items()}

    def loss_fn(params: nnx.State):
        model = nnx.merge(recipe.distillation, params, state.variables, copy=True)
        outputs = model.student(batch.image, train=True, where=batch.where)
        values = {
            name: _mean(model.losses[name](outputs, told, batch, train=True), batch.where) for name in weights
        }
        total = sum(weight * values[name] for name, weight in weights.items())
        return total, (values, outputs, nnx.state(model, nnx.Not(nnx.Param)))

    (loss, (values, outputs, variables)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    metrics = {"loss": loss, **values, "gradient_norm": optax.tree.norm(grads)}
    metrics["learning_rate"] = jnp.asarray(recipe.learning_rate(state.step))
    metrics |= {f"{name}_weight": weights[name] for name, w in recipe.weights.items() if callable(w)}
    metrics |= recipe.task.measure(outputs, batch, told if recipe.teacher_has_head else None)
    average = state.ema
    if recipe.ema_decay is not None and average is not None:
        average = ema.follow(recipe.ema_decay, average, ema.student_of(params, variables), opt_state)
    after = TrainState(state.step + 1, params, variables, opt_state, average)
    if recipe.leave_out_not_finite:
        finite = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
        unchanged = state._replace(step=after.step)
        after = jax.tree.map(functools.partial(jnp.where, finite), after, unchanged)
    return after, metrics


def _teach(recipe: Recipe, step: Array, teacher: nnx.State | None, batch: Batch) -> Outputs:
    """Return what the teacher says of a batch; nothing where there is none."""
    if recipe.teacher is None:
        return Outputs(None, {})
    view = nnx.merge(recipe.teacher, teacher, copy=True)
    if not recipe.teacher_in_training:
        return view(batch.image)
    for _, key in nnx.iter_graph(view):
        if isinstance(key, nnx.RngKey):
            key.set_value(jax.random.fold_in(key.get_value(), step))  # of each step its own masks
    return view(batch.image, train=True, where=batch.where)  # whose new statistics vanish with the copy


def _mean(value: Array, where: Where) -> Float[Array, ""]:
    """Return the mean over the images that count, unless the loss is one number already."""
    # An integer count, for which devices need no reduction more; that of jnp.mean is one for each term.
    return jnp.sum(value, where=where) / jnp.sum(where).astype(value.dtype) if value.ndim else value
