"""Losses between the logits of student and teacher: Hinton's knowledge distillation.

Logits are `[batch, classes]`, or `[batch, height, width, classes]` of pixels, over which the mean of an image
goes: all of them, as the teacher has something to say of those that nobody labelled, too. Computed in float32
at least. `where` names the images that count.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float, Int

from tat_jax.batch import Batch, Where
from tat_jax.fields import POSITIVE, YES_OR_NO, Field
from tat_jax.losses.labels import cross_entropy
from tat_jax.losses.loss import Loss, logits_of
from tat_jax.networks.layers import at_least_float32
from tat_jax.networks.view import Outputs

STANDARDIZE = Field(False, YES_OR_NO, "standardise each image's logits first", may_change=True, optional=True)
_LOWEST = -1e30  # of a logit that no softmax sees; finite, as infinity less infinity is no number


def softened(
    logits: Float[Array | np.ndarray, "batch classes"], temperature: float
) -> Float[Array, "batch classes"]:
    """Return logits divided by the temperature, in float32 at least.

    Raises:
        ValueError: they are not `[batch, classes]`.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits are [batch, classes], and these are {list(logits.shape)}")
    return jnp.asarray(logits).astype(at_least_float32(logits.dtype)) / temperature


def check_logits(
    student: Array | np.ndarray, teacher: Array | np.ndarray, labels: Array | np.ndarray | None = None
) -> None:
    """Check that the logits of both networks are of the same images and classes, and labels of these images.

    Raises:
        ValueError: they are not.
    """
    fit = student.ndim == 2 and student.shape == teacher.shape
    if fit and (labels is None or labels.shape == student.shape[:1]):
        return
    and_labels = "" if labels is None else f", with labels [batch] {labels.shape}"
    raise ValueError(
        "student and teacher logits do not have one shape [batch, classes]: "
        f"{student.shape} and {teacher.shape}{and_labels}"
    )


def without_label(
    logits: Float[Array, "batch classes"], labels: Int[Array | np.ndarray, " batch"]
) -> Float[Array, "batch classes"]:
    """Return logits of which a softmax does not see the label's."""
    is_label = jnp.asarray(labels)[:, None] == jnp.arange(logits.shape[1])[None]
    return jnp.where(is_label, _LOWEST, logits)


def logit_standardization(
    logits: Float[Array | np.ndarray, "batch classes"],
) -> Float[Array, "batch classes"]:
    """Return (z − E[z]) / (1e-7 + std(z)) of each image's logits, in float32 at least.

    Logit Standardization in Knowledge Distillation, Sun et al., CVPR 2024. The deviation divides by the
    classes less one, as in its code; the paper divides by the classes. Of equal logits it is 0.
    """
    centred = softened(logits, 1.0)
    centred -= jnp.mean(centred, axis=-1, keepdims=True)
    variance = jnp.sum(centred**2, axis=-1, keepdims=True) / (logits.shape[-1] - 1)
    varies = variance > 0
    return jnp.where(varies, centred / (1e-7 + jnp.sqrt(jnp.where(varies, variance, 1))), 0)


def compared(student: Outputs, teacher: Outputs, *, standardize: bool) -> tuple[Array, Array]:
    """Return the logits of both networks, as they are or standardised."""
    ours, theirs = logits_of(student), logits_of(teacher)
    return (logit_standardization(ours), logit_standardization(theirs)) if standardize else (ours, theirs)


def kd(
    student_logits: Float[Array | np.ndarray, "batch *pixels classes"],
    teacher_logits: Float[Array | np.ndarray, "batch *pixels classes"],
    *,
    temperature: float = 4.0,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return T²·KL(teacher ‖ student) of the softened predictions, a mean over images.

    Distilling the Knowledge in a Neural Network, Hinton et al., 2015; published for CIFAR-100 with T = 4 as
    0.1·CE + 0.9·KD, for ImageNet with T = 1 as 0.5·CE + 0.5·KD (RepDistiller, mdistiller).

    Raises:
        ValueError: the two do not have the same shape.
    """
    divergence = kl_divergence(student_logits, teacher_logits, temperature=temperature, where=where)
    return temperature**2 * divergence


def kl_divergence(
    student_logits: Float[Array | np.ndarray, "batch *pixels classes"],
    teacher_logits: Float[Array | np.ndarray, "batch *pixels classes"],
    *,
    temperature: float = 1.0,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return KL(teacher ‖ student) of the softened predictions, summed over classes, in nats.

    Σ_c p_c (log p_c − log q_c) with p = softmax(teacher / T) and q = softmax(student / T); without the
    factor T² of Hinton et al.

    Raises:
        ValueError: the two do not have the same shape.
    """
    divergences = kl_divergences(student_logits, teacher_logits, temperature=temperature)
    return jnp.mean(divergences, where=where)


def kl_divergences(
    student_logits: Float[Array | np.ndarray, "batch *pixels classes"],
    teacher_logits: Float[Array | np.ndarray, "batch *pixels classes"],
    *,
    temperature: float = 1.0,
) -> Float[Array, " batch"]:
    """Return KL(teacher ‖ student) of each image, as in `kl_divergence`."""
    if student_logits.ndim not in (2, 4) or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student and teacher logits do not have one shape [batch, (height, width,) classes]: "
            f"{student_logits.shape} and {teacher_logits.shape}"
        )
    log_p, log_q = (
        nnx.log_softmax(jnp.asarray(logits).astype(at_least_float32(logits.dtype)) / temperature)
        for logits in (teacher_logits, student_logits)
    )
    divergences = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return reduce(divergences, "b ... -> b", "mean")


def kd_weights(alpha: float, beta: float | None, temperature: float) -> tuple[float, float]:
    """Return the weights of cross-entropy and of the KL divergence in `kd_loss`.

    (α, β·T²), where β is 1 − α if None. The published code (torchdistill's KDLoss) returns the bare KL
    divergence when α is 0, so the weights are then (0, 1).
    """
    if alpha == 0:
        return 0.0, 1.0
    return alpha, (1 - alpha if beta is None else beta) * temperature**2


def kd_loss(
    student_logits: Float[Array | np.ndarray, "batch classes"],
    teacher_logits: Float[Array | np.ndarray, "batch classes"],
    labels: Int[Array | np.ndarray, " batch"],
    *,
    temperature: float,
    alpha: float,
    beta: float | None = None,
    where: Where | None = None,
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


class KD(Loss):
    """T²·KL(teacher ‖ student), so that its weight is Hinton's β."""

    name: ClassVar[str] = "kd"
    options: ClassVar[Mapping[str, Field]] = {
        "temperature": Field(1.0, POSITIVE, "T, by which logits are divided", may_change=True, optional=True),
        "standardize": STANDARDIZE,
    }
    needs_logits: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 1.0, standardize: bool = False):
        self.temperature = temperature
        self.standardize = standardize

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return T²·KL(teacher ‖ student) of each image, the mean over its pixels where logits are maps."""
        logits = compared(student, teacher, standardize=self.standardize)
        return self.temperature**2 * kl_divergences(*logits, temperature=self.temperature)
