"""The TaT loss of large maps by cuDNN's attention, which keeps its scores on the chip.

`tat` holds the formula. What is gained beside `tat_blocks` is in docs/gpu.md.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from tat_jax.networks.layers import at_least_float32

Map = Float[Array, "batch height width channels"]

_TILE = 64  # positions that cuDNN takes at once; of odd numbers it takes none
_HOPPER = 9.0


def fits(*maps: Map, heads: int) -> bool:
    """Return whether cuDNN attends to such maps: of one half-precision type, on a GPU of NVIDIA's.

    A head's channels have to be a multiple of 8, and 128 at most, from Hopper on 256.
    """
    if {x.dtype for x in maps} not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}):
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
        implementation: of `jax.nn.dot_product_attention`.
    """
    batch, height, width, _ = query.shape
    positions = height * width
    whole = ((0, 0), (0, -positions % _TILE), (0, 0), (0, 0))
    q, k, v = (
        jnp.pad(rearrange(x, "b h w (n d) -> b (h w) n d", n=heads), whole) for x in (query, key, value)
    )
    count = jnp.full(batch, positions, jnp.int32)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=1.0,
        query_seq_lengths=count,
        key_value_seq_lengths=count,
        implementation=implementation,
    )
    out = rearrange(out[:, :positions], "b (h w) n d -> b h w (n d)", h=height)
    return reduce((out.astype(at_least_float32(out.dtype)) - target) ** 2, "b h w c -> b", "sum")
