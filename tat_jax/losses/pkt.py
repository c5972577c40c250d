"""Probabilistic knowledge transfer (PKT): how likely an image has another one as its neighbour.

Learning Deep Representations with Probabilistic Knowledge Transfer, Passalis & Tefas, ECCV 2018, as
RepDistiller's code has it.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import Field
from tat_jax.losses.adapt import counted, vectors
from tat_jax.losses.loss import Loss, tap_of
from tat_jax.networks.view import Outputs

_EPSILON = 1e-7


def pkt(
    student: Float[Array | np.ndarray, "batch *positions features"],
    teacher: Float[Array | np.ndarray, "batch *places channels"],
    *,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean over all pairs of images of P_t log(P_t / P_s).

    P are cosines, moved to 0…1, each image's divided by their sum; 1e-7 is added to norms, and to both
    numbers of the quotient.

    Args:
        student: a vector for each image, or a map or tokens, whose mean it is.
        teacher: likewise.
        where: the images that count; None is all.
    """
    counts = counted(where, student, teacher)
    of_student, of_teacher = (_likelihoods(vectors(x), counts) for x in (student, teacher))
    values = of_teacher * jnp.log((of_teacher + _EPSILON) / (of_student + _EPSILON))
    return jnp.mean(values, where=counts[:, None] & counts[None])


def _likelihoods(x: Float[Array, "batch channels"], counts: Array) -> Float[Array, "batch batch"]:
    square = jnp.sum(x**2, -1, keepdims=True)
    points = square > 0  # of zeros, the norm has no gradient
    x = jnp.where(points, x / (jnp.sqrt(jnp.where(points, square, 1)) + _EPSILON), 0)
    shifted = (jnp.einsum("ic,jc->ij", x, x, precision="highest") + 1) / 2
    total = jnp.sum(shifted, -1, keepdims=True, where=counts[None])
    return shifted / jnp.where(counts[:, None], total, 1)


class PKT(Loss):
    """PKT of vectors, or of the means of maps; its published weight is 30,000, beside cross-entropy."""

    name: ClassVar[str] = "pkt"
    options: ClassVar[Mapping[str, Field]] = tap_of("pooled")

    def __init__(self, *, student_tap: str = "pooled", teacher_tap: str = "pooled"):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool) -> Float[Array, ""]:
        """Return PKT of the batch."""
        ours, theirs = student.taps[self.student_tap], teacher.taps[self.teacher_tap]
        return pkt(ours, theirs, where=batch.where)
