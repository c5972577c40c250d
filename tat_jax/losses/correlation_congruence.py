"""Correlation congruence (CC): how differences between both networks agree from one image to the next.

Correlation Congruence for Knowledge Distillation, Peng et al., ICCV 2019, as RepDistiller's code has it: it
depends on the order of the images, and both embeddings are trained.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch
from tat_jax.fields import Field, whole
from tat_jax.losses.adapt import embedding_of_vectors, vectors
from tat_jax.losses.loss import Loss, tap_of
from tat_jax.networks.view import Outputs, OutputShapes


class CorrelationCongruence(Loss):
    """mean_i Σ_c d_ic d_(i+1)c of d = |E_s student − E_t teacher|, of neighbours in the batch.

    Its published weight is 0.02, beside cross-entropy.

    Args:
        student_features: channels of the student's tap.
        teacher_features: channels of the teacher's tap.
        student_tap: its name among the student's outputs.
        teacher_tap: its name among the teacher's.
        features: of both embeddings.
        dtype: the type of activations; the embeddings compute in float32 at least.
        rngs: the key stream `params`.
    """

    name: ClassVar[str] = "cc"
    has_parameters: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = {
        **tap_of("pooled"),
        "features": Field(128, whole(1), "of both embeddings", optional=True),
    }

    def __init__(
        self,
        student_features: int,
        teacher_features: int,
        *,
        student_tap: str = "pooled",
        teacher_tap: str = "pooled",
        features: int = 128,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.student, self.teacher = (
            embedding_of_vectors(channels, features, dtype=dtype, rngs=rngs)
            for channels in (student_features, teacher_features)
        )

    @classmethod
    def build(
        cls, student: OutputShapes, teacher: OutputShapes, *, bn_group: int | None, **options: Any
    ) -> Self:
        """Build the embeddings for the channels of the two taps."""
        ours, theirs = student.taps[options["student_tap"]], teacher.taps[options["teacher_tap"]]
        return cls(ours.shape[-1], theirs.shape[-1], **options)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool) -> Float[Array, ""]:
        """Return the mean over neighbours of the batch."""
        ours = self.student(vectors(student.taps[self.student_tap]))
        theirs = self.teacher(vectors(teacher.taps[self.teacher_tap]))
        difference, counts = jnp.abs(ours - theirs), jnp.asarray(batch.where)
        products = jnp.sum(difference[:-1] * difference[1:], -1)
        both = counts[:-1] & counts[1:]
        return jnp.sum(products, where=both) / jnp.maximum(jnp.sum(both), 1)
