"""The TaT loss of large maps by cuDNN's attention, which keeps its scores on the chip.

`tat` holds the formula. What is gained beside `tat_blocks` is in docs/gpu.md.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from tat_jax.networks.layers import at_least_float32

Map = Float[Array, "batch *_"]  # or tokens, of one of two numbers of positions

_TILE = 64  # positions that cuDNN takes at once; of odd numbers it takes none
_HOPPER = 9.0


def fits(*maps: Map, heads: int) -> bool:
    """Return whether cuDNN attends to such maps: of one half-precision type, on a GPU of NVIDIA's.

    A head's channels have to be a multiple of 8, and 128 at most, from Hopper on 256; those of values as many
    as those of keys.
    """
    if {x.dtype for x in maps} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
        return False
    if len({x.shape[-1] for x in maps}) > 1:
        return False
    capability = _capability()
    depth = maps[0].shape[-1] // heads
    return capability >= 8 and depth % 8 == 0 and depth <= (256 if capability >= _HOPPER else 128)


def _capability() -> float:
    """Return the compute capability of this process's GPUs; 0 where there is none of NVIDIA's."""
    device = jax.local_devices()[0]
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version
    return float(device.compute_capability) if is_cuda else 0.0


def errors_fused(
    query: Map,
    key: Map,
    value: Map,
    target: Map,
    *,
    heads: int,
    scale: float = 1.0,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, " batch"]:
    """Return the sum of squared errors of each image.

    The reconstruction is rounded to the maps' type, as an activation is; errors are float32 at least.

    Args:
        query: of the positions that ask.
        key: of those that answer.
        value: of those that answer.
        target: of the positions that ask.
        heads: into which channels are split.
        scale: of the scores, by which cuDNN multiplies them in float32.
        implementation: of `jax.nn.dot_product_attention`.
    """
    batch, positions = len(query), math.prod(query.shape[1:-1])
    q, k, v = (_tokens(x, heads) for x in (query, key, value))
    count, keys = (jnp.full(batch, math.prod(x.shape[1:-1]), jnp.int32) for x in (query, key))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        query_seq_lengths=count,
        key_value_seq_lengths=keys,
        implementation=implementation,
    )
    out = rearrange(out[:, :positions], "b i n d -> b i (n d)")
    target = rearrange(target, "b ... c -> b (...) c")
    return reduce((out.astype(at_least_float32(out.dtype)) - target) ** 2, "b i c -> b", "sum")


def _tokens(x: Map, heads: int) -> Float[Array, "batch tokens heads depth"]:
    """Return positions as a sequence of heads, filled up to whole tiles."""
    tokens = rearrange(x, "b ... (n d) -> b (...) n d", n=heads)
    return jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % _TILE), (0, 0), (0, 0)))
