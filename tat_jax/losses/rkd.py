"""Relational knowledge distillation (RKD): distances and angles between images.

Relational Knowledge Distillation, Park et al., CVPR 2019, as RepDistiller's code has it.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import POSITIVE, Field
from tat_jax.losses.adapt import counted, unit_vectors, vectors
from tat_jax.losses.loss import Loss, tap_of
from tat_jax.networks.view import Outputs

_LEAST = 1e-12  # of a squared distance


def rkd(
    student: Float[Array | np.ndarray, "batch *positions features"],
    teacher: Float[Array | np.ndarray, "batch *places channels"],
    *,
    distance: float = 25.0,
    angle: float = 50.0,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return distance · mean_ij H(d_ij) + angle · mean_ijk H(cos_ijk), H the Huber loss of the difference.

    d_ij are distances of images, divided by the mean of the positive ones; cos_ijk the cosines at image i
    between images j and k. Both means go over all pairs and triples, those of an image with itself, too.

    Args:
        student: a vector for each image, or a map or tokens, whose mean it is.
        teacher: likewise.
        distance: weight of the distances.
        angle: weight of the angles.
        where: the images that count; None is all.
    """
    student, teacher = vectors(student), vectors(teacher)
    counts = counted(where, student, teacher)
    pairs = counts[:, None] & counts[None]
    distances = optax.losses.huber_loss(_distances(student, pairs), _distances(teacher, pairs))
    angles = optax.losses.huber_loss(_cosines(student), _cosines(teacher))
    triples = counts[:, None, None] & pairs[None]
    return distance * jnp.mean(distances, where=pairs) + angle * jnp.mean(angles, where=triples)


def _distances(x: Float[Array, "batch channels"], pairs: Array) -> Float[Array, "batch batch"]:
    squares = jnp.sum(x**2, -1)
    products = jnp.einsum("ic,jc->ij", x, x, precision="highest")
    found = jnp.sqrt(jnp.maximum(squares[:, None] + squares[None] - 2 * products, _LEAST))
    found = jnp.where(jnp.eye(len(x), dtype=bool), 0, found)
    positive = pairs & (found > 0)
    total = jnp.sum(found, where=positive)
    return found / jnp.where(total > 0, total / jnp.maximum(jnp.sum(positive), 1), 1)


def _cosines(x: Float[Array, "batch channels"]) -> Float[Array, "batch batch batch"]:
    directions = unit_vectors(x[None] - x[:, None])
    return jnp.einsum("ijc,ikc->ijk", directions, directions, precision="highest")


class RKD(Loss):
    """RKD of vectors, or of the means of maps; its published weight is 1, beside cross-entropy."""

    name: ClassVar[str] = "rkd"
    options: ClassVar[Mapping[str, Field]] = {
        **tap_of("pooled"),
        "distance": Field(25.0, POSITIVE, "weight of distances", may_change=True, optional=True),
        "angle": Field(50.0, POSITIVE, "weight of angles", may_change=True, optional=True),
    }

    def __init__(
        self,
        *,
        student_tap: str = "pooled",
        teacher_tap: str = "pooled",
        distance: float = 25.0,
        angle: float = 50.0,
    ):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.distance, self.angle = distance, angle

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool) -> Float[Array, ""]:
        """Return RKD of the batch."""
        ours, theirs = student.taps[self.student_tap], teacher.taps[self.teacher_tap]
        return rkd(ours, theirs, distance=self.distance, angle=self.angle, where=batch.where)
