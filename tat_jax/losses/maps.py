"""Losses that match feature maps position by position."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import jax.numpy as jnp
from einops import reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import Field, one_of
from tat_jax.losses.adapt import as_map, check_grids, resize, tap_shapes, unit_vectors
from tat_jax.losses.loss import TAPS, Loss
from tat_jax.networks.layers import BatchNorm, at_least_float32, uniform
from tat_jax.networks.view import Outputs, OutputShapes

Distance = Literal["mse", "cosine"]


def resized_loss(
    student: Float[Array, "batch h w channels"],
    teacher: Float[Array, "batch height width channels"],
    *,
    distance: Distance = "mse",
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the distance of a map, resized bilinearly to the grid of another, from that.

    "mse": ‖resized − teacher‖², a mean over every element. "cosine": 1 − cos(resized_i, teacher_i), a mean
    over the positions i. Of no paper: it is what is done where two grids differ, with
    `torch.nn.functional.interpolate(mode="bilinear")`, which has no antialias.

    Args:
        student: in the teacher's channels.
        teacher: of any grid.
        distance: of two positions.
        where: the images that count; None is all.

    Raises:
        ValueError: the maps differ in images or channels, or there is no such distance.
    """
    return jnp.mean(_distances(student, teacher, distance), where=where)


def _distances(
    student: Float[Array, "batch h w channels"],
    teacher: Float[Array, "batch height width channels"],
    distance: Distance,
) -> Float[Array, " batch"]:
    """Return the distance of each image, as in `resized_loss`."""
    if distance not in get_args(Distance):
        raise ValueError(f"distance={distance!r}: it is {' or '.join(map(repr, get_args(Distance)))}")
    if (len(student), student.shape[-1]) != (len(teacher), teacher.shape[-1]):
        raise ValueError(f"the maps differ in images or channels: {student.shape} and {teacher.shape}")
    resized = resize(student, teacher.shape[1:3])
    if distance == "cosine":
        cosines = jnp.sum(unit_vectors(resized) * unit_vectors(teacher), -1)
        return 1 - reduce(cosines, "b h w -> b", "mean")
    return reduce((resized - teacher.astype(resized.dtype)) ** 2, "b h w c -> b", "mean")


class Resized(Loss):
    """The distance of the student's map, projected and resized to the teacher's, from that.

    The projector is a 1×1 convolution with bias, drawn as PyTorch draws it; it comes before the resizing,
    with which it commutes. Tokens are the square map that they form.

    Args:
        student_features: channels of the student's tap.
        teacher_features: channels of the teacher's tap.
        student_tap: its name among the student's outputs.
        teacher_tap: its name among the teacher's.
        distance: as in `resized_loss`.
        dtype: the type of the projector's activations.
        rngs: the key stream `params`.
    """

    name: ClassVar[str] = "resized"
    compares_taps: ClassVar[bool] = True
    has_parameters: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = {
        **TAPS,
        "distance": Field("mse", one_of(*get_args(Distance)), "of two positions", optional=True),
    }

    def __init__(
        self,
        student_features: int,
        teacher_features: int,
        *,
        student_tap: str,
        teacher_tap: str,
        distance: Distance = "mse",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.distance = distance
        self.project = nnx.Conv(
            student_features,
            teacher_features,
            (1, 1),
            dtype=dtype,
            param_dtype=at_least_float32(dtype),
            kernel_init=uniform(student_features**-0.5),
            bias_init=uniform(student_features**-0.5),
            rngs=rngs,
        )

    @classmethod
    def build(
        cls, student: OutputShapes, teacher: OutputShapes, *, bn_group: int | None, **options: Any
    ) -> Self:
        """Build the projector for the shapes of the two taps.

        Raises:
            ValueError: a tap is no map, nor tokens that form one.
        """
        ours, theirs = tap_shapes(student, teacher, options)
        check_grids(ours, theirs, options)
        return cls(ours[-1], theirs[-1], **options)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return the distance of each image."""
        projected = self.project(as_map(student.taps[self.student_tap]))
        return _distances(projected, as_map(teacher.taps[self.teacher_tap]), self.distance)


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
