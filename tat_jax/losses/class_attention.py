"""Class attention transfer (CAT-KD): where in an image each class is seen.

Class Attention Transfer Based Knowledge Distillation, Guo et al., CVPR 2023, as its code has it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import YES_OR_NO, Field, whole
from tat_jax.losses.adapt import counted, map_shapes, pool, unit_vectors
from tat_jax.losses.loss import Loss, tap_of
from tat_jax.networks.view import Outputs, OutputShapes

_SIDE = 2


def class_attention(
    student: Float[Array | np.ndarray, "batch h w classes"],
    teacher: Float[Array | np.ndarray, "batch height width classes"],
    *,
    resolution: int = _SIDE,
    normalize: bool = False,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean squared error of class maps that are pooled to resolution × resolution positions.

    Args:
        student: of each image what each position adds to the logits.
        teacher: likewise, of any grid.
        resolution: positions a side.
        normalize: divide each class's map by its L2 norm first.
        where: the images that count; None is all.
    """
    counts = counted(where, student, teacher)
    values = _errors(jnp.asarray(student), jnp.asarray(teacher), resolution, normalize)
    return jnp.mean(values, where=counts)


def _errors(student: Array, teacher: Array, side: int, normalize: bool) -> Float[Array, " batch"]:
    ours, theirs = (rearrange(pool(x, (side, side)), "b h w k -> b k (h w)") for x in (student, teacher))
    if normalize:
        ours, theirs = unit_vectors(ours), unit_vectors(theirs)
    return reduce((ours - theirs) ** 2, "b k n -> b", "mean")


class ClassAttention(Loss):
    """CAT-KD; its published weight for CIFAR-100 is 0.7 to 15, of normalised maps 15 to 600, by the pair."""

    name: ClassVar[str] = "catkd"
    options: ClassVar[Mapping[str, Field]] = {
        **tap_of("class_maps"),
        "resolution": Field(
            _SIDE, whole(1), "positions a side to which class maps are pooled", optional=True
        ),
        "normalize": Field(False, YES_OR_NO, "divide each class's map by its norm", optional=True),
    }

    def __init__(
        self,
        *,
        student_tap: str = "class_maps",
        teacher_tap: str = "class_maps",
        resolution: int = _SIDE,
        normalize: bool = False,
    ):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.resolution, self.normalize = resolution, normalize

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the loss for a tap of each network.

        Raises:
            ValueError: one is no map, or they have other classes.
        """
        ours, theirs = map_shapes(student, teacher, options)
        if ours[-1] != theirs[-1]:
            raise ValueError(
                f"class maps of {ours[-1]} classes cannot be compared with a teacher's of {theirs[-1]}"
            )
        return cls(**{name: options[name] for name in cls.options if name in options})

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return the error of each image."""
        maps = student.taps[self.student_tap], teacher.taps[self.teacher_tap]
        return _errors(*maps, self.resolution, self.normalize)
