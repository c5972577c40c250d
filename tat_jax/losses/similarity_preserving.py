"""Similarity-preserving distillation (SP): which images of a batch are alike.

Similarity-Preserving Knowledge Distillation, Tung & Mori, ICCV 2019, as RepDistiller's code has it.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import Field
from tat_jax.losses.adapt import counted, unit_vectors
from tat_jax.losses.loss import Loss, tap_of
from tat_jax.networks.layers import at_least_float32
from tat_jax.networks.view import Outputs


def similarity_preserving(
    student: Float[Array | np.ndarray, "batch *positions features"],
    teacher: Float[Array | np.ndarray, "batch *places channels"],
    *,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean over all pairs of images of (G_s − G_t)².

    G are the products of the images' activations, each image's divided by their L2 norm.

    Args:
        student: a map, tokens or a vector of each image.
        teacher: likewise, of any size.
        where: the images that count; None is all.
    """
    counts = counted(where, student, teacher)
    ours, theirs = (_similarities(jnp.asarray(x), counts) for x in (student, teacher))
    return jnp.mean((ours - theirs) ** 2, where=counts[:, None] & counts[None])


def _similarities(x: Array, counts: Array) -> Float[Array, "batch batch"]:
    rows = rearrange(x.astype(at_least_float32(x.dtype)), "b ... -> b (...)")
    products = jnp.einsum("ic,jc->ij", rows, rows, precision="highest")
    return unit_vectors(jnp.where(counts[None], products, 0))


class SimilarityPreserving(Loss):
    """SP of a pair of taps; its published weight is 3,000, beside cross-entropy."""

    name: ClassVar[str] = "sp"
    options: ClassVar[Mapping[str, Field]] = tap_of("stage3")

    def __init__(self, *, student_tap: str = "stage3", teacher_tap: str = "stage3"):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool) -> Float[Array, ""]:
        """Return SP of the batch."""
        ours, theirs = student.taps[self.student_tap], teacher.taps[self.teacher_tap]
        return similarity_preserving(ours, theirs, where=batch.where)
