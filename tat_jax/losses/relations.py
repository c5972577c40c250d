"""Losses that match how the positions of an image relate to each other, whatever their channels."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from einops import reduce
from jaxtyping import Array, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import Field
from tat_jax.losses.adapt import (
    as_map,
    as_tokens,
    check_grids,
    resize,
    share_positions,
    tap_shapes,
    unit_vectors,
)
from tat_jax.losses.loss import TAPS, Loss
from tat_jax.networks.view import Outputs, OutputShapes


def self_similarity_loss(
    student: Float[Array, "batch *positions channels"],
    teacher: Float[Array, "batch *positions features"],
    *,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean squared difference of two taps' cosine similarities of positions, image by image.

    (1/n²) Σ_ij (a_ij − b_ij)², a_ij = ⟨s_i, s_j⟩ / (‖s_i‖ ‖s_j‖) of the student's n positions and b_ij of the
    teacher's: the pair-wise distillation of Structured Knowledge Distillation for Semantic Segmentation, Liu
    et al., CVPR 2019, over all positions, where its code pools maps before. (Similarity-Preserving Knowledge
    Distillation, Tung and Mori, ICCV 2019, compares the images of a batch so.) Memory grows with n².

    Args:
        student: a map or tokens.
        teacher: of as many positions, in any number of channels.
        where: the images that count; None is all.

    Raises:
        ValueError: the taps differ in images or positions.
    """
    return jnp.mean(_differences(student, teacher), where=where)


def _differences(
    student: Float[Array, "batch *positions channels"], teacher: Float[Array, "batch *positions features"]
) -> Float[Array, " batch"]:
    """Return the mean squared difference of each image, as in `self_similarity_loss`."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(f"the taps differ in images or positions: {student.shape} and {teacher.shape}")
    return reduce((_similarities(student) - _similarities(teacher)) ** 2, "b i j -> b", "mean")


def _similarities(x: Float[Array, "batch *positions channels"]) -> Float[Array, "batch tokens tokens"]:
    units = unit_vectors(as_tokens(x))
    return jnp.einsum("bic,bjc->bij", units, units, precision="highest")


class SelfSimilarity(Loss):
    """The difference of how similar an image's positions are to each other, of two taps.

    Where the two have other positions, the student's map is resized bilinearly to the teacher's grid, tokens
    as the square map that they form. It has no parameters, and asks nothing of channels.

    Args:
        student_tap: its name among the student's outputs.
        teacher_tap: its name among the teacher's.
    """

    name: ClassVar[str] = "self_similarity"
    compares_taps: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = TAPS

    def __init__(self, *, student_tap: str, teacher_tap: str):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the loss for the two taps.

        Raises:
            ValueError: a tap has no positions, or the two differ in them and one is no map.
        """
        taps = {name: options[name] for name in TAPS}
        ours, theirs = tap_shapes(student, teacher, taps)
        if not share_positions(ours[:-1], theirs[:-1]):
            check_grids(ours, theirs, taps)
        return cls(**taps)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return the mean squared difference of each image."""
        ours, theirs = student.taps[self.student_tap], teacher.taps[self.teacher_tap]
        if not share_positions(ours.shape[1:-1], theirs.shape[1:-1]):
            theirs = as_map(theirs)
            ours = resize(as_map(ours), theirs.shape[1:3])
        return _differences(as_tokens(ours), as_tokens(theirs))
