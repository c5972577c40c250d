"""ReviewKD: each of the teacher's stages is taught to all of the student's from there on.

Distilling Knowledge via Knowledge Review, Chen et al., CVPR 2021, as mdistiller's code has it.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import Field, whole
from tat_jax.losses.adapt import nearest, paired_shapes, pool
from tat_jax.losses.loss import Loss, check_pairs, taps_of
from tat_jax.networks.layers import BatchNorm, conv, torch_uniform
from tat_jax.networks.view import Outputs, OutputShapes

Maps = Float[Array, "batch height width channels"]
_PYRAMID = (4, 2, 1)  # positions a side
_STUDENT = ("stage1", "stage2", "stage3", "pooled")
_TEACHER = ("stage1_preact", "stage2_preact", "stage3_preact", "pooled")


def hierarchical_context_loss(
    student: Float[Array | np.ndarray, "batch height width channels"],
    teacher: Float[Array | np.ndarray, "batch height width channels"],
    *,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean squared error of maps, and of the same pooled to 4, 2 and 1 positions a side.

    Each has half the weight of the one before, over the sum of those used; sizes not below the map's are not.
    """
    return jnp.mean(_errors(jnp.asarray(student), jnp.asarray(teacher)), where=where)


def _errors(student: Array, teacher: Array) -> Float[Array, " batch"]:
    height = student.shape[1]
    grids = [student.shape[1:3], *((side, side) for side in _PYRAMID if side < height)]
    weights = [0.5**i for i in range(len(grids))]
    values = (
        weight * reduce((pool(student, grid) - pool(teacher, grid)) ** 2, "b h w c -> b", "mean")
        for grid, weight in zip(grids, weights, strict=True)
    )
    return functools.reduce(operator.add, values) / sum(weights)


class Level(NamedTuple):
    """Channels of a pair of taps."""

    student: int
    teacher: int


class Fusion(nnx.Module):
    """Join a tap of the student with what the deeper levels became, and bring it to the teacher's channels.

    x = BN(1×1 conv(tap)); with a level below, whose result y is resized to this grid, x ← x · g₀ + y · g₁,
    the gates g a sigmoid of a 1×1 convolution of both. What is taught is BN(3×3 conv(x)), what goes on is x.
    """

    def __init__(
        self,
        level: Level,
        middle: int,
        *,
        deepest: bool,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        of_convs: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.enter = conv(level.student, middle, 1, kernel_init=_drawn, **of_convs)
        self.enter_norm = BatchNorm(middle, group=bn_group, dtype=dtype)
        self.leave = conv(middle, level.teacher, 3, kernel_init=_drawn, **of_convs)
        self.leave_norm = BatchNorm(level.teacher, group=bn_group, dtype=dtype)
        self.gates = (
            None if deepest else conv(2 * middle, 2, 1, use_bias=True, kernel_init=torch_uniform, **of_convs)
        )

    def __call__(
        self,
        tap: Maps,
        below: Float[Array, "batch h w middle"] | None,
        grid: tuple[int, int],
        *,
        train: bool,
        where: Where,
    ) -> tuple[Float[Array, "batch _ _ taught"], Float[Array, "batch _ _ middle"]]:
        """Return what is taught, of the teacher's grid, and what goes on to the next level."""
        x = self.enter_norm(self.enter(tap), train=train, where=where)
        if self.gates is not None:
            assert below is not None
            y = nearest(below, x.shape[1:3])
            gates = jax.nn.sigmoid(self.gates(jnp.concatenate([x, y], axis=-1)))
            x = x * gates[..., :1] + y * gates[..., 1:]
        if x.shape[1:3] != grid:
            x = nearest(x, grid)
        return self.leave_norm(self.leave(x), train=train, where=where), x


def _drawn(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Draw uniformly from ±√(3 / fan-in), PyTorch's `kaiming_uniform_(a=1)`."""
    return jnp.sqrt(3.0).astype(dtype) * torch_uniform(key, shape, dtype)


class Review(Loss):
    """ReviewKD, the sum over levels; its published weight on CIFAR-100 is 0.6 to 8 times min(epoch / 20, 1).

    Args:
        levels: channels of the taps, pair by pair.
        student_taps: from the shallowest to the deepest; vectors are maps of one position.
        teacher_taps: likewise; published are those before activations.
        middle: the most channels within.
        dtype: the type of activations.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.
    """

    name: ClassVar[str] = "review"
    has_parameters: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = {
        **taps_of(_STUDENT, _TEACHER),
        "middle": Field(512, whole(1), "the most channels within", optional=True),
    }

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        student_taps: tuple[str, ...] = _STUDENT,
        teacher_taps: tuple[str, ...] = _TEACHER,
        middle: int = 512,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        check_pairs(student_taps, teacher_taps)
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        width = min(middle, levels[-1].student)
        self.fusions = nnx.List(
            Fusion(level, width, deepest=i == 0, dtype=dtype, bn_group=bn_group, rngs=rngs)
            for i, level in enumerate(reversed(levels))
        )

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the levels for the channels of all pairs of taps.

        Raises:
            ValueError: the taps are not as many, or one is neither a map nor a vector.
        """
        shapes = paired_shapes(student, teacher, options, vectors=True)
        return cls([Level(ours[-1], theirs[-1]) for ours, theirs in shapes], **options)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return the sum of each image."""
        below, total = None, jnp.zeros(len(batch.where))
        for fuse, ours, theirs in zip(
            self.fusions, reversed(self.student_taps), reversed(self.teacher_taps), strict=True
        ):
            tap, target = _as_maps(student.taps[ours]), _as_maps(teacher.taps[theirs])
            grid = (target.shape[1], target.shape[2])
            taught, below = fuse(tap, below, grid, train=train, where=batch.where)
            total = total + _errors(taught, target)
        return total


def _as_maps(x: Float[Array, "batch *positions channels"]) -> Maps:
    return rearrange(x, "b c -> b 1 1 c") if x.ndim == 2 else x
