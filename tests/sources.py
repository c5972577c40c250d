"""Images in memory as a source, without JAX, as processes that read import this."""

import os
import time

import numpy as np

from tat_jax.data.source import Example
from tests.images import photograph


class Photographs:
    """So many different images in memory; `files` replaces some by files, and `read` notes what was read."""

    num_classes = 7

    def __init__(self, count: int, files: dict[int, bytes] | None = None):
        self.count = count
        self.files = files or {}
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        self.read.append(index)
        image = self.files.get(index, photograph(10, 12, seed=index))
        return Example(image, index % self.num_classes, f"photograph {index}")


class Slow(Photographs):
    """Each image takes 10 ms."""

    def __getitem__(self, index: int) -> Example:
        time.sleep(0.01)
        return super().__getitem__(index)


class Greedy(Photographs):
    """Image 20 wants more memory than there is."""

    def __getitem__(self, index: int) -> Example:
        if index == 20:
            np.empty(1 << 60, np.uint8)
        return super().__getitem__(index)


class Deadly(Photographs):
    """Image 20 ends the process that reads it, as a broken decoder does."""

    def __getitem__(self, index: int) -> Example:
        if index == 20:
            os.abort()
        return super().__getitem__(index)
