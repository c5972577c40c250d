"""Variational information distillation (VID): how well the student's map predicts the teacher's.

Variational Information Distillation for Knowledge Transfer, Ahn et al., CVPR 2019, as RepDistiller's code has
it, where the variances are trained (and, as all parameters, decayed); mdistiller's never move.
"""

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch
from tat_jax.fields import Field
from tat_jax.losses.adapt import paired_shapes, pool
from tat_jax.losses.loss import Loss, check_pairs, taps_of
from tat_jax.networks.layers import at_least_float32, conv, torch_uniform
from tat_jax.networks.view import Outputs, OutputShapes

_STAGES = ("stage1", "stage2", "stage3")
_LEAST, _FIRST = 1e-5, 5.0  # of a variance, and its first value


class Predictor(nnx.Module):
    """Three 1×1 convolutions without bias that predict the mean, and a variance of each channel."""

    def __init__(self, features: int, channels: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        of_convs: dict[str, Any] = {"dtype": dtype, "kernel_init": torch_uniform, "rngs": rngs}
        self.regressor = nnx.List(
            [conv(width, channels, 1, **of_convs) for width in (features, channels, channels)]
        )
        first = math.log(math.exp(_FIRST - _LEAST) - 1)
        self.log_scale = nnx.Param(jnp.full(channels, first, at_least_float32(dtype)))

    def __call__(
        self,
        student: Float[Array, "batch h w features"],
        teacher: Float[Array, "batch height width channels"],
    ) -> Float[Array, " batch"]:
        """Return the mean of ½((μ − teacher)² / σ² + log σ²) of each image; the larger map is pooled."""
        grid = min(student.shape[1:3], teacher.shape[1:3])
        first, second, last = self.regressor
        mean = last(nnx.relu(second(nnx.relu(first(pool(student, grid).astype(student.dtype))))))
        variance = rearrange(jax.nn.softplus(self.log_scale[...]) + _LEAST, "c -> 1 1 1 c")
        error = (mean.astype(variance.dtype) - pool(teacher, grid)) ** 2
        return reduce((error / variance + jnp.log(variance)) / 2, "b h w c -> b", "mean")


class VID(Loss):
    """The sum of VID over pairs of taps; its published weight is 1, beside cross-entropy.

    Args:
        channels: of the student's and the teacher's tap, pair by pair.
        student_taps: their names among the student's outputs.
        teacher_taps: their names among the teacher's.
        dtype: the type of the predictors' activations.
        rngs: the key stream `params`.
    """

    name: ClassVar[str] = "vid"
    has_parameters: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = taps_of(_STAGES, _STAGES)

    def __init__(
        self,
        channels: list[tuple[int, int]],
        *,
        student_taps: tuple[str, ...] = _STAGES,
        teacher_taps: tuple[str, ...] = _STAGES,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_pairs(student_taps, teacher_taps)
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.predictors = nnx.List([Predictor(*pair, dtype=dtype, rngs=rngs) for pair in channels])

    @classmethod
    def build(
        cls, student: OutputShapes, teacher: OutputShapes, *, bn_group: int | None, **options: Any
    ) -> Self:
        """Build the predictors for the channels of all pairs of taps.

        Raises:
            ValueError: a tap is no map, or the taps are not as many.
        """
        shapes = paired_shapes(student, teacher, options)
        return cls([(ours[-1], theirs[-1]) for ours, theirs in shapes], **options)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return the sum of each image."""
        triples = zip(self.predictors, self.student_taps, self.teacher_taps, strict=True)
        values = (predict(student.taps[ours], teacher.taps[theirs]) for predict, ours, theirs in triples)
        return functools.reduce(operator.add, values)
