"""What vision transformers consist of, under timm's names."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.networks.layers import LayerNorm, at_least_float32, normal, torch_uniform, uniform
from tat_jax.networks.vit_positions import rotate

Tokens = Float[Array, "batch tokens width"]
# Of each token cosines and sines, see `vit_positions.rotations`.
Rotations = tuple[Float[Array, "tokens channels"], Float[Array, "tokens channels"]]

HEAD = 64  # channels of an attention head, in all networks that are published
_LAYER_SCALE = 1e-5  # at the start


def linear(
    channels: int, features: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """Make a linear layer as timm starts it."""
    return nnx.Linear(
        channels,
        features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=at_least_float32(dtype),
        kernel_init=normal(0.02),
        rngs=rngs,
    )


class Patches(nnx.Conv):
    """A convolution of patches that do not overlap, as one matrix product."""

    def __init__(self, size: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.size = size
        super().__init__(
            3,
            width,
            (size, size),
            strides=size,
            padding="VALID",
            dtype=dtype,
            param_dtype=at_least_float32(dtype),
            kernel_init=torch_uniform,
            bias_init=uniform((3 * size**2) ** -0.5),
            rngs=rngs,
        )

    def __call__(
        self, inputs: Float[Array, "batch height width channels"], out_sharding: object = None
    ) -> Float[Array, "batch rows columns features"]:
        """Return a token of each patch."""
        assert self.bias is not None
        size, dtype = self.size, inputs.dtype
        patches = rearrange(inputs, "b (h p) (w q) c -> b h w (p q c)", p=size, q=size)
        kernel = rearrange(self.kernel[...].astype(dtype), "p q c o -> (p q c) o")
        return patches @ kernel + self.bias[...].astype(dtype)[None, None, None]


class PatchEmbed(nnx.Module):
    """Patches as tokens."""

    def __init__(self, size: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.proj = Patches(size, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch rows columns features"]:
        """Return a map of tokens."""
        return self.proj(images)


class Attention(nnx.Module):
    """Self-attention of all tokens, softmax(q kᵀ / √d) v in each head, whose softmax is float32 at least.

    Args:
        width: channels of a token; those of a head are 64, or all where a token has less.
        bias: "qkv" of queries, keys and values; "qv" of queries and values, which are then arrays of their
            own, as DINOv3 has it; "" is none.
        dtype: the type of activations.
        rngs: the key stream `params`.
    """

    def __init__(self, width: int, *, bias: str, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads = max(width // HEAD, 1)
        self.qkv = linear(width, 3 * width, use_bias=bias == "qkv", dtype=dtype, rngs=rngs)
        if bias == "qv":
            self.q_bias, self.v_bias = (
                nnx.Param(jnp.zeros(width, at_least_float32(dtype))) for _ in range(2)
            )
        self.has_own_biases = bias == "qv"
        self.proj = linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Tokens, rotations: Rotations | None) -> Tokens:
        """Return what each token reads of all, its query and key turned by its rotation."""
        qkv = self.qkv(x)
        if self.has_own_biases:
            q_bias, v_bias = self.q_bias[...], self.v_bias[...]
            bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
            qkv += bias.astype(qkv.dtype)[None, None]
        # Heads before tokens, so that both products below find them where they want them.
        query, key, value = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        if rotations is not None:
            query, key = rotate(query, *rotations), rotate(key, *rotations)
        query = query / math.sqrt(query.shape[-1])
        exact = at_least_float32(x.dtype)
        scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=exact)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        read = jnp.einsum("bhqk,bhkd->bhqd", weights, value)
        return self.proj(rearrange(read, "b h n d -> b n (h d)"))


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU between them; or SwiGLU, fc2(silu(a) · b) with [a, b] = fc1(x).

    A SwiGLU's inner channels are two thirds of four times the width, rounded up to a multiple of eight, as
    in https://github.com/facebookresearch/dinov2.
    """

    def __init__(self, width: int, *, gated: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        inner = (int(4 * width * 2 / 3) + 7) // 8 * 8 if gated else 4 * width
        self.gated = gated
        self.fc1 = linear(width, 2 * inner if gated else inner, dtype=dtype, rngs=rngs)
        self.fc2 = linear(inner, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        """Return the features."""
        x = self.fc1(x)
        if self.gated:
            gate, x = jnp.split(x, 2, axis=-1)
            return self.fc2(jax.nn.silu(gate) * x)
        return self.fc2(jax.nn.gelu(x, approximate=False))


class LayerScale(nnx.Module):
    """A factor of each channel, from Going deeper with Image Transformers, Touvron et al., ICCV 2021."""

    def __init__(self, width: int, *, dtype: DTypeLike):
        self.gamma = nnx.Param(jnp.full(width, _LAYER_SCALE, at_least_float32(dtype)))


class Block(nnx.Module):
    """x + γ₁ · attention(norm(x)), then likewise with γ₂ and the MLP.

    Args:
        width: channels of a token.
        bias: of the attention.
        gated: the MLP is a SwiGLU.
        scale: where the factors γ are: "ls", in modules `ls1` and `ls2`; "gamma", arrays `gamma_1` and
            `gamma_2`, as timm has them of DINOv3; "" is without.
        epsilon: of both normalisations.
        dtype: the type of activations.
        rngs: the key stream `params`.
    """

    def __init__(
        self,
        width: int,
        *,
        bias: str,
        gated: bool,
        scale: str,
        epsilon: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.scale = scale
        self.norm1 = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.attn = Attention(width, bias=bias, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width, gated=gated, dtype=dtype, rngs=rngs)
        if scale == "ls":
            self.ls1, self.ls2 = LayerScale(width, dtype=dtype), LayerScale(width, dtype=dtype)
        elif scale == "gamma":
            self.gamma_1, self.gamma_2 = (LayerScale(width, dtype=dtype).gamma for _ in range(2))

    def __call__(self, x: Tokens, rotations: Rotations | None) -> Tokens:
        """Return the block's output."""
        x = x + self._scaled(self.attn(self.norm1(x), rotations), 1)
        return x + self._scaled(self.mlp(self.norm2(x)), 2)

    def _scaled(self, x: Tokens, which: int) -> Tokens:
        if not self.scale:
            return x
        gamma = getattr(self, f"ls{which}").gamma if self.scale == "ls" else getattr(self, f"gamma_{which}")
        return x * gamma[...].astype(x.dtype)[None, None]
