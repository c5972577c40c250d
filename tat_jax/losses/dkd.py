"""Decoupled knowledge distillation (DKD): what is said of the label, and of all other classes.

Decoupled Knowledge Distillation, Zhao et al., CVPR 2022, as mdistiller's code has it.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tat_jax.batch import Batch, Where
from tat_jax.fields import POSITIVE, Field
from tat_jax.losses.logits import STANDARDIZE, check_logits, compared, softened, without_label
from tat_jax.losses.loss import Loss, labels_of
from tat_jax.networks.view import Outputs


def dkd(
    student_logits: Float[Array | np.ndarray, "batch classes"],
    teacher_logits: Float[Array | np.ndarray, "batch classes"],
    labels: Int[Array | np.ndarray, " batch"],
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return α·T²·KL(b_t ‖ b_s) + β·T²·KL(p̂_t ‖ p̂_s), a mean over images.

    b = (p_y, 1 − p_y) of the softened predictions for the label y, p̂ those among all other classes.

    Args:
        student_logits: of each image.
        teacher_logits: likewise.
        labels: of each image.
        alpha: of the label's part.
        beta: of the other classes' part; published for CIFAR-100: 8, 6 or 2 by the pair; for ImageNet 0.5.
        temperature: T; published for CIFAR-100: 4, for ImageNet: 1.
        where: the images that count; None is all.

    Raises:
        ValueError: the shapes do not match.
    """
    values = _values(student_logits, teacher_logits, labels, alpha, beta, temperature)
    return jnp.mean(values, where=where)


def _values(
    student_logits: Array | np.ndarray,
    teacher_logits: Array | np.ndarray,
    labels: Array | np.ndarray,
    alpha: float,
    beta: float,
    temperature: float,
) -> Float[Array, " batch"]:
    check_logits(student_logits, teacher_logits, labels)
    teacher, student = (softened(logits, temperature) for logits in (teacher_logits, student_logits))
    of_label = sum(
        jnp.exp(log_t) * (log_t - log_s)
        for log_t, log_s in zip(_binary(teacher, labels), _binary(student, labels), strict=True)
    )
    log_t, log_s = (jax.nn.log_softmax(without_label(logits, labels)) for logits in (teacher, student))
    of_others = jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
    return temperature**2 * (alpha * of_label + beta * of_others)


def _binary(
    logits: Float[Array, "batch classes"], labels: Array | np.ndarray
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Return log p and log (1 − p) of the labels."""
    total = jax.nn.logsumexp(logits, axis=-1)
    own = jnp.take_along_axis(logits, jnp.asarray(labels)[:, None], axis=-1)[:, 0]
    return own - total, jax.nn.logsumexp(without_label(logits, labels), axis=-1) - total


class DKD(Loss):
    """DKD; its published weight on CIFAR-100 is min(epoch / 20, 1), on ImageNet 1, beside cross-entropy."""

    name: ClassVar[str] = "dkd"
    options: ClassVar[Mapping[str, Field]] = {
        "alpha": Field(1.0, POSITIVE, "of the label's part", may_change=True, optional=True),
        "beta": Field(8.0, POSITIVE, "of the other classes' part", may_change=True, optional=True),
        "temperature": Field(4.0, POSITIVE, "by which logits are divided", may_change=True, optional=True),
        "standardize": STANDARDIZE,
    }
    needs_logits: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        standardize: bool = False,
    ):
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.standardize = standardize

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return DKD of each image."""
        logits = compared(student, teacher, standardize=self.standardize)
        return _values(*logits, labels_of(batch), self.alpha, self.beta, self.temperature)
