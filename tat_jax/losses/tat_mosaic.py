"""The TaT loss of large maps as one kernel for TPUs, which keeps its scores on the chip.

`tat` holds the formula, `tat_blocks` that of the gradients; what is gained is in docs/pods.md.

The kernel's grid is that of the heads of images, and of blocks of queries; `tat_kernel` takes one of them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh
from jaxtyping import Array, Float

from tat_jax.losses.tat_blocks import Found, Heads, Wanted, errors_in_one_pass
from tat_jax.losses.tat_kernel import KEYS, QUERIES, SUBLANES, kernel

_LANES = 128
_TILE = 16  # channels that vector memory packs in half precision


def fits(query: Heads, key: Heads, value: Heads, target: Heads) -> bool:
    """Return whether the kernel takes such maps: of bfloat16, on TPUs whose vector memory holds a head.

    The TPUs are those of the mesh on which the query is known to lie while a step is traced; it must have one
    axis, and share the images evenly. All maps have as many channels.
    """
    maps = query, key, value, target
    if {x.dtype for x in maps} != {jnp.dtype("bfloat16")} or query.shape[-1] % _TILE:
        return False
    if len({x.shape[-1] for x in maps}) > 1:
        return False
    mesh = _mesh(query)
    shares = mesh.axis_types == (AxisType.Auto,) and len(query) % mesh.size == 0
    return shares and _held(key) <= _vector_memory(mesh)


def _mesh(x: Array) -> AbstractMesh:
    return jax.typeof(x).sharding.mesh


def _vector_memory(mesh: AbstractMesh) -> int:
    """Return the bytes of vector memory of a core of a mesh's devices; 0 if they are no TPUs."""
    with use_abstract_mesh(mesh):
        try:
            return tpu.get_tpu_info().vmem_capacity_bytes
        except ValueError:
            return 0


def _held(key: Heads) -> int:
    """Return the bytes of vector memory that the kernel takes where all gradients are wanted."""
    *_, positions, depth = key.shape
    lanes, size = _up(depth, _LANES), key.dtype.itemsize
    shared = _up(positions, KEYS) * (size * 2 * (lanes + depth) + 4 * 2 * lanes + 4 * QUERIES)
    blocks = 2 * size * 4 * depth * QUERIES  # of which the next lies beside each
    between = 4 * 2 * (QUERIES + KEYS) * (lanes + _LANES)  # results; half of it was enough
    return shared + blocks + between


def errors_on_chip(
    query: Heads,
    key: Heads,
    value: Heads,
    target: Heads,
    *,
    scale: float = 1.0,
    interpret: bool = False,
) -> Float[Array, " batch"]:
    """Return the sum of squared errors of each image, every device of the query's mesh those of its own.

    With `interpret` the kernel runs as a program of XLA's, on any device.
    """
    return errors_in_one_pass(functools.partial(_share, scale, interpret), query, key, value, target)


def _share(
    scale: float, interpret: bool, query: Heads, key: Heads, value: Heads, target: Heads, wanted: Wanted
) -> Found:
    mesh = _mesh(query)
    call = functools.partial(_call, scale=scale, wanted=wanted, interpret=interpret)
    if not mesh.empty:  # XLA splits whatever else a step does, but no kernel
        split = PartitionSpec(*mesh.axis_names)
        call = jax.shard_map(call, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    errors, *found = call(query, key, value, target)
    gradients = iter(found)
    return errors, tuple(next(gradients) if wants else None for wants in wanted)


def _call(
    query: Heads, key: Heads, value: Heads, target: Heads, *, scale: float, wanted: Wanted, interpret: bool
) -> tuple[Array, ...]:
    """Return each image's errors and the gradients that are wanted, in the maps' types."""
    batch, heads, queries, depth = query.shape
    keys = key.shape[2]
    rows, wide, tall = batch * heads, _up(queries, QUERIES), _up(keys, KEYS)

    def flat(x: Heads, to: int) -> Float[Array, "rows to depth"]:
        return jnp.pad(x.reshape(rows, -1, depth), ((0, 0), (0, to - x.shape[2]), (0, 0)))

    given = {
        "q.T": flat(query, wide),
        "t.T": flat(target, wide),
        "k": flat(key, tall),
        "v": flat(value, tall),
    }
    given |= {"k.T": given["k"], "v.T": given["v"]}
    given = {name: x.swapaxes(1, 2) if name.endswith(".T") else x for name, x in given.items()}
    found: dict[str, Any] = {"errors": jax.ShapeDtypeStruct((rows, SUBLANES, QUERIES), jnp.float32)}
    for name, wants in zip(("q.T", "k", "v", "t.T"), wanted, strict=True):
        if wants:
            dtype = query.dtype if name.endswith(".T") else jnp.float32
            found[name] = jax.ShapeDtypeStruct(given[name].shape, dtype)
    scores = rows * wide * tall
    errors, *gradients = pl.pallas_call(
        functools.partial(kernel, tuple(given), tuple(found), queries, keys, scale),
        grid=(rows, wide // QUERIES),
        in_specs=[_part(name, x) for name, x in given.items()],
        out_specs=[_part(name, x) for name, x in found.items()],
        out_shape=list(found.values()),
        scratch_shapes=[tpu.VMEM((tall, QUERIES), jnp.float32)],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_held(key)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * depth * (2 + (wanted.query or wanted.key) + sum(wanted[:3])),
            transcendentals=scores,
            bytes_accessed=sum(
                math.prod(x.shape) * x.dtype.itemsize for x in (*given.values(), *found.values())
            ),
        ),
        interpret=interpret,
        name="tat",
    )(*given.values())
    by_maps = (
        (x.swapaxes(1, 2)[:, :queries] if name.endswith(".T") else x[:, :keys])
        .reshape(batch, heads, -1, depth)
        .astype(query.dtype)
        for name, x in zip(list(found)[1:], gradients, strict=True)
    )
    return rearrange(errors, "(b n) s i -> b (n s i)", b=batch).sum(1), *by_maps


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _part(name: str, x: Any) -> pl.BlockSpec:
    """Return what of an array a step of the grid has need of: a block of queries, or all of a head."""
    _, rows, columns = x.shape
    if name in ("q.T", "t.T"):
        return pl.BlockSpec((None, rows, QUERIES), lambda row, block: (row, 0, block))
    once = pl.Buffered(1)
    return pl.BlockSpec((None, rows, columns), lambda row, block: (row, 0, 0), pipeline_mode=once)
