"""Normalised knowledge distillation (NKD): cross-entropies of the label, and of all other classes.

From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
Customized Soft Labels, Yang et al., ICCV 2023, as its code has it.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tat_jax.batch import Batch, Where
from tat_jax.fields import POSITIVE, Field
from tat_jax.losses.logits import check_logits, softened, without_label
from tat_jax.losses.loss import Loss, labels_of, logits_of
from tat_jax.networks.view import Outputs


def nkd(
    student_logits: Float[Array | np.ndarray, "batch classes"],
    teacher_logits: Float[Array | np.ndarray, "batch classes"],
    labels: Int[Array | np.ndarray, " batch"],
    *,
    gamma: float = 3.5,
    temperature: float = 3.0,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return −p_t(y) log p_s(y) − γ·T² Σ_{k≠y} p̂_t(k) log p̂_s(k), a mean over images.

    p are predictions at temperature 1, p̂ those among all classes but the label y at T.

    Args:
        student_logits: of each image.
        teacher_logits: likewise.
        labels: of each image.
        gamma: of the other classes' part; published for CIFAR-100: 3.5, for ImageNet: 1.5.
        temperature: T; published for CIFAR-100: 3, for ImageNet: 1.
        where: the images that count; None is all.

    Raises:
        ValueError: the shapes do not match.
    """
    return jnp.mean(_values(student_logits, teacher_logits, labels, gamma, temperature), where=where)


def _values(
    student_logits: Array | np.ndarray,
    teacher_logits: Array | np.ndarray,
    labels: Array | np.ndarray,
    gamma: float,
    temperature: float,
) -> Float[Array, " batch"]:
    check_logits(student_logits, teacher_logits, labels)
    rows = jnp.asarray(labels)[:, None]
    log_t, log_s = (jax.nn.log_softmax(softened(z, 1.0)) for z in (teacher_logits, student_logits))
    own_t, own_s = (jnp.take_along_axis(log_p, rows, axis=-1)[:, 0] for log_p in (log_t, log_s))
    others_t, others_s = (
        jax.nn.log_softmax(without_label(softened(z, temperature), labels))
        for z in (teacher_logits, student_logits)
    )
    # Of the label p̂_t is 0, and the logarithm of p̂_s as low as a number can be.
    of_others = -jnp.sum(jnp.exp(others_t) * others_s, axis=-1)
    return -jnp.exp(own_t) * own_s + gamma * temperature**2 * of_others


class NKD(Loss):
    """NKD; its published weight is 1, beside cross-entropy."""

    name: ClassVar[str] = "nkd"
    options: ClassVar[Mapping[str, Field]] = {
        "gamma": Field(3.5, POSITIVE, "of the other classes' part", may_change=True, optional=True),
        "temperature": Field(3.0, POSITIVE, "by which logits are divided", may_change=True, optional=True),
    }
    needs_logits: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def __init__(self, *, gamma: float = 3.5, temperature: float = 3.0):
        self.gamma, self.temperature = gamma, temperature

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return NKD of each image."""
        logits = logits_of(student), logits_of(teacher)
        return _values(*logits, labels_of(batch), self.gamma, self.temperature)
