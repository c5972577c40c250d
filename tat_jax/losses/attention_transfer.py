"""Attention transfer (AT): where in their maps both networks are active.

Paying More Attention to Attention, Zagoruyko & Komodakis, ICLR 2017, as RepDistiller's code has it.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import Field
from tat_jax.losses.adapt import counted, paired_shapes, pool, unit_vectors
from tat_jax.losses.loss import Loss, check_pairs, taps_of
from tat_jax.networks.view import Outputs, OutputShapes

_STAGES = ("stage1", "stage2", "stage3")


def attention_transfer(
    student: Float[Array | np.ndarray, "batch h w features"],
    teacher: Float[Array | np.ndarray, "batch height width channels"],
    *,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean over positions and images of (a_s − a_t)².

    a is the mean over channels of the squared activations, divided by its L2 norm over positions. The larger
    map is first pooled to the grid of the smaller.

    Args:
        student: a map of each image.
        teacher: likewise, of any grid and channels.
        where: the images that count; None is all.
    """
    counts = counted(where, student, teacher)
    return jnp.mean(_differences(jnp.asarray(student), jnp.asarray(teacher)), where=counts)


def _differences(student: Array, teacher: Array) -> Float[Array, " batch"]:
    grid = min(student.shape[1:3], teacher.shape[1:3])
    ours, theirs = (
        unit_vectors(reduce(pool(x, grid) ** 2, "b h w c -> b (h w)", "mean")) for x in (student, teacher)
    )
    return reduce((ours - theirs) ** 2, "b n -> b", "mean")


class AttentionTransfer(Loss):
    """The sum of AT over pairs of taps; its published weight is 1,000, beside cross-entropy."""

    name: ClassVar[str] = "at"
    options: ClassVar[Mapping[str, Field]] = taps_of(_STAGES, _STAGES)

    def __init__(self, *, student_taps: tuple[str, ...] = _STAGES, teacher_taps: tuple[str, ...] = _STAGES):
        check_pairs(student_taps, teacher_taps)
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the loss for the pairs of taps.

        Raises:
            ValueError: the taps are not as many, or one is no map.
        """
        paired_shapes(student, teacher, options)
        return cls(**{name: options[name] for name in cls.options})

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return the sum of each image."""
        pairs = zip(self.student_taps, self.teacher_taps, strict=True)
        values = (_differences(student.taps[ours], teacher.taps[theirs]) for ours, theirs in pairs)
        return functools.reduce(operator.add, values)
