"""Losses that match feature maps position by position."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from einops import reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch
from tat_jax.fields import Field
from tat_jax.losses.loss import TAPS, Loss
from tat_jax.networks.layers import BatchNorm, at_least_float32, uniform
from tat_jax.networks.view import Outputs, OutputShapes


class FitNet(Loss):
    """The mean squared error of a regressor's output on the student's map against the teacher's.

    ‖ReLU(BN(conv(student))) − teacher‖², averaged over every element. FitNets: Hints for Thin Deep Nets,
    Romero et al., ICLR 2015, as RepDistiller's code has it: trained jointly, the convolution with bias, its
    kernel by the two grids. Equal: 1×1; the student's twice the teacher's: 3×3 of stride 2; half of it:
    transposed 4×4 of stride 2; else the one that fits without padding.

    Args:
        student_shape: [height, width, channels] of the student's tap.
        teacher_shape: likewise of the teacher's.
        student_tap: its name among the student's outputs.
        teacher_tap: its name among the teacher's.
        dtype: the type of the regressor's activations.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.

    Raises:
        ValueError: no such convolution leads from the student's grid to the teacher's.
    """

    name: ClassVar[str] = "fitnet"
    compares_taps: ClassVar[bool] = True
    has_parameters: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = TAPS

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        *,
        student_tap: str,
        teacher_tap: str,
        dtype: DTypeLike,
        bn_group: int | None,
        rngs: nnx.Rngs,
    ):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.conv = _regressor(student_shape, teacher_shape, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(teacher_shape[-1], group=bn_group, dtype=dtype)

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the regressor for the shapes of the two taps."""
        ours, theirs = student.taps[options["student_tap"]], teacher.taps[options["teacher_tap"]]
        return cls(ours.shape[1:], theirs.shape[1:], **options)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return the mean squared error of each image."""
        regressed = self.conv(student.taps[self.student_tap])
        regressed = nnx.relu(self.norm(regressed, train=train, where=batch.where))
        target = teacher.taps[self.teacher_tap]
        exact = at_least_float32(target.dtype)
        return reduce((regressed.astype(exact) - target.astype(exact)) ** 2, "b h w c -> b", "mean")


def _regressor(
    student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Conv | nnx.ConvTranspose:
    if len(student_shape) != 3 or len(teacher_shape) != 3:
        raise ValueError(f"both taps must be maps: {list(student_shape)} and {list(teacher_shape)}")
    (*ours, features), (*theirs, out_features) = student_shape, teacher_shape
    kind: type[nnx.Conv | nnx.ConvTranspose]
    if ours == theirs:
        kind, size, stride, padding = nnx.Conv, (1, 1), 1, 0
    elif ours == [2 * side for side in theirs]:
        kind, size, stride, padding = nnx.Conv, (3, 3), 2, 1
    elif [2 * side for side in ours] == theirs:
        # PyTorch's padding of 1 takes away; that of lax.conv_transpose adds to its 4 − 1.
        kind, size, stride, padding = nnx.ConvTranspose, (4, 4), 2, 2
    elif all(our >= their for our, their in zip(ours, theirs, strict=True)):
        size = (1 + ours[0] - theirs[0], 1 + ours[1] - theirs[1])
        kind, stride, padding = nnx.Conv, 1, 0
    else:
        raise ValueError(f"no regressor leads from a map of {ours} to one of {theirs}")
    # PyTorch reads the fan-in from the second axis of a kernel, which of a transposed one is the output's.
    fan_in = (out_features if kind is nnx.ConvTranspose else features) * size[0] * size[1]
    return kind(
        features,
        out_features,
        size,
        strides=stride,
        padding=((padding, padding),) * 2,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        kernel_init=uniform(fan_in**-0.5),
        bias_init=uniform(fan_in**-0.5),
        rngs=rngs,
    )
