"""DIST: predictions need to be correlated with the teacher's, image by image and class by class.

Knowledge Distillation from A Stronger Teacher, Huang et al., NeurIPS 2022, as its code has it.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import POSITIVE, Field
from tat_jax.losses.adapt import counted
from tat_jax.losses.logits import check_logits, softened
from tat_jax.losses.loss import Loss, logits_of
from tat_jax.networks.view import Outputs

_EPSILON = 1e-8


def dist(
    student_logits: Float[Array | np.ndarray, "batch classes"],
    teacher_logits: Float[Array | np.ndarray, "batch classes"],
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return τ²·(β (1 − mean_i ρ(s_i, t_i)) + γ (1 − mean_k ρ(s_·k, t_·k))) of the softened predictions.

    ρ is Pearson's correlation, over classes for each image i and over the images of the batch for each
    class k. The paper has no factor τ².

    Args:
        student_logits: of each image.
        teacher_logits: likewise.
        beta: of the correlation within images.
        gamma: of that between images.
        temperature: τ; published for CIFAR-100: 4, for ImageNet: 1.
        where: the images that count; None is all.

    Raises:
        ValueError: the shapes do not match.
    """
    check_logits(student_logits, teacher_logits)
    student, teacher = (
        jax.nn.softmax(softened(logits, temperature)) for logits in (student_logits, teacher_logits)
    )
    counts = counted(where, student, teacher)
    everything = jnp.ones(student.shape[1:], bool)
    within = jnp.mean(_correlations(student, teacher, everything), where=counts)
    between = jnp.mean(_correlations(student.T, teacher.T, counts))
    return temperature**2 * (beta * (1 - within) + gamma * (1 - between))


def _correlations(
    a: Float[Array, "rows samples"], b: Float[Array, "rows samples"], counts: Array
) -> Float[Array, " rows"]:
    """Return Pearson's correlation of each row over the samples that count."""
    counts = counts[None]
    a, b = (jnp.where(counts, x - jnp.mean(x, -1, keepdims=True, where=counts), 0) for x in (a, b))
    square_a, square_b = (jnp.sum(x**2, -1) for x in (a, b))
    varies = (square_a > 0) & (square_b > 0)  # of a constant, the root has no gradient
    # Root by root: of a class that is improbable in every image, the product of the squares is 0 in float32.
    norm_a, norm_b = (jnp.sqrt(jnp.where(varies, square, 1)) for square in (square_a, square_b))
    return jnp.where(varies, jnp.sum(a * b, -1) / (norm_a * norm_b + _EPSILON), 0)


class DIST(Loss):
    """DIST; its published weight is 2, beside cross-entropy."""

    name: ClassVar[str] = "dist"
    options: ClassVar[Mapping[str, Field]] = {
        "beta": Field(1.0, POSITIVE, "of the correlation within images", may_change=True, optional=True),
        "gamma": Field(1.0, POSITIVE, "of that between images", may_change=True, optional=True),
        "temperature": Field(4.0, POSITIVE, "by which logits are divided", may_change=True, optional=True),
    }
    needs_logits: ClassVar[bool] = True

    def __init__(self, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 4.0):
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool) -> Float[Array, ""]:
        """Return DIST of the batch."""
        return dist(
            logits_of(student),
            logits_of(teacher),
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            where=batch.where,
        )
