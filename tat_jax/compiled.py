"""What a compiled program takes and what its devices send each other, as its compiler says."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")  # as bf16[64,7,7,512], f32[] and pred[8]


class Sent(NamedTuple):
    """An array that a collective operation carries."""

    shape: tuple[int, ...]
    bytes: int


class Collective(NamedTuple):
    """An operation between devices: its kind, as XLA calls it, and the arrays that it gives a device."""

    kind: str
    arrays: tuple[Sent, ...]


class Program(NamedTuple):
    """What a program takes of each device.

    Attributes:
        arguments: bytes of what it is called with.
        temporaries: bytes that it needs besides.
        code: bytes of itself.
        operations: in floating point, of one call.
        moved: bytes that one call reads from memory and writes to it.
        collectives: by kind, how many there are and the bytes that they carry.
    """

    arguments: int
    temporaries: int
    code: int
    operations: float
    moved: float
    collectives: Mapping[str, tuple[int, int]]

    @property
    def memory(self) -> int:
        """Return the bytes that it takes while it runs; what it gives lies where its arguments lay."""
        return self.arguments + self.temporaries + self.code


def describe(program: Any) -> Program:
    """Return what a `jax.stages.Compiled` takes."""
    sizes, cost = program.memory_analysis(), program.cost_analysis()
    operations, carried = Counter[str](), Counter[str]()
    for kind, arrays in collectives(program.as_text()):
        operations[kind] += 1
        carried[kind] += sum(array.bytes for array in arrays)
    return Program(
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        operations=cost["flops"],
        moved=cost["bytes accessed"],
        collectives={kind: (count, carried[kind]) for kind, count in operations.items()},
    )


def collectives(text: str) -> Iterator[Collective]:
    """Yield the collective operations of a compiled program's text."""
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            yield Collective(match[2], tuple(map(_sent, _ARRAY.finditer(match[1]))))


def _sent(array: re.Match[str]) -> Sent:
    name, bits, sizes = array.groups()
    shape = tuple(map(int, filter(None, sizes.split(","))))
    width = 8 if name == "pred" else int(bits)
    return Sent(shape, math.prod(shape) * width // 8)
