"""What a loss is: a module that compares what two networks say of a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch, MixedLabels
from tat_jax.fields import TEXT, Field, Rule, or_none
from tat_jax.networks.view import Outputs, OutputShapes

Value = Float[Array, ""] | Float[Array, " batch"]


class Rows(nnx.Variable):
    """What a loss remembers of each image that is trained on, a row each, which the devices share."""


class Loss(nnx.Module):
    """A term of the loss that is trained on: total = Σ weight · loss.

    A subclass in a module of this package is found in configs by its `name`. It may hold parameters, which
    are trained with the student's, and other `nnx.Variable`s, which are saved like running statistics; as
    `Rows` they lie split over the devices.

    Attributes:
        name: what configs call it.
        options: its fields in a config, besides `weight`.
        compares_taps: whether a config holds such a term for each pair of taps, by name; then `TAPS` are
            among its options.
        has_parameters: whether a run can switch it on or off only before it begins.
        needs_labels: whether it reads `batch.label`.
        needs_all_labels: whether it is built with `labels`, those of all images that are trained on, too.
        takes_mixed_labels: whether it reads that where they are `MixedLabels`, too.
        needs_teacher: whether it reads the teacher's outputs.
        needs_logits: whether it reads logits, the student's and, with `needs_teacher`, the teacher's, whose
            head must be trained then.
    """

    name: ClassVar[str]
    options: ClassVar[Mapping[str, Field]] = {}
    compares_taps: ClassVar[bool] = False
    has_parameters: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_all_labels: ClassVar[bool] = False
    takes_mixed_labels: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False

    @classmethod
    def prepare(cls, student: Any, teacher: Any) -> None:
        """Change the student, a `Network`, before it is trained; few losses do.

        Raises:
            ValueError: the two networks do not fit.
        """

    @classmethod
    def build(
        cls,
        student: OutputShapes,
        teacher: OutputShapes,
        *,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> Self:
        """Build the loss for the shapes of both networks' outputs.

        Args:
            student: shapes and types of its outputs for one image.
            teacher: likewise; without logits and taps where there is none.
            dtype: the type of activations.
            bn_group: images over which batch statistics are taken; None is the whole batch.
            rngs: the key stream `params`.
            options: of the config.

        Raises:
            ValueError: shapes and options do not fit together.
        """
        return cls(**options)

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool) -> Value:
        """Return the loss of each image, or one number where images are compared with each other.

        Of padding, `~batch.where`, the value of an image does not count; a single number must leave it out.
        """
        raise NotImplementedError


TAPS: Mapping[str, Field] = {
    "student_tap": Field(str, or_none(TEXT), "tap of the student; None: the name of the term", optional=True),
    "teacher_tap": Field(str, or_none(TEXT), "tap of the teacher; None: the name of the term", optional=True),
}


TAP_OPTIONS = ("student_tap", "teacher_tap", "student_taps", "teacher_taps")
_NAMES = Rule(
    "one or more names of taps",
    lambda value: isinstance(value, tuple | list) and len(value) > 0 and all(map(TEXT.holds, value)),
)


def taps_of(student: tuple[str, ...], teacher: tuple[str, ...]) -> Mapping[str, Field]:
    """Return the fields of a loss that compares several pairs of taps, with their defaults."""
    return {
        f"{which}_taps": Field(names, _NAMES, f"taps of the {which}, pair by pair", optional=True)
        for which, names in (("student", student), ("teacher", teacher))
    }


def check_pairs(student: Sequence[str], teacher: Sequence[str]) -> None:
    """Check that taps come in pairs.

    Raises:
        ValueError: they are not as many.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"student_taps and teacher_taps are compared pair by pair, and are {len(student)} "
            f"({', '.join(student)}) and {len(teacher)} ({', '.join(teacher)})"
        )


def tap_of(default: str) -> Mapping[str, Field]:
    """Return the fields of a loss that compares one pair of taps, whatever it is called in a config."""
    return {
        f"{which}_tap": Field(default, TEXT, f"tap of the {which}", optional=True)
        for which in ("student", "teacher")
    }


def logits_of(outputs: Outputs) -> Array:
    """Return the logits of a network.

    Raises:
        ValueError: it has no head.
    """
    if outputs.logits is None:
        raise ValueError("a loss compares logits, and the network gives none; set its weight to 0")
    return outputs.logits


def labels_of(batch: Batch) -> Array:
    """Return the labels of a batch.

    Raises:
        ValueError: it has none, or two for each image.
    """
    if batch.label is None:
        raise ValueError("a loss reads labels, and the data has none; set its weight to 0")
    if isinstance(batch.label, MixedLabels):
        raise ValueError(
            "a loss reads one label for each image, and mixed images have two; set mixup=0 and cutmix=0"
        )
    return jnp.asarray(batch.label)


class FunctionLoss(Loss):
    """A plain function of the student's outputs, the teacher's and the batch as a loss."""

    def __init__(self, function: Callable[[Outputs, Outputs, Batch], Value]):
        self.function = function

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool) -> Value:
        """Return what the function returns."""
        return self.function(student, teacher, batch)
