"""What `bench.input` reads: photographs, and ones whose decoding and resizing take no core.

Without JAX and PyTorch, for the processes that read import this.
"""

import time
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tat_jax.data.disk_folder import read
from tat_jax.data.source import Example
from tat_jax.data.transforms import random_resized_crop_box

SIZE = 224
SECONDS = 0.001  # that decoding and resizing an image take
HEIGHT, WIDTH = 375, 500  # as most of ImageNet's have


class Photographs:
    """Files as a source of the pipeline; labels are of no matter here."""

    num_classes = 1

    def __init__(self, files: tuple[str, ...]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path = self._files[index]
        return Example(read(path), 0, path)


class Asleep:
    """A sleep in place of decoding and resizing files, which any number share; they are read or in memory."""

    num_classes = 1

    def __init__(self, files: tuple[str, ...], read_files: bool):
        self._files, self._read_files = files, read_files
        self._image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path = self._files[index]
        if self._read_files:
            read(path)
        time.sleep(SECONDS)
        return Example(self._image, 0, path)


def draw(
    image: np.ndarray, label: Any, rng: np.random.Generator | None, data: ConfigDict
) -> tuple[np.ndarray, Any]:
    """Draw the crop that would be cut, and return the image as it is."""
    if rng is not None:
        random_resized_crop_box(HEIGHT, WIDTH, rng, data.crop_scale, data.crop_ratio)
        rng.random()
    return image, label
