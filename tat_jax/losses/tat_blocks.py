"""The TaT loss of large maps: the same sum in blocks of queries, memory linear in the positions.

`tat` holds the formula. Maps are split into heads here, `[batch, heads, positions, depth]`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from tat_jax.networks.layers import at_least_float32

# Scores of an image that the loss holds at once, 8 MiB in float32; larger maps it takes in blocks of queries.
SCORES = 2**21
# Those of a block on GPUs and TPUs, which with fewer wait for memory (docs/gpu.md,
# docs/pods.md): of an image at most, and of a batch, where that is more than `SCORES` an image.
LARGEST, _OF_BATCH = 2**23, 2**26

Heads = Float[Array, "batch heads _ _"]  # positions of one of two grids, and channels


def dot(equation: str, x: Array, y: Array) -> Array:
    """Return an einsum that is summed in float32 at least; of float32 it takes all bits, unlike TF32."""
    return jnp.einsum(equation, x, y, precision="highest", preferred_element_type=at_least_float32(y.dtype))


def score(query: Heads, key: Heads, scale: float) -> Heads:
    """Return scale · q kᵀ, scaled in float32 at least, as an operand of half precision would be rounded."""
    products = dot("bnid,bnjd->bnij", query, key)
    return products if scale == 1 else scale * products


def errors_in_blocks(
    query: Heads, key: Heads, value: Heads, target: Heads, *, scale: float = 1.0
) -> Float[Array, " batch"]:
    """Return the sum of squared errors of each image, without ever holding all scores.

    Each query's error is a term of its own in the sum, so its gradient is complete as soon as its scores are
    there: the pass over the blocks that sums the errors sums the gradients, too, and computes no score twice.
    """
    larger = max(SCORES, min(LARGEST, _OF_BATCH // len(query)))
    here, elsewhere = (
        functools.partial(errors_in_one_pass, functools.partial(_scan_blocks, scores, scale))
        for scores in (SCORES, larger)
    )
    return jax.lax.platform_dependent(query, key, value, target, cpu=here, default=elsewhere)


class Wanted(NamedTuple):
    """The maps by which a gradient is taken."""

    query: bool
    key: bool
    value: bool
    target: bool


Found = tuple[Float[Array, " batch"], tuple[Heads | None, ...]]
Pass = Callable[[Heads, Heads, Heads, Heads, Wanted], Found]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def errors_in_one_pass(
    one_pass: Pass, query: Heads, key: Heads, value: Heads, target: Heads
) -> Float[Array, " batch"]:
    """Return the sum of squared errors of each image by a pass that finds the gradients wanted, too.

    Args:
        one_pass: returns of query, key, value and target the errors and the errors' gradient by each map.
        query: of the positions that ask.
        key: of those that answer.
        value: of those that answer.
        target: of the positions that ask.
    """
    return one_pass(query, key, value, target, Wanted(False, False, False, False))[0]


def _forward(one_pass: Pass, *maps: Any) -> Found:
    query, key, value, target = (x.value for x in maps)
    return one_pass(query, key, value, target, Wanted(*(x.perturbed for x in maps)))


def _backward(_: Pass, gradients: tuple[Array | None, ...], by_errors: Any) -> tuple[Array | None, ...]:
    if isinstance(by_errors, jax.custom_derivatives.SymbolicZero):
        return (None,) * len(gradients)
    factor = rearrange(by_errors, "b -> b 1 1 1")
    return tuple(None if g is None else (factor * g).astype(g.dtype) for g in gradients)


errors_in_one_pass.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan_blocks(
    scores: int, scale: float, query: Heads, key: Heads, value: Heads, target: Heads, wanted: Wanted
) -> Found:
    """Return the sum of squared errors of each image, and its gradient by each map that is wanted.

    With w = softmax(c q kᵀ), c the scale, o = w v and e = o − t: ∂/∂t = −2e, ∂/∂v = wᵀ 2e, and with the
    gradient of the products s = c w ∘ (2e vᵀ − ⟨2e, o⟩): ∂/∂q = s k, ∂/∂k = sᵀ q.
    """
    _, heads, positions, _ = query.shape
    exact = at_least_float32(value.dtype)
    blocks = functools.partial(_blocks, size=max(1, scores // (heads * key.shape[2])))

    def step(sums: tuple[Array, Array | None, Array | None], block: tuple[Array, Array, Array]) -> Any:
        errors, by_key, by_value = sums
        q, t, counts = block
        weights = jax.nn.softmax(score(q, key, scale), axis=-1)
        out = dot("bnij,bnjd->bnid", weights.astype(value.dtype), value)
        error = (out - t) * counts
        errors += reduce(error**2, "b n i d -> b", "sum")
        by_out = (2 * error).astype(value.dtype)
        if by_value is not None:
            by_value += dot("bnij,bnid->bnjd", weights.astype(value.dtype), by_out)
        by_query = None
        if wanted.query or wanted.key:
            slope = dot("bnid,bnjd->bnij", by_out, value)
            mean_slope = reduce(by_out * out, "b n i d -> b n i 1", "sum")
            by_products = weights * (slope - mean_slope)
            by_products = (by_products if scale == 1 else scale * by_products).astype(key.dtype)
            if wanted.query:
                by_query = dot("bnij,bnjd->bnid", by_products, key).astype(query.dtype)
            if by_key is not None:
                by_key += dot("bnij,bnid->bnjd", by_products, q)
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
