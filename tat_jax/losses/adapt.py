"""How taps of two networks are made comparable: their positions, their channels, their scale.

A tap is a map `[batch, height, width, channels]`, or tokens `[batch, positions, channels]` row by row.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from tat_jax.batch import Where
from tat_jax.losses.loss import check_pairs
from tat_jax.networks.layers import BatchNorm, at_least_float32, conv, torch_uniform, uniform
from tat_jax.networks.view import OutputShapes

Shape = tuple[int, ...]


def tap_shapes(
    student: OutputShapes, teacher: OutputShapes, options: Mapping[str, Any]
) -> tuple[Shape, Shape]:
    """Return the shapes of an image of the student's and of the teacher's tap that options name.

    Raises:
        ValueError: one has no positions.
    """
    ours, theirs = (
        tuple(outputs.taps[options[f"{which}_tap"]].shape[1:])
        for which, outputs in (("student", student), ("teacher", teacher))
    )
    if not {len(ours), len(theirs)} <= {2, 3}:
        raise ValueError(
            "the taps must be maps [height, width, channels] or tokens [positions, channels]: the student's "
            f"is {list(ours)}, the teacher's {list(theirs)}"
        )
    return ours, theirs


def map_shapes(
    student: OutputShapes, teacher: OutputShapes, options: Mapping[str, Any]
) -> tuple[Shape, Shape]:
    """Return [height, width, channels] of both taps likewise.

    Raises:
        ValueError: one is no map.
    """
    ours, theirs = tap_shapes(student, teacher, options)
    if len(ours) != 3 or len(theirs) != 3:
        raise ValueError(
            f"the taps must be maps [height, width, channels]: the student's is {list(ours)}, "
            f"the teacher's {list(theirs)}"
        )
    return ours, theirs


def paired_shapes(
    student: OutputShapes, teacher: OutputShapes, options: Mapping[str, Any], *, vectors: bool = False
) -> list[tuple[Shape, Shape]]:
    """Return the shapes of an image of each pair of maps that `student_taps` and `teacher_taps` name.

    Args:
        student: shapes of its outputs.
        teacher: likewise.
        options: of a loss.
        vectors: whether [channels] is as good as a map.

    Raises:
        ValueError: the taps are not as many, or one is no map.
    """
    check_pairs(options["student_taps"], options["teacher_taps"])
    found = []
    for which, outputs in (("student", student), ("teacher", teacher)):
        shapes = {tap: tuple(outputs.taps[tap].shape[1:]) for tap in options[f"{which}_taps"]}
        for tap, shape in shapes.items():
            if len(shape) != 3 and not (vectors and len(shape) == 1):
                raise ValueError(
                    f"{which}_taps must be maps [height, width, channels]{' or vectors' if vectors else ''}, "
                    f"and {tap} is {list(shape)}: name others"
                )
        found.append([shapes[tap] for tap in options[f"{which}_taps"]])
    return list(zip(*found, strict=True))


def grid_of(shape: Shape, name: str, *, way_out: str = "") -> tuple[int, int]:
    """Return the height and the width of a tap; of tokens, those of the square that they form.

    Args:
        shape: of an image.
        name: of the tap, for an error.
        way_out: of the error, besides leaving out tokens that are no position.

    Raises:
        ValueError: so many tokens form no square.
    """
    if len(shape) == 3:
        return shape[0], shape[1]
    side = math.isqrt(shape[0])
    if side * side != shape[0]:
        raise ValueError(
            f"{name} has {shape[0]} tokens, which form no square map: prefix_tokens of its View leaves out "
            f"those that are no position{way_out}"
        )
    return side, side


def check_grids(student: Shape, teacher: Shape, options: Mapping[str, Any]) -> None:
    """Check that two taps are maps, or tokens that form one.

    Raises:
        ValueError: as `grid_of` does.
    """
    for which, shape in (("student", student), ("teacher", teacher)):
        grid_of(shape, f"the {which}'s tap {options[f'{which}_tap']}")


def share_positions(ours: Shape, theirs: Shape) -> bool:
    """Return whether two taps have the same positions: one grid, or as many where one of them is tokens."""
    return ours == theirs or (len(ours) != len(theirs) and math.prod(ours) == math.prod(theirs))


def as_map(x: Float[Array, "batch *positions channels"]) -> Float[Array, "batch height width channels"]:
    """Return a map as it is, and tokens as the square that they form."""
    return x.reshape(len(x), *grid_of(x.shape[1:], "a tap"), x.shape[-1])


def as_tokens(x: Float[Array, "batch *positions channels"]) -> Float[Array, "batch tokens channels"]:
    """Return the positions of a map row by row, and tokens as they are."""
    return rearrange(x, "b ... c -> b (...) c")


def resize(x: Float[Array, "batch h w channels"], grid: Shape) -> Float[Array, "batch height width channels"]:
    """Return maps of another size by bilinear interpolation, in float32 at least.

    As PyTorch's `interpolate(mode="bilinear", align_corners=False)`: between the centres of positions, and
    without antialias where a map becomes smaller.
    """
    x = x.astype(at_least_float32(x.dtype))
    if x.shape[1:3] == grid:
        return x
    shape = (len(x), *grid, x.shape[-1])
    return jax.image.resize(x, shape, "bilinear", antialias=False, precision=jax.lax.Precision.HIGHEST)


def pool(x: Float[Array, "batch h w channels"], grid: Shape) -> Float[Array, "batch height width channels"]:
    """Return maps of a smaller grid by averages, in float32 at least.

    As PyTorch's `adaptive_avg_pool2d`: position i of n is the mean from ⌊i·size/n⌋ to ⌈(i+1)·size/n⌉.
    """
    x = x.astype(at_least_float32(x.dtype))
    if x.shape[1:3] == tuple(grid):
        return x
    rows, columns = (jnp.asarray(_windows(*sides), x.dtype) for sides in zip(x.shape[1:3], grid, strict=True))
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision="highest")


def _windows(size: int, count: int) -> np.ndarray:
    """Return the weights of positions in each of so many windows."""
    positions = np.arange(size)
    first = np.arange(count) * size // count
    end = -(-(np.arange(count) + 1) * size // count)
    inside = (positions >= first[:, None]) & (positions < end[:, None])
    return inside / inside.sum(1, keepdims=True)


def nearest(
    x: Float[Array, "batch h w channels"], grid: Shape
) -> Float[Array, "batch height width channels"]:
    """Return maps of another grid, of which position i is that of ⌊i·size/n⌋, as PyTorch's `nearest`."""
    rows, columns = (np.arange(n) * size // n for size, n in zip(x.shape[1:3], grid, strict=True))
    return x[:, rows][:, :, columns]


def counted(
    where: Where | None, student: Float[Array | np.ndarray, "..."], teacher: Float[Array | np.ndarray, "..."]
) -> Bool[Array, " batch"]:
    """Return which images of a batch count; None is all.

    Raises:
        ValueError: the two taps are not of as many images, and would be broadcast.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"{len(student)} images of the student and {len(teacher)} of the teacher cannot be compared"
        )
    return jnp.ones(len(student), bool) if where is None else jnp.asarray(where)


def vectors(x: Float[Array | np.ndarray, "batch *positions channels"]) -> Float[Array, "batch channels"]:
    """Return a vector for each image, of a map or tokens the mean, in float32 at least."""
    x = jnp.asarray(x)
    x = x.astype(at_least_float32(x.dtype))
    return x if x.ndim == 2 else reduce(x, "b ... c -> b c", "mean")


def unit_vectors(x: Float[Array, "*positions channels"]) -> Float[Array, "*positions channels"]:
    """Return each position divided by its L2 norm, in float32 at least.

    Where all channels are 0 there is no direction: zeros stay, and have no gradient.
    """
    x = x.astype(at_least_float32(x.dtype))
    square = jnp.sum(x**2, -1, keepdims=True)
    points = square > 0
    return jnp.where(points, x / jnp.sqrt(jnp.where(points, square, 1)), 0)


class Embedding(nnx.Module):
    """Bring a tap to `features` channels: a kernel×kernel convolution without bias, then BatchNorm.

    On tokens, a 1×1 convolution is a dense layer, and a larger one is that of the square map they form.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        kernel: int = 3,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        norm: type[BatchNorm] = BatchNorm,
        rngs: nnx.Rngs,
    ):
        self.conv = conv(in_features, features, kernel, dtype=dtype, kernel_init=torch_uniform, rngs=rngs)
        self.norm = norm(features, group=bn_group, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "batch *positions in_features"],
        *,
        train: bool,
        where: Where | None = None,
    ) -> Float[Array, "batch *positions features"]:
        """Return the embedded tap, in the compute type."""
        if x.ndim == 4:
            return self.norm(self.conv(x), train=train, where=where)
        single = self.conv.kernel_size == (1, 1)
        as_if_map = rearrange(x, "b n c -> b n 1 c") if single else as_map(x)
        return as_tokens(self.norm(self.conv(as_if_map), train=train, where=where))


