"""The Target-aware Transformer of large maps: within groups of patches, and between anchors.

Knowledge Distillation via the Target-aware Transformer, Lin et al., CVPR 2022, section 3.3, as in its
published code for semantic segmentation. `tat` holds the attention and its loss. Feature maps are
`[batch, height, width, channels]`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import NOT_NEGATIVE, YES_OR_NO, Field, Rule, one_of, whole
from tat_jax.losses.adapt import Embedding, map_shapes
from tat_jax.losses.loss import TAPS, Loss
from tat_jax.losses.tat import ASKS, check_places, reconstruction_errors
from tat_jax.networks.layers import BatchNorm, at_least_float32
from tat_jax.networks.view import Outputs, OutputShapes

Map = Float[Array, "batch _ _ _"]  # of one of two grids
Pair = tuple[int, int]
Form = Literal["stack", "batch", "sum"]


def patch_group_loss(
    query: Float[Array, "batch rows columns depth"],
    key: Float[Array, "batch height width depth"],
    value: Float[Array, "batch height width channels"],
    target: Float[Array, "batch rows columns channels"],
    *,
    patches: Pair,
    groups: int,
    form: Form = "stack",
) -> Float[Array, " batch"]:
    """Return the TaT loss of each image within groups of patches, the mean squared error over every element.

    Maps are cut from the top left into patches of ⌊height/n⌋ × ⌊width/m⌋ positions, row by row, as many as
    there are, which may be more than n·m; what does not fill one is dropped. The channels of the patches are
    put one behind the other, c' = patch·channels + c, and split into `groups` heads: where groups divide the
    patches, the position y, x of consecutive patches is one token.

    Args:
        query: of the positions that ask.
        key: of those that answer.
        value: of those that answer.
        target: of the positions that ask.
        patches: (n, m), how many of them along the height and the width.
        groups: of patches, a divisor of patches · channels.
        form: "stack", as said. "batch" splits the channels of each patch alone into `groups` heads. "sum" is
            the same, with the sum over the patches instead of their mean.

    Raises:
        ValueError: maps do not fit together, patches are more than positions, the two grids have not as many
            patches, or groups do not divide the channels.
    """
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: it is {', '.join(map(repr, get_args(Form)))}")
    _check_maps(query, key, value, target)
    count = _count(query.shape[1:3], key.shape[1:3], patches)
    layout = "b p q (r s c)" if form == "stack" else "(b r s) p q c"
    for x in (query, value):
        channels = count * x.shape[-1] if form == "stack" else x.shape[-1]
        if groups < 1 or channels % groups:
            of = f"{count} patches of {x.shape[-1]} channels" if form == "stack" else f"{channels} channels"
            raise ValueError(f"groups={groups} does not divide {of}")
    errors = reconstruction_errors(
        *(_cut(x, patches, layout) for x in (query, key, value, target)), heads=groups
    )
    if form == "stack":
        return errors
    return reduce(errors, "(b n) -> b", "mean" if form == "batch" else "sum", b=len(query))


def anchor_loss(
    query: Float[Array, "batch rows columns depth"],
    key: Float[Array, "batch height width depth"],
    value: Float[Array, "batch height width channels"],
    target: Float[Array, "batch rows columns channels"],
    *,
    anchors: Pair,
) -> Float[Array, " batch"]:
    """Return the TaT loss of each image between anchors, means over ⌊height/h⌋ × ⌊width/w⌋ positions.

    The means are those of patches as in `patch_group_loss`; one head attends.

    Args:
        query: of the positions that ask.
        key: of those that answer.
        value: of those that answer.
        target: of the positions that ask.
        anchors: (h, w), how many of them along the height and the width.

    Raises:
        ValueError: maps do not fit together, or anchors are more than positions.
    """
    _check_maps(query, key, value, target)
    return reconstruction_errors(*(_pool(x, anchors) for x in (query, key, value, target)))


def _check_maps(query: Array, key: Array, value: Array, target: Array) -> None:
    for name, x in (("query", query), ("key", key), ("value", value), ("target", target)):
        if x.ndim != 4:
            raise ValueError(f"{name} is no map [batch, height, width, channels]: its shape is {x.shape}")
    check_places(query=query, key=key, value=value, target=target)


def _count(asking: tuple[int, ...], answering: tuple[int, ...], patches: Pair) -> int:
    """Return how many patches both grids are cut into.

    Raises:
        ValueError: there are more patches than positions, or not as many in one grid as in the other.
    """
    counts = []
    for height, width in (asking, answering):
        rows, columns = _size(height, width, "patches", patches)
        counts.append((height // rows, width // columns))
    if counts[0] != counts[1]:
        raise ValueError(
            f"patches={patches} cut the grid of {asking[0]}×{asking[1]} positions that ask into {counts[0]}, "
            f"and that of {answering[0]}×{answering[1]} that answer into {counts[1]}; take a number that "
            "divides both"
        )
    return counts[0][0] * counts[0][1]


def _size(height: int, width: int, what: str, count: Pair) -> Pair:
    """Return the positions, along the height and the width, of one of so many patches or anchors of a map."""
    if not (1 <= count[0] <= height and 1 <= count[1] <= width):
        raise ValueError(
            f"{what}={count} are not from 1 to the {height}×{width} positions of the map: take fewer, or "
            "larger images"
        )
    return height // count[0], width // count[1]


def _cut(x: Map, patches: Pair, layout: str) -> Float[Array, "_ _ _ _"]:
    covered, size = _cover(x, "patches", patches)
    return rearrange(covered, f"b (r p) (s q) c -> {layout}", **size)


def _pool(x: Map, anchors: Pair) -> Float[Array, "batch rows columns channels"]:
    covered, size = _cover(x, "anchors", anchors)
    return reduce(covered, "b (r p) (s q) c -> b r s c", "mean", **size)


def _cover(x: Map, what: str, count: Pair) -> tuple[Float[Array, "batch _ _ channels"], dict[str, int]]:
    """Return the part of a map that whole patches or anchors cover, and the positions of one."""
    height, width = x.shape[1:3]
    p, q = _size(height, width, what, count)
    return x[:, : height // p * p, : width // q * q], {"p": p, "q": q}


class ImageNorm(BatchNorm):
    """BatchNorm in groups of one image, whose running statistics follow each in turn, not the first alone."""

    def _update_running(
        self,
        mean: Float[Array, "g c"],
        var: Float[Array, "g c"],
        count: Float[Array, " g"],
        where: Where | None,
    ) -> None:
        """Let running statistics follow those of all groups, as a call for each would, in one sum."""
        counts = jnp.ones(len(mean), mean.dtype) if where is None else jnp.asarray(where).astype(mean.dtype)
        later = jnp.cumsum(counts[::-1])[::-1] - counts
        weight = (self.momentum * (1 - self.momentum) ** later * counts)[:, None]
        before = (1 - self.momentum) ** jnp.sum(counts)
        unbiased = var * (count / jnp.maximum(count - 1, 1))[:, None]
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            followed = reduce(weight * jax.lax.stop_gradient(new), "g c -> c", "sum")
            running[...] = before * running[...] + followed


_PAIR = Rule(
    "two whole numbers from 1 on",
    lambda value: (
        isinstance(value, tuple | list) and len(value) == 2 and all(type(n) is int and n >= 1 for n in value)
    ),
)


class PatchAnchor(Loss):
    """β·(TaT within groups of patches) + γ·(TaT between anchors) of one pair of taps.

    Both share the embeddings: query and value of the student's map, key of the teacher's, each a 1×1
    convolution without bias and BatchNorm over each image alone. The target is the teacher's map itself.
    Defaults are those of the published run with a ResNet-18 on VOC.

    Args:
        student_shape: [height, width, channels] of the student's tap.
        teacher_shape: likewise of the teacher's.
        student_tap: its name among the student's outputs.
        teacher_tap: its name among the teacher's.
        patches: along the height and the width, as in `patch_group_loss`.
        groups: of patches.
        anchors: along the height and the width, as in `anchor_loss`.
        patch_weight: β.
        anchor_weight: γ.
        form: of the loss within patches.
        statistics: of the embeddings' BatchNorm, over each "image", or as those of the networks over the
            "batch", in groups of `bn_group`.
        trainable_key: False takes the teacher's map itself as the key.
        asks: whose positions ask, as in `tat`.
        dtype: the type of the embeddings' activations.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.

    Raises:
        ValueError: the two shapes and the options do not fit together.
    """

    name: ClassVar[str] = "patch_anchor"
    compares_taps: ClassVar[bool] = True
    has_parameters: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = {
        **TAPS,
        "patches": Field((16, 16), _PAIR, "along the height and the width", optional=True),
        "groups": Field(64, whole(1), "of patches; `heads` of the published scripts", optional=True),
        "anchors": Field((32, 32), _PAIR, "along the height and the width", optional=True),
        "patch_weight": Field(1.0, NOT_NEGATIVE, "β, of the loss within patches", optional=True),
        "anchor_weight": Field(0.4, NOT_NEGATIVE, "γ, of the loss between anchors", optional=True),
        "form": Field("stack", one_of(*get_args(Form)), "of the loss within patches", optional=True),
        "statistics": Field(
            "image",
            one_of("image", "batch"),
            "over which the embeddings' BatchNorm goes",
            optional=True,
        ),
        "trainable_key": Field(True, YES_OR_NO, "embed the key as well", optional=True),
        "asks": ASKS._replace(former=None),
    }

    def __init__(
        self,
        student_shape: tuple[int, ...],
        teacher_shape: tuple[int, ...],
        *,
        student_tap: str,
        teacher_tap: str,
        patches: Pair = (16, 16),
        groups: int = 64,
        anchors: Pair = (32, 32),
        patch_weight: float = 1.0,
        anchor_weight: float = 0.4,
        form: Form = "stack",
        statistics: Literal["image", "batch"] = "image",
        trainable_key: bool = True,
        asks: Literal["student", "teacher"] = "student",
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: Any,
    ):
        features = teacher_shape[-1]
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.patches, self.groups, self.form = patches, groups, form
        self.anchors = anchors
        self.patch_weight, self.anchor_weight = patch_weight, anchor_weight
        self.asks = asks
        self._check(student_shape, teacher_shape)

        def embedding(in_features: int) -> Embedding:
            how: dict[str, Any] = {"bn_group": 1, "norm": ImageNorm}
            if statistics == "batch":
                how = {"bn_group": bn_group}
            return Embedding(in_features, features, kernel=1, dtype=dtype, rngs=rngs, **how)

        self.query = embedding(student_shape[-1])
        self.key = embedding(features) if trainable_key else None
        self.value = embedding(student_shape[-1])

    def _check(self, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...]) -> None:
        """Compute the loss of such shapes without computing it, so that what does not fit is said at once."""
        if not self.patch_weight and not self.anchor_weight:
            raise ValueError("patch_weight and anchor_weight are both 0: give the term the weight 0 instead")
        if self.asks == "student" and student_shape[:2] != teacher_shape[:2]:
            raise ValueError(
                f"the taps differ in height and width: the student's is {list(student_shape[:2])}, the "
                f"teacher's {list(teacher_shape[:2])}; with asks='teacher' they may"
            )
        features = teacher_shape[-1]
        ours, theirs = (
            jax.ShapeDtypeStruct((1, *shape[:2], features), jnp.float32)
            for shape in (student_shape, teacher_shape)
        )
        jax.eval_shape(self._compare, ours, theirs, ours, theirs)

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the embeddings for the shapes of the two taps.

        Raises:
            ValueError: the taps are no maps, or patches, groups and anchors do not fit them.
        """
        # Lists, if a config was JSON; what is static must have a hash.
        pairs: dict[str, Any] = {
            name: tuple(options[name]) for name in ("patches", "anchors") if name in options
        }
        return cls(*map_shapes(student, teacher, options), **options | pairs)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return β·patch-group loss + γ·anchor loss of each image."""
        of_student, of_teacher = student.taps[self.student_tap], teacher.taps[self.teacher_tap]
        how: dict[str, Any] = {"train": train, "where": batch.where}
        query, value = self.query(of_student, **how), self.value(of_student, **how)
        key = self.key(of_teacher, **how) if self.key else of_teacher
        return self._compare(query, key, value, of_teacher)

    def _compare(self, query: Map, key: Map, value: Map, target: Map) -> Float[Array, " batch"]:
        if self.asks == "teacher":
            query, key = key, query
        maps = query, key, value, target
        total = jnp.zeros(len(query), at_least_float32(query.dtype))
        if self.patch_weight:
            within = patch_group_loss(*maps, patches=self.patches, groups=self.groups, form=self.form)
            total += self.patch_weight * within
        if self.anchor_weight:
            total += self.anchor_weight * anchor_loss(*maps, anchors=self.anchors)
        return total
