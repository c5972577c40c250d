"""The training step: both forward passes, the weighted losses, the gradient, the update, the measurements.

Nothing here reads or writes files, and nothing here knows of configs, epochs or devices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from tat_jax.losses import cross_entropy, kd_weights, kl_divergence
from tat_jax.tat import TargetAwareTransformer

# torchvision's statistics of ImageNet, in units of the full range of a pixel.
MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 1, 1, 3)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 1, 1, 3)

Taps = dict[str, Float[Array, "batch height width channels"]]
Metrics = dict[str, Float[Array, ""]]


class Batch(NamedTuple):
    """Images, their labels, and which rows count: padding and unreadable files do not."""

    image: UInt8[Array, "batch height width 3"] | Float[Array, "batch height width 3"]
    label: Int[Array, " batch"]
    where: Bool[Array, " batch"]


class TatWeight(NamedTuple):
    """The weight of the TaT loss on one tap, and the options of its `TargetAwareTransformer`."""

    weight: float
    heads: int = 1
    embedding_kernel: int = 3
    trainable_key: bool = False
    per_teacher_position: bool = False


class LossWeights(NamedTuple):
    """What the loss is made of: kd_loss(α, β, T) + Σ_tap weight · tat_loss(tap). Weight 0 is no term."""

    alpha: float
    beta: float | None
    temperature: float
    tat: dict[str, TatWeight]

    def of_logits(self) -> dict[str, float]:
        """Return the weights of the terms on logits that are not 0."""
        weights = zip(
            ("cross_entropy", "kl"), kd_weights(self.alpha, self.beta, self.temperature), strict=True
        )
        return {name: weight for name, weight in weights if weight}

    def of_taps(self) -> dict[str, TatWeight]:
        """Return the TaT terms whose weight is not 0."""
        return {tap: tat for tap, tat in self.tat.items() if tat.weight}

    def need_teacher(self) -> bool:
        """Return whether any term compares with the teacher."""
        return "kl" in self.of_logits() or bool(self.of_taps())


class Distillation(nnx.Module):
    """Everything that is trained: the student, and the embeddings of each tap's TaT loss."""

    def __init__(self, student: nnx.Module, tat: dict[str, TargetAwareTransformer]):
        self.student = student
        self.tat = nnx.Dict(tat)


class Task(NamedTuple):
    """What a training step is made of, all of it static.

    Attributes:
        distillation: the structure of what is trained.
        teacher: the structure of the teacher; None where no term needs one.
        teacher_has_head: whether the teacher's logits mean anything.
        weights: the terms of the loss.
        optimizer: what turns gradients into updates.
        learning_rate: its rate by step, to be reported.
        leave_out_not_finite: whether a step whose loss or gradient is not finite changes nothing.
    """

    distillation: nnx.GraphDef
    teacher: nnx.GraphDef | None
    teacher_has_head: bool
    weights: LossWeights
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    leave_out_not_finite: bool = False


class TrainState(NamedTuple):
    """What changes from step to step.

    Attributes:
        step: batches taken so far.
        params: parameters of the `Distillation`.
        batch_stats: its running statistics.
        opt_state: the optimiser's moments.
    """

    step: Int[Array, ""]
    params: nnx.State
    batch_stats: nnx.State
    opt_state: Any


