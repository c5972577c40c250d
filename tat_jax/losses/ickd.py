"""Inter-channel correlation (ICKD-C): which channels of a map are active at the same positions.

Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, Liu et al., ICCV 2021, as
its code for CIFAR has it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import YES_OR_NO, Field
from tat_jax.losses.adapt import Embedding, as_tokens, counted, tap_shapes, unit_vectors
from tat_jax.losses.loss import Loss, tap_of
from tat_jax.networks.layers import at_least_float32
from tat_jax.networks.view import Outputs, OutputShapes


def ickd(
    student: Float[Array | np.ndarray, "batch *positions channels"],
    teacher: Float[Array | np.ndarray, "batch *places channels"],
    *,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return Σ_cd (G_s − G_t)² / C, a mean over images.

    G are the products of an image's C channels over its positions, each channel's divided by their L2 norm.

    Args:
        student: a map or tokens, in the teacher's channels.
        teacher: likewise, of any grid.
        where: the images that count; None is all.
    """
    counts = counted(where, student, teacher)
    return jnp.mean(_differences(jnp.asarray(student), jnp.asarray(teacher)), where=counts)


def _differences(student: Array, teacher: Array) -> Float[Array, " batch"]:
    ours, theirs = _correlations(student), _correlations(teacher)
    return reduce((ours - theirs) ** 2, "b c d -> b", "sum") / ours.shape[-1]


def _correlations(x: Float[Array, "batch *positions channels"]) -> Float[Array, "batch channels channels"]:
    tokens = as_tokens(x.astype(at_least_float32(x.dtype)))
    return unit_vectors(jnp.einsum("bic,bid->bcd", tokens, tokens, precision="highest"))


class ICKD(Loss):
    """ICKD-C of the student's tap, brought to the teacher's channels by a 1×1 convolution and BatchNorm.

    Its published weight is 2.5 for CIFAR-100, beside cross-entropy.

    Args:
        student_features: channels of the student's tap.
        teacher_features: channels of the teacher's tap.
        student_tap: its name among the student's outputs.
        teacher_tap: its name among the teacher's.
        divide_by_batch: divide by the images once more, as the published code for ImageNet does.
        dtype: the type of the embedding's activations.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.
    """

    name: ClassVar[str] = "ickd"
    has_parameters: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = {
        **tap_of("stage3"),
        "divide_by_batch": Field(False, YES_OR_NO, "once more, as published for ImageNet", optional=True),
    }

    def __init__(
        self,
        student_features: int,
        teacher_features: int,
        *,
        student_tap: str = "stage3",
        teacher_tap: str = "stage3",
        divide_by_batch: bool = False,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.divide_by_batch = divide_by_batch
        self.embed = Embedding(
            student_features, teacher_features, kernel=1, dtype=dtype, bn_group=bn_group, rngs=rngs
        )

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the embedding for the channels of the two taps.

        Raises:
            ValueError: a tap has no positions.
        """
        ours, theirs = tap_shapes(student, teacher, options)
        return cls(ours[-1], theirs[-1], **options)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return ICKD-C of each image."""
        ours = self.embed(student.taps[self.student_tap], train=train, where=batch.where)
        values = _differences(ours, teacher.taps[self.teacher_tap])
        return values / jnp.maximum(jnp.sum(batch.where), 1) if self.divide_by_batch else values