def embedding_of_vectors(in_features: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    """Make a linear layer with bias, of float32 at least, drawn as PyTorch does."""
    exact = at_least_float32(dtype)
    return nnx.Linear(
        in_features,
        features,
        dtype=exact,
        param_dtype=exact,
        kernel_init=torch_uniform,
        bias_init=uniform(in_features**-0.5),
        rngs=rngs,
    )


class Standardization(nnx.Module):
    """Standardise each channel by the statistics of all positions of all images of the training so far.

    y = (x − E[x]) / sqrt(Var[x] + 1e-5), in float32 at least. In training, the images of the batch that count
    join before: in proportion to their positions, as Chan, Golub and LeVeque (1979) merge two samples, so
    that no step weighs more than another, and what was seen first is standardised by itself. It has no
    parameters; its statistics are of the whole batch, on however many devices that lies.
    """

    epsilon: ClassVar[float] = 1e-5

    def __init__(self, features: int, *, dtype: DTypeLike = jnp.float32):
        exact = at_least_float32(dtype)
        self.mean = nnx.BatchStat(jnp.zeros(features, exact))
        self.var = nnx.BatchStat(jnp.ones(features, exact))
        self.count = nnx.BatchStat(jnp.zeros((), exact))  # of positions

    def __call__(
        self,
        x: Float[Array, "batch *positions channels"],
        *,
        train: bool,
        where: Where | None = None,
    ) -> Float[Array, "batch *positions channels"]:
        """Return `x` standardised, in float32 at least; in training, also let the statistics follow it."""
        y = as_tokens(x.astype(at_least_float32(x.dtype)))
        if train:
            self._follow(jax.lax.stop_gradient(y), where)
        mean, var = (rearrange(v[...], "c -> 1 1 c") for v in (self.mean, self.var))
        return ((y - mean) * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)

    def _follow(self, y: Float[Array, "batch tokens channels"], where: Where | None) -> None:
        counts = jnp.ones(len(y), bool) if where is None else jnp.asarray(where)
        count = jnp.sum(counts) * y.shape[1]
        counts = rearrange(counts, "b -> b 1 1")
        divisor = jnp.maximum(count, 1)
        mean = jnp.sum(y, (0, 1), keepdims=True, where=counts) / divisor
        var = jnp.sum((y - mean) ** 2, (0, 1), where=counts) / divisor
        total = self.count[...] + count
        share = count / jnp.maximum(total, 1)
        step = mean[0, 0] - self.mean[...]
        self.var[...] = (1 - share) * self.var[...] + share * var + share * (1 - share) * step**2
        self.mean[...] += share * step
        self.count[...] = total.astype(self.count.dtype)
