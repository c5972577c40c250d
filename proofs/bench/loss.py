"""The TaT loss with its gradients by query, key and value: ours, all scores at once, and PyTorch's.

`python -m proofs.bench.loss [--json FILE]`. One image; memory is what the compiled program needs besides
arguments and results. The last rows are of 16 images and the whole loss, embeddings included: a student of
7×7 positions under 16×16 tokens that ask, beside its map resized to theirs first.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from flax import nnx
from torch.nn import functional

from proofs.bench.sidebyside import Row, compare_bytes, compare_times, main
from proofs.report import announce
from proofs.torch_step import attend
from tat_jax.batch import Batch
from tat_jax.losses import target_aware_attention, tat_loss
from tat_jax.losses.adapt import resize
from tat_jax.losses.tat import TargetAwareTransformer
from tat_jax.networks.view import Outputs

SIDES = (7, 32, 64, 129)  # 49, 1,024, 4,096 and 16,641 positions
# Scores, weights and their gradients beyond this are not computed at once.
_LARGEST = 5 * 2**29
# PyTorch's: as it is written, and in one kernel.
FUSED = functools.partial(functional.scaled_dot_product_attention, scale=1.0)


def measure() -> list[Row]:
    """Compare every combination of positions, channels, heads and type."""
    rows = []
    for side in SIDES:
        for channels in (256, 512):
            for heads in (1, 8):
                for dtype in ("float32", "bfloat16"):
                    rows += measure_one(side, channels, heads, dtype)
    return rows + measure_two_grids(7, 16, (512, 768), images=16)


def measure_one(side: int, channels: int, heads: int, dtype: str) -> list[Row]:
    """Compare one combination."""
    what = f"{side**2:,} × {channels}, {heads} head{'s' if heads > 1 else ''}, {dtype}"
    announce(what)
    maps = draw_maps((1, side, side, channels))
    arrays = [jnp.asarray(x, dtype) for x in maps]
    ours, dense = (compile_loss(loss, arrays, heads) for loss in (tat_loss, _dense_loss))
    bytes_of = [step.memory_analysis().temp_size_in_bytes for step in (ours, dense)]
    aim = 160 if (side, channels, heads, dtype) == (129, 256, 1, "float32") else None
    rows = [compare_bytes(f"memory beside all scores at once, {what}", *bytes_of, bound=aim)]
    if bytes_of[1] <= _LARGEST:
        rows += [
            compare_times(
                f"time beside all scores at once, {what}",
                lambda: jax.block_until_ready(ours(*arrays)),
                lambda: jax.block_until_ready(dense(*arrays)),
                bound=1.0 if side == 64 else None,
            ),
            compare_times(
                f"time beside PyTorch, {what}",
                lambda: jax.block_until_ready(ours(*arrays)),
                torch_step(maps, heads, dtype),
                bound=None,
            ),
        ]
    return rows


def measure_two_grids(side: int, teacher_side: int, channels: tuple[int, int], *, images: int) -> list[Row]:
    """Compare tokens of a teacher that ask a map of the student's with that map resized to their grid."""
    what = f"{side}×{side}×{channels[0]} under {teacher_side}×{teacher_side}×{channels[1]} tokens"
    announce(what)
    rng = np.random.default_rng(0)
    student = jnp.asarray(rng.normal(size=(images, side, side, channels[0])), jnp.float32)
    teacher = jnp.asarray(rng.normal(size=(images, teacher_side**2, channels[1])), jnp.float32)
    asked = _compile_taps(student, teacher, "teacher", None)
    resized = _compile_taps(student, teacher, "student", (teacher_side, teacher_side))
    bytes_of = [step.memory_analysis().temp_size_in_bytes for step, _ in (asked, resized)]
    return [
        compare_bytes(f"memory beside resizing first, {what}", *bytes_of, bound=None),
        compare_times(
            f"time beside resizing first, {what}",
            functools.partial(_run, *asked, student, teacher),
            functools.partial(_run, *resized, student, teacher),
            bound=1.0,
        ),
    ]


def _compile_taps(
    student: jax.Array, teacher: jax.Array, asks: Literal["student", "teacher"], grid: tuple[int, int] | None
) -> tuple[Any, nnx.State]:
    """Compile the loss of two taps with its gradients by the embeddings and the student's map."""
    module = TargetAwareTransformer(
        student.shape[-1], teacher.shape[-1], asks=asks, scale="1/sqrt(d)", rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(module)
    batch = Batch(jnp.zeros((len(student), 1, 1, 3)), None, jnp.ones(len(student), bool))

    def loss(state: nnx.State, student: jax.Array, teacher: jax.Array) -> jax.Array:
        ours = resize(student, grid) if grid else student
        told, outputs = (Outputs(None, {"layer4": tap}) for tap in (teacher, ours))
        return jnp.mean(nnx.merge(graph, state, copy=True)(outputs, told, batch))

    step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(state, student, teacher)
    return step.compile(), state


def _run(step: Any, *arguments: Any) -> None:
    jax.block_until_ready(step(*arguments))


def draw_maps(shape: tuple[int, int, int, int]) -> list[np.ndarray]:
    """Draw query, key, value and target; the scores of the first two do not saturate."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, scale, shape).astype(np.float32) for scale in (0.3, 0.3, 1, 1)]


def _dense_loss(query: jax.Array, key: jax.Array, value: jax.Array, target: jax.Array, *, heads: int) -> Any:
    return jnp.mean((target_aware_attention(query, key, value, heads=heads) - target) ** 2)


def compile_loss(loss: Callable[..., Any], arrays: list[jax.Array], heads: int) -> Any:
    """Compile a loss of query, key, value and target with the gradients by the first three."""
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnames="heads")
    return step.lower(*arrays, heads=heads).compile()


def torch_step(
    maps: list[np.ndarray], heads: int, dtype: str, attention: Callable[..., torch.Tensor] = attend
) -> Callable[[], object]:
    """Return a function that computes the loss with the gradients in PyTorch, and waits for them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, t = (
        torch.from_numpy(rearrange(x, "b h w (n d) -> b n (h w) d", n=heads).copy())
        .to(device, getattr(torch, dtype))
        .requires_grad_(i < 3)
        for i, x in enumerate(maps)
    )

    def step() -> object:
        loss = ((attention(q, k, v) - t).float() ** 2).mean()
        gradients = torch.autograd.grad(loss, (q, k, v))
        if device == "cuda":
            torch.cuda.synchronize()
        return gradients

    return step


if __name__ == "__main__":
    main(__doc__, measure)
