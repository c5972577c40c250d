"""What the devices tell each other in a step, read from the compiled program."""

import math
import re
from collections import Counter
from collections.abc import Iterable

import jax

from configs import r18_r34
from proofs.fidelity.claim import Claim
from proofs.fidelity.our_step import blank_rows, compile_step

_COLLECTIVE = re.compile(
    r"= (.+?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")

Arrays = Counter[tuple[int, ...]]  # how many there are of each shape


def sent(program: str) -> tuple[int, Arrays]:
    """Return how many collective operations a program's text has, and the arrays that they carry."""
    operations, arrays = 0, Counter[tuple[int, ...]]()
    for line in program.splitlines():
        if match := _COLLECTIVE.search(line):
            operations += 1
            arrays.update(_key(map(int, filter(None, s.split(",")))) for s in _SHAPE.findall(match[1]))
    return operations, arrays


def bytes_sent(program: str) -> tuple[int, int]:
    """Return how many collective operations a program has, and the bytes of the float32 arrays they carry."""
    operations, arrays = sent(program)
    return operations, sum(4 * math.prod(shape) * count for shape, count in arrays.items())


def claims(*, devices: int = 8) -> list[Claim]:
    """Count what a step sends with BatchNorm's statistics over each device's images, and over all."""
    config = r18_r34.get_config("smoke")
    config.batch_size, config.bn_group = 2 * devices, 2
    program, state, _ = compile_step(config, blank_rows(config), devices=devices)
    operations, arrays = sent(program.as_text())
    known = Counter(_key(leaf.shape) for leaf in jax.tree.leaves((state.params, state.batch_stats)))
    beyond = arrays - known
    del beyond[()]
    config.bn_group = None
    whole_batch, _ = sent(compile_step(config, blank_rows(config), devices=devices).program.as_text())
    return [
        Claim(
            "bytes sent by a step beyond gradients, one group's running statistics and scalars",
            f"compiled program, {devices} devices, a group on each",
            sum(4 * math.prod(shape) * count for shape, count in beyond.items()),
            0,
        ),
        Claim("collective operations of a step", f"{devices} devices, a group on each", operations, None),
        Claim("  with statistics over the whole batch", f"{devices} devices", whole_batch, None),
    ]


def _key(shape: Iterable[int]) -> tuple[int, ...]:
    """Return a shape without its ones, in an order of its own: the compiler transposes and reshapes."""
    return tuple(sorted(size for size in shape if size > 1))
