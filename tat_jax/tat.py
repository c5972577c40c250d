"""The Target-aware Transformer: every student position reconstructs the teacher's feature map.

Knowledge Distillation via the Target-aware Transformer, Lin et al., CVPR 2022, section 3. Feature maps are
`[batch, height, width, channels]`. Softmax and loss are computed in float32 at least.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from tat_jax.layers import BatchNorm, at_least_float32, conv, torch_uniform

# Scores of an image that the loss holds at once, 8 MiB in float32; larger maps it takes in blocks of queries.
_SCORES = 2**21


def target_aware_attention(
    query: Float[Array, "batch height width channels"],
    key: Float[Array, "batch height width channels"],
    value: Float[Array, "batch height width channels"],
    *,
    heads: int = 1,
) -> Float[Array, "batch height width channels"]:
    """Return, for every query position i, Σ_j softmax_j(⟨q_i, k_j⟩) v_j over the positions j.

    Per head, with channels split as `(heads d)`, heads first, and without the factor 1/√d; normalised over
    the key's positions, as the paper's matrix form and its published code do. Returned in the value's type,
    float32 at least.

    Raises:
        ValueError: the maps do not have one shape, or `heads` does not divide the channels.
    """
    _check_maps(heads, query=query, key=key, value=value)
    height = query.shape[1]
    q, k, v = (_split_heads(x, heads) for x in (query, key, value))
    return rearrange(_attend(q, k, v), "b n (h w) d -> b h w (n d)", h=height)


def tat_loss(
    query: Float[Array, "batch height width channels"],
    key: Float[Array, "batch height width channels"],
    value: Float[Array, "batch height width channels"],
    target: Float[Array, "batch height width channels"],
    *,
    heads: int = 1,
    where: Bool[Array, " batch"] | None = None,
) -> Float[Array, ""]:
    """Return the mean squared error between the reconstruction and the teacher's feature map.

    ‖target − target_aware_attention(query, key, value)‖², averaged over every element as in the published
    code. `where` names the images that count. Memory grows with the positions, not with their square.

    Raises:
        ValueError: the maps do not have one shape, or `heads` does not divide the channels.
    """
    _check_maps(heads, query=query, key=key, value=value, target=target)
    positions = query.shape[1] * query.shape[2]
    maps = (_split_heads(x, heads) for x in (query, key, value, target))
    errors = _errors_at_once if heads * positions**2 <= _SCORES else _errors_in_blocks
    return jnp.mean(errors(*maps) / (positions * query.shape[3]), where=where)


Heads = Float[Array, "batch heads positions depth"]


def _split_heads(x: Float[Array, "batch height width channels"], heads: int) -> Heads:
    return rearrange(x, "b h w (n d) -> b n (h w) d", n=heads)


def _attend(query: Heads, key: Heads, value: Heads) -> Heads:
    weights = jax.nn.softmax(_dot("bnid,bnjd->bnij", query, key), axis=-1)
    return _dot("bnij,bnjd->bnid", weights.astype(value.dtype), value)


def _dot(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=at_least_float32(y.dtype))


def _errors_at_once(query: Heads, key: Heads, value: Heads, target: Heads) -> Float[Array, " batch"]:
    """Return the sum of squared errors of each image."""
    return reduce((_attend(query, key, value) - target) ** 2, "b n i d -> b", "sum")


@jax.custom_vjp
def _errors_in_blocks(query: Heads, key: Heads, value: Heads, target: Heads) -> Float[Array, " batch"]:
    """Return what `_errors_at_once` returns, without ever holding all scores.

    Each query's error is a term of its own in the sum, so its gradient is complete as soon as its scores are
    there: the pass over the blocks that sums the errors sums the gradients, too, and computes no score twice.
    """
    return _scan_blocks(query, key, value, target, _Wanted(False, False, False, False))[0]


class _Wanted(NamedTuple):
    """The maps by which a gradient is taken."""

    query: bool
    key: bool
    value: bool
    target: bool


def _forward(*maps: Any) -> tuple[Array, tuple[Array | None, ...]]:
    query, key, value, target = (x.value for x in maps)
    return _scan_blocks(query, key, value, target, _Wanted(*(x.perturbed for x in maps)))


def _backward(gradients: tuple[Array | None, ...], by_errors: Any) -> tuple[Array | None, ...]:
    if isinstance(by_errors, jax.custom_derivatives.SymbolicZero):
        return (None,) * len(gradients)
    factor = rearrange(by_errors, "b -> b 1 1 1")
    return tuple(None if g is None else (factor * g).astype(g.dtype) for g in gradients)


_errors_in_blocks.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan_blocks(
    query: Heads, key: Heads, value: Heads, target: Heads, wanted: _Wanted
) -> tuple[Float[Array, " batch"], tuple[Heads | None, ...]]:
    """Return the sum of squared errors of each image, and its gradient by each map that is wanted.

    With w = softmax(q kᵀ), o = w v and e = o − t: ∂/∂t = −2e, ∂/∂v = wᵀ 2e, and with the scores' gradient
    s = w ∘ (2e vᵀ − ⟨2e, o⟩): ∂/∂q = s k, ∂/∂k = sᵀ q.
    """
    _, heads, positions, _ = query.shape
    exact = at_least_float32(value.dtype)
    blocks = functools.partial(_blocks, size=max(1, _SCORES // (heads * positions)))

    def step(sums: tuple[Array, Array | None, Array | None], block: tuple[Array, Array, Array]) -> Any:
        errors, by_key, by_value = sums
        q, t, counts = block
        weights = jax.nn.softmax(_dot("bnid,bnjd->bnij", q, key), axis=-1)
        out = _dot("bnij,bnjd->bnid", weights.astype(value.dtype), value)
        error = (out - t) * counts
        errors += reduce(error**2, "b n i d -> b", "sum")
        by_out = (2 * error).astype(value.dtype)
        if by_value is not None:
            by_value += _dot("bnij,bnid->bnjd", weights.astype(value.dtype), by_out)
        by_query = None
        if wanted.query or wanted.key:
            slope = _dot("bnid,bnjd->bnij", by_out, value)
            mean_slope = reduce(by_out * out, "b n i d -> b n i 1", "sum")
            by_scores = (weights * (slope - mean_slope)).astype(key.dtype)
            if wanted.query:
                by_query = _dot("bnij,bnjd->bnid", by_scores, key).astype(query.dtype)
            if by_key is not None:
                by_key += _dot("bnij,bnid->bnjd", by_scores, q)
        by_target = (-2 * error).astype(target.dtype) if wanted.target else None
        return (errors, by_key, by_value), (by_query, by_target)

    start = (
        jnp.zeros(len(query), exact),
        jnp.zeros(key.shape, exact) if wanted.key else None,
        jnp.zeros(value.shape, exact) if wanted.value else None,
    )
    counts = jnp.ones((1, 1, positions, 1), exact)
    (errors, by_key, by_value), of_blocks = jax.lax.scan(
        step, start, (blocks(query), blocks(target), blocks(counts))
    )
    by_query, by_target = (None if g is None else _joined(g, positions) for g in of_blocks)
    by_key = None if by_key is None else by_key.astype(key.dtype)
    by_value = None if by_value is None else by_value.astype(value.dtype)
    return errors, (by_query, by_key, by_value, by_target)


def _blocks(x: Array, *, size: int) -> Float[Array, "blocks batch heads size depth"]:
    """Cut positions into blocks, the last one filled up with zeros."""
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size), (0, 0)))
    return rearrange(padded, "b n (k i) d -> k b n i d", i=size)


def _joined(blocks: Float[Array, "blocks batch heads size depth"], positions: int) -> Heads:
    return rearrange(blocks, "k b n i d -> b n (k i) d")[:, :, :positions]


def _check_maps(heads: int, **maps: Array) -> None:
    _check_same_shape(**maps)
    channels = maps["query"].shape[-1]
    if heads < 1 or channels % heads:
        raise ValueError(f"heads={heads} does not divide channels={channels}")


def _check_same_shape(**maps: Array) -> None:
    (first, expected), *others = maps.items()
    for name, x in others:
        if x.shape != expected.shape or x.ndim != 4:
            raise ValueError(
                f"{first} and {name} do not have one shape [batch, height, width, channels]: "
                f"{expected.shape} and {x.shape}"
            )


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
        rngs: nnx.Rngs,
    ):
        self.conv = conv(in_features, features, kernel, dtype=dtype, kernel_init=torch_uniform, rngs=rngs)
        self.norm = BatchNorm(features, group=bn_group, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "batch height width in_features"],
        *,
        train: bool,
        where: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, "batch height width features"]:
        """Return the embedded map, in the compute type."""
        return self.norm(self.conv(x), train=train, where=where)


class TargetAwareTransformer(nnx.Module):
    """Compute the TaT loss of one tap, with its own embeddings.

    query = γ(student), value = φ(student), key = θ(teacher). By default, as published, γ and φ are a 3×3
    convolution with BatchNorm each, and θ is the identity.

    Args:
        student_features: channels of the student's tap.
        teacher_features: channels of the teacher's tap.
        heads: attention heads, a divisor of `teacher_features`.
        embedding_kernel: 3 or 1, the size of the embeddings' convolutions; 0 takes the maps themselves.
        trainable_key: embed the key, too.
        per_teacher_position: normalise over the student's positions for each of the teacher's, as the text
            of section 3.2 has it: Σ_j softmax_j(⟨k_i, q_j⟩) v_j reconstructs the teacher's position i. By
            default over the teacher's for each of the student's, as the matrix form and the published code.
        dtype: the type of the embeddings' activations.
        bn_group: images over which batch statistics are taken; None is the whole batch.
        rngs: the key stream `params`.

    Raises:
        ValueError: the channels or the options do not fit together.
    """

    def __init__(
        self,
        student_features: int,
        teacher_features: int,
        *,
        heads: int = 1,
        embedding_kernel: int = 3,
        trainable_key: bool = False,
        per_teacher_position: bool = False,
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

        self.heads = heads
        self.per_teacher_position = per_teacher_position
        self.query = embedding(student_features)
        self.value = embedding(student_features)
        self.key = embedding(teacher_features) if trainable_key else None

    def __call__(
        self,
        student: Float[Array, "batch height width student_features"],
        teacher: Float[Array, "batch height width teacher_features"],
        *,
        train: bool = True,
        where: Bool[Array, " batch"] | None = None,
    ) -> Float[Array, ""]:
        """Return the TaT loss of the student's map against the teacher's.

        Raises:
            ValueError: the two maps differ in height or width.
        """
        if student.shape[:3] != teacher.shape[:3]:
            raise ValueError(
                "the student's and the teacher's tap differ in [batch, height, width]: "
                f"{student.shape[:3]} and {teacher.shape[:3]}"
            )
        query = self.query(student, train=train, where=where) if self.query else student
        value = self.value(student, train=train, where=where) if self.value else student
        key = self.key(teacher, train=train, where=where) if self.key else teacher
        if self.per_teacher_position:
            query, key = key, query
        return tat_loss(query, key, value, teacher, heads=self.heads, where=where)