def init_state(distillation: Distillation, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step."""
    params, batch_stats = nnx.state(distillation, nnx.Param, nnx.BatchStat)
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def forward(model: nnx.Module, images: Array, **kwargs: Any) -> tuple[Array, Taps]:
    """Return the logits of `images` and the feature maps the model sows, without changing its structure."""
    logits, sown = nnx.capture(model, nnx.Intermediate)(images, **kwargs)
    return logits, {".".join(map(str, path)): leaf.get_value()[0] for path, leaf in nnx.to_flat_state(sown)}


def normalize(images: Array) -> Array:
    """Return uint8 pixels as (x / 255 − mean) / std; images in floating point are normalised already."""
    return (images / np.float32(255) - MEAN) / STD if images.dtype == jnp.uint8 else images


def loss_terms(
    weights: LossWeights,
    distillation: Distillation,
    batch: Batch,
    logits: Array,
    taps: Taps,
    teacher_logits: Array | None,
    teacher_taps: Taps,
) -> dict[str, tuple[float, Array]]:
    """Return every term of the loss by name, as (weight, value)."""
    terms = {}
    for name, weight in weights.of_logits().items():
        if name == "cross_entropy":
            value = cross_entropy(logits, batch.label, where=batch.where)
        else:
            assert teacher_logits is not None
            value = kl_divergence(logits, teacher_logits, temperature=weights.temperature, where=batch.where)
        terms[name] = weight, value
    for tap, tat in weights.of_taps().items():
        value = distillation.tat[tap](taps[tap], teacher_taps[tap], train=True, where=batch.where)
        terms[f"tat_{tap}"] = tat.weight, value
    return terms


def train_step(
    task: Task, state: TrainState, teacher: nnx.State | None, batch: Batch
) -> tuple[TrainState, Metrics]:
    """Take one optimiser step on the weighted sum of the loss terms.

    loss = α·CE + β·T²·KL(teacher ‖ student) + Σ_tap weight · TaT(tap); the student and the embeddings are
    trained, the teacher runs in evaluation mode and gets no gradient.

    Returns:
        The next state and the measurements of this batch, before the update.
    """
    images = normalize(batch.image)
    teacher_logits: Array | None = None
    teacher_taps: Taps = {}
    if task.teacher is not None:
        teacher_logits, teacher_taps = jax.lax.stop_gradient(
            forward(nnx.merge(task.teacher, teacher), images)
        )

    def loss_fn(params: nnx.State):
        model = nnx.merge(task.distillation, params, state.batch_stats, copy=True)
        logits, taps = forward(model.student, images, train=True, where=batch.where)
        terms = loss_terms(task.weights, model, batch, logits, taps, teacher_logits, teacher_taps)
        loss = sum(weight * value for weight, value in terms.values())
        values = {name: value for name, (_, value) in terms.items()}
        return loss, (values, logits, nnx.state(model, nnx.BatchStat))

    (loss, (values, logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    metrics = {"loss": loss, **values, "gradient_norm": optax.tree.norm(grads)}
    metrics["learning_rate"] = jnp.asarray(task.learning_rate(state.step))
    prediction = logits.argmax(-1)
    metrics["train_top1"] = jnp.mean(prediction == batch.label, where=batch.where)
    if teacher_logits is not None and task.teacher_has_head:
        metrics["teacher_agreement"] = jnp.mean(prediction == teacher_logits.argmax(-1), where=batch.where)
    after = TrainState(state.step + 1, params, batch_stats, opt_state)
    if task.leave_out_not_finite:
        finite = jnp.isfinite(loss) & jnp.isfinite(metrics["gradient_norm"])
        unchanged = state._replace(step=after.step)
        after = jax.tree.map(functools.partial(jnp.where, finite), after, unchanged)
    return after, metrics


def eval_step(graph: nnx.GraphDef, network: nnx.State, batch: Batch) -> dict[str, Int[Array, ""]]:
    """Count the images of a batch and those whose label is among the first one and five predictions.

    Of equal logits the lower class comes first, as in a stable sort; a logit that is no number counts as
    wrong.
    """
    logits, _ = forward(nnx.merge(graph, network), normalize(batch.image))
    of_label = jnp.take_along_axis(logits, batch.label[:, None], axis=1)
    tied_after = (logits == of_label) & (jnp.arange(logits.shape[1])[None] >= batch.label[:, None])
    rank = jnp.sum(~(logits < of_label) & ~tied_after, axis=1)
    return {
        "count": jnp.sum(batch.where),
        "top1": jnp.sum((rank < 1) & batch.where),
        "top5": jnp.sum((rank < 5) & batch.where),
    }
