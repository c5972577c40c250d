"""Tensors of weight files: views of raw storages, checked before they become arrays."""

import math
from typing import Any, NamedTuple

import numpy as np

Entries = dict[str, np.ndarray]  # by name

_MAX_DIMENSIONS = 32


class RefusedError(ValueError):
    """A file holds what no weight file holds."""


class Storage:
    """Raw numbers of one type; in a legacy file their bytes follow later."""

    def __init__(self, dtype: np.dtype, size: int):
        self.dtype, self.size = dtype, size
        self.bytes = b""
        self.views: dict[Any, np.ndarray] = {}


class Tensor(NamedTuple):
    """A view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Return its numbers; tensors that are one view of one storage are one array.

        Raises:
            RefusedError: it is not within its storage.
        """
        self._check()
        storage, *view = self
        if (key := tuple(view)) not in storage.views:
            flat = np.frombuffer(storage.bytes, storage.dtype)[self.offset :]
            steps = [stride * storage.dtype.itemsize for stride in self.strides]
            array = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False).copy()
            storage.views[key] = array
        return storage.views[key]

    def _check(self) -> None:
        storage, offset, shape, strides = self
        if not all(
            isinstance(numbers, tuple) and len(numbers) <= _MAX_DIMENSIONS for numbers in (shape, strides)
        ):
            raise RefusedError("a tensor has no shape and strides that a tensor can have")
        if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
            raise RefusedError("a tensor has a negative size, stride or offset")
        if len(storage.bytes) != storage.size * storage.dtype.itemsize:
            raise RefusedError(f"a storage of {storage.size} elements has {len(storage.bytes)} bytes")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count > storage.size or (count and last >= storage.size):
            raise RefusedError(f"a tensor of shape {shape} reaches beyond its {storage.size} elements")
