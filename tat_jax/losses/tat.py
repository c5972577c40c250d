"""The Target-aware Transformer: every student position reconstructs the teacher's feature map.

Knowledge Distillation via the Target-aware Transformer, Lin et al., CVPR 2022, section 3. Feature maps are
`[batch, height, width, channels]`. Softmax and loss are computed in float32 at least.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import YES_OR_NO, Field, Former, one_of, whole
from tat_jax.losses import tat_fused
from tat_jax.losses.loss import TAPS, Loss
from tat_jax.losses.tat_blocks import SCORES, dot, errors_in_blocks
from tat_jax.networks.layers import BatchNorm, conv, torch_uniform
from tat_jax.networks.view import Outputs, OutputShapes

Map = Float[Array, "batch height width channels"]


def target_aware_attention(
    query: Float[Array, "batch rows columns depth"],
    key: Float[Array, "batch height width depth"],
    value: Float[Array, "batch height width channels"],
    *,
    heads: int = 1,
) -> Float[Array, "batch rows columns channels"]:
    """Return, for every query position i, Σ_j softmax_j(⟨q_i, k_j⟩) v_j over the positions j of the key.

    Per head, with channels split as `(heads d)`, heads first, and without the factor 1/√d; normalised over
    the key's positions, as the paper's matrix form and its published code do. Returned in the value's type,
    float32 at least.

    Raises:
        ValueError: key and value differ in height or width, query and key in channels, or `heads` does not
            divide the channels.
    """
    check_maps(heads=heads, query=query, key=key, value=value)
    q, k, v = (_split_heads(x, heads) for x in (query, key, value))
    weights = jax.nn.softmax(dot("bnid,bnjd->bnij", q, k), axis=-1)
    out = dot("bnij,bnjd->bnid", weights.astype(v.dtype), v)
    return rearrange(out, "b n (h w) d -> b h w (n d)", h=query.shape[1])


def tat_loss(
    query: Float[Array, "batch rows columns depth"],
    key: Float[Array, "batch height width depth"],
    value: Float[Array, "batch height width channels"],
    target: Float[Array, "batch rows columns channels"],
    *,
    heads: int = 1,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean squared error between the reconstruction and the teacher's feature map.

    ‖target − target_aware_attention(query, key, value)‖², averaged over every element as in the published
    code. `where` names the images that count. Memory grows with the positions, not with their square.

    Raises:
        ValueError: query and target, or key and value, differ in height or width; query and key, or value and
            target, in channels; or `heads` does not divide the channels.
    """
    return jnp.mean(reconstruction_errors(query, key, value, target, heads=heads), where=where)


def reconstruction_errors(
    query: Float[Array, "batch rows columns depth"],
    key: Float[Array, "batch height width depth"],
    value: Float[Array, "batch height width channels"],
    target: Float[Array, "batch rows columns channels"],
    *,
    heads: int = 1,
) -> Float[Array, " batch"]:
    """Return the mean squared error of each image, as in `tat_loss`."""
    check_maps(heads=heads, query=query, key=key, value=value, target=target)
    scores = heads * math.prod(query.shape[1:3]) * math.prod(key.shape[1:3])
    if scores <= SCORES:
        out = target_aware_attention(query, key, value, heads=heads)
        return reduce((out - target) ** 2, "b h w c -> b", "mean")
    size = math.prod(target.shape[1:])
    if tat_fused.fits(query, key, value, heads=heads):
        return tat_fused.errors_fused(query, key, value, target, heads=heads) / size
    from tat_jax.losses import tat_mosaic  # here, because Pallas takes a while to import

    split = [_split_heads(x, heads) for x in (query, key, value, target)]
    errors = tat_mosaic.errors_on_chip if tat_mosaic.fits(*split) else errors_in_blocks
    return errors(*split) / size


def _split_heads(x: Map, heads: int) -> Float[Array, "batch heads positions depth"]:
    return rearrange(x, "b h w (n d) -> b n (h w) d", n=heads)


_SAME_GRID = ("key", "value"), ("query", "target")
_SAME_CHANNELS = ("query", "key"), ("value", "target")
_SAME_IMAGES = (("query", "key"),)


def check_maps(*, heads: int = 1, **maps: Array) -> None:
    """Check that query, key, value and, if there is one, target fit together.

    Raises:
        ValueError: as `tat_loss` does.
    """
    for name, x in maps.items():
        if x.ndim != 4:
            raise ValueError(f"{name} is no map [batch, height, width, channels]: its shape is {x.shape}")
    for pairs, what, axes in (
        (_SAME_GRID, "[batch, height, width]", slice(3)),
        (_SAME_CHANNELS, "channels", slice(3, 4)),
        (_SAME_IMAGES, "images", slice(1)),
    ):
        for first, second in pairs:
            if second in maps and maps[first].shape[axes] != maps[second].shape[axes]:
                shapes = f"{maps[first].shape} and {maps[second].shape}"
                raise ValueError(f"{first} and {second} do not have the same {what}: {shapes}")
    for name in ("query", "value"):
        channels = maps[name].shape[-1]
        if heads < 1 or channels % heads:
            raise ValueError(f"heads={heads} does not divide channels={channels}")


class Embedding(nnx.Module):
    """Map a feature map to `features` channels: a kernel×kernel convolution without bias, then BatchNorm."""

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
        x: Float[Array, "batch height width in_features"],
        *,
        train: bool,
        where: Where | None = None,
    ) -> Float[Array, "batch height width features"]:
        """Return the embedded map, in the compute type."""
        return self.norm(self.conv(x), train=train, where=where)


