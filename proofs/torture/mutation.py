"""What mutation makes of good files."""

import io
import struct
import zipfile
from typing import Any

import numpy as np


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Return `data` with bytes changed, cut off, deleted, repeated, or taken from `other`."""
    for _ in range(int(rng.integers(1, 7))):
        # Half of the places are at the beginning, where headers are.
        limit = max(1, min(len(data), 600) if rng.random() < 0.5 else len(data))
        at, size = int(rng.integers(limit)), 1 << int(rng.integers(9))
        match int(rng.integers(8)):
            case 0 | 1:
                data = data[:at] + rng.bytes(1) + data[at + 1 :]
            case 2:
                data = (
                    data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
                    if data
                    else data
                )
            case 3:
                number = int(rng.choice([0, 1, 127, 255, 32_767, 65_535, (1 << 31) - 1, (1 << 32) - 1]))
                order: Any = rng.choice(["<I", ">I"])
                data = data[:at] + struct.pack(order, number) + data[at + 4 :]
            case 4:
                data = data[:at] if rng.random() < 0.3 else data
            case 5:
                data = data[:at] + data[at + size :]
            case 6:
                data = data[: at + size] + data[at:]
            case _:
                begin = int(rng.integers(max(1, len(other))))
                data = data[:at] + other[begin : begin + size] + data[at + size * int(rng.integers(2)) :]
    return data


def mutated_members(archive: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Return a sound archive around a pickle that is not, so that what it holds reaches the reader."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as read, zipfile.ZipFile(file, "w") as written:
        for member in read.namelist():
            data = read.read(member)
            chosen = member.endswith("data.pkl") or rng.random() < 0.01
            written.writestr(member, mutated(data, other, rng) if chosen else data)
    return file.getvalue()
