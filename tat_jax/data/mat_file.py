"""Matrices of whole numbers out of MATLAB's files of level 5, which are read and never executed.

Format: MathWorks, MAT-File Format, "Level 5 MAT-File Format". SciPy reads more of it, by recursion without a
bound and with what memory a file claims.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Integer

from tat_jax.data.transforms import MAX_PIXELS, DecodeError

_HEADER = 128
_ORDERS = {b"IM": "<", b"MI": ">"}  # of bytes, as the end of the header says
_LEVEL_5 = 1
_MOST = 2**28  # bytes of a variable that is compressed
_MATRIX, _COMPRESSED = 14, 15  # kinds of elements
_KINDS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_STRUCT, _NUMERIC = 2, range(6, 16)  # classes of matrices
_COMPLEX = 0x800


def read_matrix(file: bytes, path: Sequence[str], name: str) -> Integer[np.ndarray, "rows columns"]:
    """Return a matrix of whole numbers, by the name of its variable and those of the fields in it.

    Args:
        file: the whole of it.
        path: as in ("GTcls", "Segmentation").
        name: what errors call the file.

    Raises:
        DecodeError: it is of another kind, damaged, cut short, too large in memory, or has no such matrix.
    """
    try:
        order = _ORDERS.get(file[126:_HEADER], "")
        if not order or struct.unpack_from(f"{order}H", file, 124)[0] >> 8 != _LEVEL_5:
            raise ValueError(f"not a .mat of MATLAB 5 to 7 (save it with -v7); it begins with {file[:16]!r}")
        for variable in _matrices(memoryview(file)[_HEADER:], order):
            if _Matrix(variable, order).name == path[0]:
                return _numbers(_inner(_Matrix(variable, order), path))
        raise ValueError(f"has no variable {path[0]}")
    except (struct.error, zlib.error, StopIteration, OverflowError):
        raise DecodeError(name, "damaged, or cut short") from None
    except ValueError as error:
        raise DecodeError(name, str(error)) from None


class _Matrix:
    """An element that is a matrix: what comes before its content, and `content`, the elements after that."""

    def __init__(self, data: memoryview, order: str):
        self.order = order
        self.content = _elements(data, order)
        flags = struct.unpack_from(f"{order}I", next(self.content)[1])[0]
        self.of_class, self.is_complex = flags & 0xFF, bool(flags & _COMPLEX)
        dimensions = next(self.content)[1]
        self.shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
        self.name = bytes(next(self.content)[1]).decode("latin-1")


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Yield the kind and the bytes of elements that follow each other."""
    while data:
        kind, size = struct.unpack_from(f"{order}II", data)
        start = 8
        if kind >> 16:  # a small one, within its eight bytes
            kind, size, start = kind & 0xFFFF, kind >> 16, 4
        if start + size > len(data) or (start == 4 and size > 4):
            raise ValueError("damaged, or cut short")
        yield kind, data[start : start + size]
        end = start + size
        data = data[end if kind == _COMPRESSED else -(-end // 8) * 8 :]


def _matrices(data: memoryview, order: str) -> Iterator[memoryview]:
    """Yield the matrices of variables, what is compressed unpacked."""
    for kind, content in _elements(data, order):
        if kind == _COMPRESSED:
            unpacking = zlib.decompressobj()
            unpacked = unpacking.decompress(content, _MOST)
            if unpacking.unconsumed_tail:
                raise ValueError(f"has a variable of more than {_MOST:,} bytes")
            # Not StopIteration, which a generator may not let through.
            kind, content = next(_elements(memoryview(unpacked), order), (0, memoryview(b"")))
        if kind == _MATRIX:
            yield content


def _inner(matrix: _Matrix, path: Sequence[str]) -> _Matrix:
    """Return what a field of a structure holds, field by field."""
    for number, field in enumerate(path[1:], 1):
        where = ".".join(path[:number])
        if matrix.of_class != _STRUCT or matrix.shape != (1, 1):
            raise ValueError(f"{where} is no structure")
        (length,) = struct.unpack(f"{matrix.order}i", next(matrix.content)[1])
        if length < 1:
            raise ValueError("damaged, or cut short")
        text = bytes(next(matrix.content)[1])
        names = [text[i : i + length].split(b"\0")[0].decode("latin-1") for i in range(0, len(text), length)]
        if field not in names:
            raise ValueError(f"{where} has no field {field}")
        for _ in range(names.index(field)):
            next(matrix.content)
        matrix = _Matrix(next(matrix.content)[1], matrix.order)
    return matrix


def _numbers(matrix: _Matrix) -> Integer[np.ndarray, "rows columns"]:
    """Return the numbers of a matrix, which lie column by column, and may be stored in a smaller type."""
    is_plain = matrix.of_class in _NUMERIC and not matrix.is_complex
    if not is_plain or len(matrix.shape) != 2 or min(matrix.shape) < 1:
        raise ValueError("the label is no matrix of whole numbers")
    if math.prod(matrix.shape) > MAX_PIXELS:
        raise ValueError(f"{math.prod(matrix.shape):,} pixels, more than the {MAX_PIXELS:,} allowed")
    kind, content = next(matrix.content)
    if kind not in _KINDS or len(content) != np.dtype(_KINDS[kind]).itemsize * math.prod(matrix.shape):
        raise ValueError("damaged, or cut short")
    found = np.frombuffer(content, np.dtype(matrix.order + _KINDS[kind]))
    numbers = found.reshape(matrix.shape, order="F")
    if numbers.dtype.kind == "f":
        if not (np.isfinite(numbers) & (numbers == np.rint(numbers)) & (abs(numbers) < 2**31)).all():
            raise ValueError("the label is no matrix of whole numbers")
        numbers = numbers.astype(np.int32)
    return np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("="))
