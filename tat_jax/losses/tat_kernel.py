"""What a TPU does of the TaT loss with one block of queries of one head: the kernel of `tat_mosaic`.

Keys and values of the head and the sums of the gradients by them stay in vector memory for all of its blocks.
Scores lie as `[keys, queries]`, so that sums over keys run along sublanes, and keys and values lie there both
as they are and turned, so that no product has to turn an operand.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

QUERIES = 256  # of a block
KEYS = 512  # to which a block attends at once
SUBLANES = 8


def kernel(
    inputs: tuple[str, ...], outputs: tuple[str, ...], queries: int, keys: int, scale: float, *refs: Any
) -> None:
    """Add a block of queries to the errors of a head, and to the gradients that are outputs.

    Args:
        inputs: names of the maps, of which `.T` ones are turned.
        outputs: "errors", and names of the maps by which a gradient is wanted.
        queries: positions that ask, without those that fill up blocks.
        keys: positions that answer, likewise.
        scale: by which products of queries and keys are multiplied, in float32.
        refs: of the inputs, the outputs and the scores.
    """
    given = dict(zip(inputs, refs, strict=False))
    found = dict(zip(outputs, refs[len(inputs) :], strict=False))
    scores, block = refs[-1], pl.program_id(1)

    @pl.when(block == 0)
    def _() -> None:
        for name in found.keys() & {"errors", "k", "v"}:
            found[name][...] = jnp.zeros_like(found[name])

    q = given["q.T"][...]
    out, inverse = _attend(q, given, scores, keys, scale)
    query = lax.broadcasted_iota(jnp.int32, out.shape, 1) + block * QUERIES
    error = jnp.where(query < queries, out - given["t.T"][...].astype(jnp.float32), 0)
    found["errors"][...] += _sums(error**2)
    if "t.T" in found:
        found["t.T"][...] = (-2 * error).astype(q.dtype)
    if found.keys() & {"q.T", "k", "v"}:
        by_out = (2 * error).astype(q.dtype).astype(jnp.float32)
        mean_slope = (by_out * out).sum(0, keepdims=True) * inverse
        # What weights lack to be normalised is made up for here.
        _go_back(q, (by_out * inverse).astype(q.dtype), mean_slope, given, found, scores, scale)


def _attend(q: Array, given: Mapping[str, Any], scores: Any, keys: int, scale: float) -> tuple[Array, Array]:
    """Return what queries reconstruct and the inverse sum of their weights, which take the scores' place."""
    chunks = scores.shape[0] // KEYS
    lowest = jnp.full((SUBLANES, QUERIES), -jnp.inf, jnp.float32)

    def score(chunk: Any, most: Array, *, last: bool = False) -> Array:
        s = _scaled(_dot(given["k"][_of(chunk), :], q), scale)
        if last:  # of what fills up the keys, only the last chunk has any
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 0) + chunk * KEYS < keys, s, -jnp.inf)
        scores[_of(chunk), :] = s
        return jnp.maximum(most, s.reshape(-1, SUBLANES, QUERIES).max(0))

    most = score(chunks - 1, lax.fori_loop(0, chunks - 1, score, lowest), last=True).max(0, keepdims=True)

    def weigh(chunk: Any, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        total, out = sums
        weights = jnp.exp(scores[_of(chunk), :] - most)
        scores[_of(chunk), :] = weights
        return total + _sums(weights), out + _dot(given["v.T"][:, _of(chunk)], weights.astype(q.dtype))

    nothing = jnp.zeros(lowest.shape, jnp.float32), jnp.zeros(q.shape, jnp.float32)
    total, out = lax.fori_loop(0, chunks, weigh, nothing)
    inverse = 1 / total.sum(0, keepdims=True)
    return out * inverse, inverse


def _go_back(
    q: Array,
    by_out: Array,
    mean_slope: Array,
    given: Mapping[str, Any],
    found: Mapping[str, Any],
    scores: Any,
    scale: float,
) -> None:
    """Add to the gradients by keys and values, and write that by the queries."""
    q_rows, by_out_rows = q.T, by_out.T

    def back(chunk: Any, by_query: Array) -> Array:
        weights = scores[_of(chunk), :]
        if "v" in found:
            found["v"][_of(chunk), :] += _dot(weights.astype(q.dtype), by_out_rows)
        if found.keys() & {"q.T", "k"}:
            by_scores = weights * (_dot(given["v"][_of(chunk), :], by_out) - mean_slope)
            by_products = _scaled(by_scores, scale).astype(q.dtype)
            if "k" in found:
                found["k"][_of(chunk), :] += _dot(by_products, q_rows)
            if "q.T" in found:
                by_query += _dot(given["k.T"][:, _of(chunk)], by_products)
        return by_query

    by_query = lax.fori_loop(0, scores.shape[0] // KEYS, back, jnp.zeros(q.shape, jnp.float32))
    if "q.T" in found:
        found["q.T"][...] = by_query.astype(q.dtype)


def _scaled(x: Array, scale: float) -> Array:
    return x if scale == 1 else scale * x


def _of(chunk: Any) -> Any:
    return pl.ds(pl.multiple_of(chunk * KEYS, KEYS), KEYS)


def _sums(x: Array) -> Array:
    """Return the sums over rows, eight of them, as no sublane has to move for them."""
    return x.reshape(-1, SUBLANES, x.shape[-1]).sum(0)


def _dot(x: Array, y: Array) -> Array:
    exact = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=exact, preferred_element_type=jnp.float32)
