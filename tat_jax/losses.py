"""Losses on logits: cross-entropy and Hinton's knowledge distillation.

Logits are `[batch, classes]`, labels `[batch]`. Every loss is a mean over the batch, computed in float32 at
least; `where` names the images that count.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    *,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Return the mean of −log softmax(logits)[label], in nats.

    Raises:
        ValueError: logits and labels do not have one row per image each.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits [batch, classes] and labels [batch] do not match: {logits.shape} and {labels.shape}"
        )
    log_p = _log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0], where=where)


def kl_divergence(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    *,
    temperature: float = 1.0,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Return KL(teacher ‖ student) of the softened predictions, summed over classes, in nats.

    Σ_c p_c (log p_c − log q_c) with p = softmax(teacher / T) and q = softmax(student / T); without the
    factor T² of Hinton et al.

    Raises:
        ValueError: the two do not have the same shape.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher logits do not have one shape [batch, classes]: "
            f"{student_logits.shape} and {teacher_logits.shape}"
        )
    log_p = _log_softmax(teacher_logits, temperature)
    log_q = _log_softmax(student_logits, temperature)
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1), where=where)


def kd_weights(alpha: float, beta: float | None, temperature: float) -> tuple[float, float]:
    """Return the weights of cross-entropy and of the KL divergence in `kd_loss`.

    (α, β·T²), where β is 1 − α if None. The published code (torchdistill's KDLoss) returns the bare KL
    divergence when α is 0, so the weights are then (0, 1).
    """
    if alpha == 0:
        return 0.0, 1.0
    return alpha, (1 - alpha if beta is None else beta) * temperature**2


def kd_loss(
    student_logits: Float[Array, "batch classes"],
    teacher_logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    *,
    temperature: float,
    alpha: float,
    beta: float | None = None,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Return α·CE(student, labels) + β·T²·KL(teacher ‖ student).

    Distilling the Knowledge in a Neural Network, Hinton et al., 2015, weighted as in the published code of
    TaT: see `kd_weights` for the meaning of β = None and α = 0.

    Raises:
        ValueError: shapes do not match.
    """
    ce_weight, kl_weight = kd_weights(alpha, beta, temperature)
    ce = cross_entropy(student_logits, labels, where=where)
    kl = kl_divergence(student_logits, teacher_logits, temperature=temperature, where=where)
    return ce_weight * ce + kl_weight * kl


def _log_softmax(logits: Array, temperature: float = 1.0) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature)
