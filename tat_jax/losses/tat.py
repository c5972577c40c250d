"""The Target-aware Transformer: every student position reconstructs the teacher's feature map.

Knowledge Distillation via the Target-aware Transformer, Lin et al., CVPR 2022, section 3. Feature maps are
`[batch, height, width, channels]`, tokens `[batch, positions, channels]`. Softmax and loss are computed in
float32 at least.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Batch, Where
from tat_jax.fields import POSITIVE, YES_OR_NO, Field, Former, Rule, one_of, or_none, whole
from tat_jax.losses import tat_fused
from tat_jax.losses.adapt import (
    Embedding,
    Standardization,
    as_tokens,
    grid_of,
    share_positions,
    tap_shapes,
    unit_vectors,
)
from tat_jax.losses.loss import TAPS, Loss
from tat_jax.losses.tat_blocks import SCORES, dot, errors_in_blocks, score
from tat_jax.networks.view import Outputs, OutputShapes

Places = Float[Array, "batch *positions channels"]


def target_aware_attention(
    query: Float[Array, "batch *asking depth"],
    key: Float[Array, "batch *answering depth"],
    value: Float[Array, "batch *answering channels"],
    *,
    heads: int = 1,
    scale: float = 1.0,
) -> Float[Array, "batch *asking channels"]:
    """Return, for every query position i, Σ_j softmax_j(scale · ⟨q_i, k_j⟩) v_j over the key's positions j.

    Per head, with channels split as `(heads d)`, heads first; normalised over the key's positions, as the
    paper's matrix form and its published code do, which have no factor 1/√d, scale 1. Scores are scaled in
    float32, after their sum. Returned in the value's type, float32 at least.

    Args:
        query: of the positions that ask, a map or tokens.
        key: of those that answer, likewise; the two need not be as many, nor both maps.
        value: of those that answer.
        heads: into which channels are split.
        scale: a number that is known when the computation is traced.

    Raises:
        ValueError: key and value differ in positions, query and key in channels, `heads` does not divide the
            channels, or `scale` is no number greater than 0.
    """
    check_places(heads=heads, scale=scale, query=query, key=key, value=value)
    q, k, v = (_split_heads(x, heads) for x in (query, key, value))
    weights = jax.nn.softmax(score(q, k, scale), axis=-1)
    out = dot("bnij,bnjd->bnid", weights.astype(v.dtype), v)
    out = out.reshape(*out.shape[:2], *query.shape[1:-1], out.shape[-1])
    return rearrange(out, "b n ... d -> b ... (n d)")


def tat_loss(
    query: Float[Array, "batch *asking depth"],
    key: Float[Array, "batch *answering depth"],
    value: Float[Array, "batch *answering channels"],
    target: Float[Array, "batch *asking channels"],
    *,
    heads: int = 1,
    scale: float = 1.0,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean squared error between the reconstruction and the teacher's features.

    ‖target − target_aware_attention(query, key, value)‖², averaged over every element as in the published
    code. Memory grows with the positions that ask plus those that answer, not with their product.

    Args:
        query: of the positions that ask, a map or tokens.
        key: of those that answer, likewise; the two need not be as many, nor both maps.
        value: of those that answer.
        target: of those that ask.
        heads: into which channels are split.
        scale: of the scores, as in `target_aware_attention`.
        where: the images that count; None is all.

    Raises:
        ValueError: query and target, or key and value, differ in positions; query and key, or value and
            target, in channels; `heads` does not divide the channels; or `scale` is no number greater than 0.
    """
    errors = reconstruction_errors(query, key, value, target, heads=heads, scale=scale)
    return jnp.mean(errors, where=where)


def reconstruction_errors(
    query: Float[Array, "batch *asking depth"],
    key: Float[Array, "batch *answering depth"],
    value: Float[Array, "batch *answering channels"],
    target: Float[Array, "batch *asking channels"],
    *,
    heads: int = 1,
    scale: float = 1.0,
) -> Float[Array, " batch"]:
    """Return the mean squared error of each image, as in `tat_loss`."""
    check_places(heads=heads, scale=scale, query=query, key=key, value=value, target=target)
    scores = heads * math.prod(query.shape[1:-1]) * math.prod(key.shape[1:-1])
    if scores <= SCORES:
        out = target_aware_attention(query, key, value, heads=heads, scale=scale)
        return reduce((out - target) ** 2, "b ... -> b", "mean")
    size = math.prod(target.shape[1:])
    if tat_fused.fits(query, key, value, heads=heads):
        return tat_fused.errors_fused(query, key, value, target, heads=heads, scale=scale) / size
    from tat_jax.losses import tat_mosaic  # here, because Pallas takes a while to import

    split = [_split_heads(x, heads) for x in (query, key, value, target)]
    errors = tat_mosaic.errors_on_chip if tat_mosaic.fits(*split) else errors_in_blocks
    return errors(*split, scale=scale) / size


def _split_heads(x: Places, heads: int) -> Float[Array, "batch heads tokens depth"]:
    return rearrange(x, "b ... (n d) -> b n (...) d", n=heads)


_SAME_POSITIONS = ("key", "value"), ("query", "target")
_SAME_CHANNELS = ("query", "key"), ("value", "target")
_SAME_IMAGES = (("query", "key"),)