ASKS = Field(
    "student",
    one_of("student", "teacher"),
    "whose positions ask: the student's as in the published code, or the teacher's as in the paper's text",
    optional=True,
    former=Former("per_teacher_position", YES_OR_NO, {False: "student", True: "teacher"}),
)


class TargetAwareTransformer(Loss):
    """The TaT loss of one pair of taps, with its own embeddings.

    query = γ(student), value = φ(student), key = θ(teacher). By default, as published, γ and φ are a 3×3
    convolution with BatchNorm each, and θ is the identity.

    Args:
        student_features: channels of the student's tap.
        teacher_features: channels of the teacher's tap.
        student_tap: its name among the student's outputs.
        teacher_tap: its name among the teacher's.
        heads: attention heads, a divisor of `teacher_features`.
        embedding_kernel: 3 or 1, the size of the embeddings' convolutions; 0 takes the maps themselves.
        trainable_key: embed the key, too.
        asks: whose positions ask. "student", as the matrix form and the published code: for each of the
            student's positions, weights over the teacher's; position i's reconstruction is compared with the
            teacher's position i, so both maps have one grid. "teacher", as the text of section 3.2: for each
            of the teacher's positions i, Σ_j softmax_j(⟨k_i, q_j⟩) v_j over the student's; the two grids may
            differ.
        dtype: the type of the embeddings' activations.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.

    Raises:
        ValueError: the channels or the options do not fit together.
    """

    name: ClassVar[str] = "tat"
    compares_taps: ClassVar[bool] = True
    has_parameters: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = {
        **TAPS,
        "heads": Field(1, whole(1), "attention heads", optional=True),
        "embedding_kernel": Field(
            3, one_of(0, 1, 3), "size of query's and value's convolutions; 0: the maps", optional=True
        ),
        "trainable_key": Field(False, YES_OR_NO, "embed the key as well", optional=True),
        "asks": ASKS,
    }

    def __init__(
        self,
        student_features: int,
        teacher_features: int,
        *,
        student_tap: str = "layer4",
        teacher_tap: str = "layer4",
        heads: int = 1,
        embedding_kernel: int = 3,
        trainable_key: bool = False,
        asks: Literal["student", "teacher"] = "student",
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or teacher_features % heads:
            raise ValueError(f"heads={heads} does not divide the teacher's {teacher_features} channels")
        if embedding_kernel not in (0, 1, 3):
            raise ValueError(f"embedding_kernel={embedding_kernel}: it is 3, 1, or 0 for the maps themselves")
        if embedding_kernel == 0 and trainable_key:
            raise ValueError("trainable_key needs an embedding: embedding_kernel=0 has none")
        if embedding_kernel == 0 and student_features != teacher_features:
            raise ValueError(
                f"embedding_kernel=0 needs taps of the same channels: the student's has {student_features}, "
                f"the teacher's {teacher_features}"
            )

        def embedding(in_features: int) -> Embedding | None:
            if embedding_kernel == 0:
                return None
            return Embedding(
                in_features,
                teacher_features,
                kernel=embedding_kernel,
                dtype=dtype,
                bn_group=bn_group,
                rngs=rngs,
            )

        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.heads = heads
        self.asks = asks
        self.query = embedding(student_features)
        self.value = embedding(student_features)
        self.key = embedding(teacher_features) if trainable_key else None

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the embeddings for the shapes of the two taps.

        Raises:
            ValueError: the taps are no maps, or of two grids although the student asks, or the options do not
                fit them.
        """
        ours, theirs = map_shapes(student, teacher, options)
        if options.get("asks", "student") == "student" and ours[:2] != theirs[:2]:
            raise ValueError(
                f"the taps differ in height and width: the student's is {list(ours[:2])}, the teacher's "
                f"{list(theirs[:2])}; with asks='teacher' they may"
            )
        return cls(ours[2], theirs[2], **options)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool = True
    ) -> Float[Array, " batch"]:
        """Return the TaT loss of each image's maps.

        Raises:
            ValueError: the student asks, and the two maps differ in height or width.
        """
        of_student, of_teacher = student.taps[self.student_tap], teacher.taps[self.teacher_tap]
        how: dict[str, Any] = {"train": train, "where": batch.where}
        query = self.query(of_student, **how) if self.query else of_student
        value = self.value(of_student, **how) if self.value else of_student
        key = self.key(of_teacher, **how) if self.key else of_teacher
        if self.asks == "teacher":
            query, key = key, query
        elif of_student.shape[:3] != of_teacher.shape[:3]:
            raise ValueError(
                "the student's and the teacher's tap differ in [batch, height, width]: "
                f"{of_student.shape[:3]} and {of_teacher.shape[:3]}"
            )
        return reconstruction_errors(query, key, value, of_teacher, heads=self.heads)


def map_shapes(
    student: OutputShapes, teacher: OutputShapes, options: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return [height, width, channels] of the student's and of the teacher's tap that options name.

    Raises:
        ValueError: one is no map.
    """
    ours, theirs = (
        outputs.taps[options[f"{which}_tap"]].shape[1:]
        for which, outputs in (("student", student), ("teacher", teacher))
    )
    if len(ours) != 3 or len(theirs) != 3:
        raise ValueError(
            f"the taps must be maps [height, width, channels]: the student's is {list(ours)}, "
            f"the teacher's {list(theirs)}"
        )
    return ours, theirs
