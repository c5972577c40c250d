"""The Target-aware Transformer: every student position reconstructs the teacher's feature map.

Knowledge Distillation via the Target-aware Transformer, Lin et al., CVPR 2022, section 3. Feature maps are
`[batch, height, width, channels]`. Softmax and loss are computed in float32 at least.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float

from tat_jax.layers import BatchNorm, conv, torch_uniform


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
    _check_same_shape(query=query, key=key, value=value)
    _, height, _, channels = query.shape
    if heads < 1 or channels % heads:
        raise ValueError(f"heads={heads} does not divide channels={channels}")
    q, k, v = (rearrange(x, "b h w (n d) -> b n (h w) d", n=heads) for x in (query, key, value))
    exact = jnp.promote_types(value.dtype, jnp.float32)
    scores = jnp.einsum("bnid,bnjd->bnij", q, k, preferred_element_type=exact)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("bnij,bnjd->bnid", weights, v, preferred_element_type=exact)
    return rearrange(out, "b n (h w) d -> b h w (n d)", h=height)


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
    code. `where` names the images that count.

    Raises:
        ValueError: the maps do not have one shape, or `heads` does not divide the channels.
    """
    _check_same_shape(query=query, target=target)
    out = target_aware_attention(query, key, value, heads=heads)
    error = jnp.mean((out - target.astype(out.dtype)) ** 2, axis=(1, 2, 3))
    return jnp.mean(error, where=where)


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