def check_places(*, heads: int = 1, scale: float = 1.0, **arrays: Array) -> None:
    """Check that query, key, value and, if there is one, target fit together.

    Raises:
        ValueError: as `tat_loss` does.
    """
    for name, x in arrays.items():
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{name} is no map [batch, height, width, channels], nor tokens [batch, positions, "
                f"channels]: its shape is {x.shape}"
            )
    for pairs, what, axes in (
        (_SAME_POSITIONS, "images and positions", slice(-1)),
        (_SAME_CHANNELS, "channels", slice(-1, None)),
        (_SAME_IMAGES, "images", slice(1)),
    ):
        for first, second in pairs:
            if second in arrays and arrays[first].shape[axes] != arrays[second].shape[axes]:
                shapes = f"{arrays[first].shape} and {arrays[second].shape}"
                raise ValueError(f"{first} and {second} do not have the same {what}: {shapes}")
    for name in ("query", "value"):
        channels = arrays[name].shape[-1]
        if heads < 1 or channels % heads:
            raise ValueError(f"heads={heads} does not divide channels={channels}")
    if not isinstance(scale, Real) or not 0 < scale < math.inf:
        raise ValueError(f"scale={scale!r} is no number greater than 0 that is known before compilation")


ASKS = Field(
    "student",
    one_of("student", "teacher"),
    "whose positions ask: the student's as in the published code, or the teacher's as in the paper's text",
    optional=True,
    former=Former("per_teacher_position", YES_OR_NO, {False: "student", True: "teacher"}),
)


_BY_DEPTH = "1/sqrt(d)"
Scale = float | Literal["1/sqrt(d)"]
SCALE = Field(
    1.0,
    Rule(f"{POSITIVE.allowed}, or {_BY_DEPTH!r}", lambda value: value == _BY_DEPTH or POSITIVE.holds(value)),
    "of the scores: 1 as published, or 1/sqrt(d), d channels a head, so that wide features do not saturate",
    optional=True,
)
Norm = Literal["position", "channel"]


class TargetAwareTransformer(Loss):
    """The TaT loss of one pair of taps, maps or tokens, with its own embeddings.

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
        scale: of the scores, a number greater than 0; or "1/sqrt(d)", d the channels of a head.
        target_norm: of what is rebuilt; the key stays the teacher's tap. None, as published: the tap itself.
            "position": each position divided by its L2 norm. "channel": each channel standardised by running
            statistics, see `adapt.Standardization`.
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
        "scale": SCALE,
        "target_norm": Field(
            None,
            or_none(one_of("position", "channel")),
            "of what is rebuilt: each position divided by its L2 norm, or each channel standardised",
            optional=True,
        ),
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
        scale: Scale = 1.0,
        target_norm: Norm | None = None,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        for name, value in {"asks": asks, "scale": scale, "target_norm": target_norm}.items():
            rule = self.options[name].rule
            if not rule.holds(value):
                raise ValueError(f"{name}={value!r}: allowed is {rule.allowed}")
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
        self.scale = (teacher_features // heads) ** -0.5 if isinstance(scale, str) else float(scale)
        self.by_position = target_norm == "position"
        self.by_channel = Standardization(teacher_features, dtype=dtype) if target_norm == "channel" else None
        self.query = embedding(student_features)
        self.value = embedding(student_features)
        self.key = embedding(teacher_features) if trainable_key else None

    @classmethod
    def build(cls, student: OutputShapes, teacher: OutputShapes, **options: Any) -> Self:
        """Build the embeddings for the shapes of the two taps.

        Raises:
            ValueError: a tap has no positions, they differ although the student asks, tokens are no square
                over which a kernel goes, or the options do not fit the channels.
        """
        ours, theirs = tap_shapes(student, teacher, options)
        if options.get("asks", "student") == "student" and not share_positions(ours[:-1], theirs[:-1]):
            raise ValueError(
                f"the taps differ in positions: the student's is {list(ours[:-1])}, the teacher's "
                f"{list(theirs[:-1])}; with asks='teacher' they may"
            )
        if options.get("embedding_kernel", 3) > 1:
            embedded = {"student": ours} | ({"teacher": theirs} if options.get("trainable_key") else {})
            for which, shape in embedded.items():
                name = f"the {which}'s tap {options[f'{which}_tap']}"
                grid_of(shape, name, way_out="; embedding_kernel=1 embeds tokens one by one")
        return cls(ours[-1], theirs[-1], **options)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool = True
    ) -> Float[Array, " batch"]:
        """Return the TaT loss of each image's taps.

        Raises:
            ValueError: the student asks, and the two taps differ in positions.
        """
        of_student, of_teacher = student.taps[self.student_tap], teacher.taps[self.teacher_tap]
        how: dict[str, Any] = {"train": train, "where": batch.where}
        query = self.query(of_student, **how) if self.query else of_student
        value = self.value(of_student, **how) if self.value else of_student
        key = self.key(of_teacher, **how) if self.key else of_teacher
        target = self._normalize(of_teacher, **how)
        if self.asks == "teacher":
            query, key = key, query
        elif not share_positions(of_student.shape[1:-1], of_teacher.shape[1:-1]):
            raise ValueError(
                "the student's and the teacher's tap differ in [batch, positions]: "
                f"{of_student.shape[:-1]} and {of_teacher.shape[:-1]}"
            )
        if query.ndim != target.ndim:  # a map and tokens, which are its positions row by row
            query, key, value, target = map(as_tokens, (query, key, value, target))
        return reconstruction_errors(query, key, value, target, heads=self.heads, scale=self.scale)

    def _normalize(self, of_teacher: Places, *, train: bool, where: Where) -> Places:
        """Return what is rebuilt, in the tap's type as activations are."""
        if self.by_position:
            return unit_vectors(of_teacher).astype(of_teacher.dtype)
        if self.by_channel:
            return self.by_channel(of_teacher, train=train, where=where).astype(of_teacher.dtype)
        return of_teacher
