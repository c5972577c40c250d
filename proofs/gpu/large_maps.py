"""The TaT loss, with its gradients, of maps of 16,641 positions, as a decoder gives them."""

import jax
import jax.numpy as jnp

from proofs.bench.loss import FUSED, compile_loss, draw_maps, torch_step
from proofs.bench.sidebyside import Row, compare_times
from proofs.report import announce
from tat_jax.losses import tat_loss

SIDE, CHANNELS, IMAGES = 129, 256, 4


def measure(side: int = SIDE, images: int = IMAGES) -> list[Row]:
    """Compare numbers of heads and types with PyTorch, whose attention is one kernel."""
    return [measure_one(side, images, heads, dtype) for heads in (1, 8) for dtype in ("bfloat16", "float32")]


def measure_one(side: int, images: int, heads: int, dtype: str) -> Row:
    """Compare one combination."""
    what = f"{images} × {side**2:,} × {CHANNELS}, {heads} head{'s' if heads > 1 else ''}, {dtype}"
    announce(what)
    maps = draw_maps((images, side, side, CHANNELS))
    arrays = [jnp.asarray(x, dtype) for x in maps]
    ours = compile_loss(tat_loss, arrays, heads)
    return compare_times(
        f"{what}, beside scaled_dot_product_attention",
        lambda: jax.block_until_ready(ours(*arrays)),
        torch_step(maps, heads, dtype, FUSED),
        bound=1.0,
    )
