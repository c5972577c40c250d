"""SimKD: a student whose projected features the teacher's own classifier reads.

Knowledge Distillation with the Reused Teacher Classifier, Chen et al., CVPR 2022, as its code has it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float

from tat_jax.batch import Batch
from tat_jax.fields import Field
from tat_jax.losses.adapt import map_shapes, pool
from tat_jax.losses.loss import Loss, tap_of
from tat_jax.networks import Network, find
from tat_jax.networks.heads import Frozen
from tat_jax.networks.view import Outputs, OutputShapes


class SimKD(Loss):
    """The mean squared error of the student's projected maps and the teacher's last, by itself.

    Published is weight 1 and no other loss. The student has `student.projected` channels, as many as the
    teacher, and takes its classifier, which is not trained; the projector stays with it. A teacher's larger
    map is pooled to the student's grid.
    """

    name: ClassVar[str] = "simkd"
    options: ClassVar[Mapping[str, Field]] = {
        "student_tap": tap_of("projected")["student_tap"],
        "teacher_tap": tap_of("stage3")["teacher_tap"],
    }

    def __init__(self, *, student_tap: str = "projected", teacher_tap: str = "stage3"):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap

    @classmethod
    def prepare(cls, student: Network, teacher: Network | None) -> None:
        """Give the student the classifier of the teacher.

        Raises:
            ValueError: it does not fit.
        """
        ours = getattr(student.view.network, "fc", None)
        if ours is None or not isinstance(ours.kernel, Frozen):
            raise ValueError(
                "the student has no projector for the teacher's classifier: set student.projected to the "
                "channels of the teacher's last map"
            )
        assert teacher is not None
        theirs = getattr(teacher.view.network, find(teacher.arguments["architecture"]).head)
        if ours.kernel.shape != theirs.kernel.shape:
            raise ValueError(
                f"student.projected={ours.in_features} and {ours.out_features} classes do not fit the "
                f"teacher's classifier, of {theirs.in_features} features and {theirs.out_features} classes"
            )
        # In memory of its own, which a step takes, and not the teacher's.
        nnx.update(ours, jax.tree.map(jnp.copy, nnx.state(theirs)))

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the loss for a tap of each network.

        Raises:
            ValueError: one is no map, or the student's is larger or of other channels.
        """
        ours, theirs = map_shapes(student, teacher, options)
        if ours[-1] != theirs[-1] or ours[0] > theirs[0] or ours[1] > theirs[1]:
            raise ValueError(
                f"the student's projected map is {list(ours)}, the teacher's {list(theirs)}: both need the "
                "same channels (student.projected), and the student's grid may not be the larger"
            )
        return cls(**{name: options[name] for name in cls.options if name in options})

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return the error of each image."""
        ours, target = student.taps[self.student_tap], teacher.taps[self.teacher_tap]
        target = pool(target, ours.shape[1:3])
        return reduce((ours.astype(target.dtype) - target) ** 2, "b h w c -> b", "mean")
