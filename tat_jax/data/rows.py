"""Rows of batches: images decoded, transformed, labelled; without JAX, as processes that read import it."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from ml_collections import ConfigDict

from tat_jax.data.source import Example, Label, Source
from tat_jax.data.transforms import DecodeError, decode

# Bytes that a thread keeps for pixels: those of 2048² in RGB. A larger image gets memory of its own.
MEMORY = 3 * 2048**2
_OF_THREAD = threading.local()

Transform = Callable[[np.ndarray, Label, np.random.Generator | None, ConfigDict], tuple[np.ndarray, Label]]


class Rows:
    """Decode and transform the images of a source into rows of batches.

    What becomes of an image follows from the seed, the epoch and its index alone.

    Args:
        source: the images.
        transform: as `Task.transform` has it.
        data: how images are transformed, as in `configs/base.py`.
        blank_label: stands for the label of a row without image; None where images have no labels.
        train: augment; else images are transformed as they are evaluated.
        seed: not negative.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        data: ConfigDict,
        blank_label: Integer[np.ndarray, "..."] | None,
        *,
        train: bool,
        seed: int,
    ):
        self.source = source
        self._transform = transform
        self._data = data
        self._decoding = decoding(data)
        self._blank_label = blank_label
        self._train = train
        self._seed = seed

    def fill(
        self,
        images: UInt8[np.ndarray, "rows size size 3"],
        labels: Integer[np.ndarray, "rows ..."] | None,
        where: Bool[np.ndarray, " rows"],
        epoch: int,
        indices: Integer[np.ndarray, " rows"],
    ) -> dict[int, str]:
        """Write the images of an epoch into rows, all that lay there before included.

        Args:
            images: is written.
            labels: is written; None where images have no labels.
            where: becomes False for rows without an image: they are zero, and their labels blank.
            epoch: that of the augmentation.
            indices: of the images; −1 is no image.

        Returns:
            The names of the files that did not decode, by index.

        Raises:
            DecodeError: a file is no image, unless `data.skip_broken`.
            ValueError: a label is not of the task's kind.
        """
        skipped = {}
        for row, (index, rng) in enumerate(self._generators(epoch, indices.tolist())):
            label: Label = self._blank_label if labels is not None else None
            where[row] = index >= 0
            if index >= 0:
                try:
                    images[row], label = self.make(self.source[index], rng)
                except DecodeError as error:
                    if not self._data.skip_broken:
                        raise
                    skipped[index] = error.name
                    where[row] = False
            if not where[row]:
                images[row] = 0
            if labels is not None:
                labels[row] = label
        return skipped

    def _generators(self, epoch: int, indices: list[int]) -> list[tuple[int, np.random.Generator | None]]:
        """Return with each index what is random of its image."""
        # All at once: after each image, what makes them would have left the core's caches.
        return [
            (index, random(self._seed, epoch, 1 + index) if self._train and index >= 0 else None)
            for index in indices
        ]

    def make(self, example: Example, rng: np.random.Generator | None) -> tuple[np.ndarray, Label]:
        """Return an image and its label as they stand in a row.

        Args:
            example: the image.
            rng: that of the image and its epoch; None as it is evaluated.

        Raises:
            DecodeError: the file is no image.
            ValueError: the label is not of the task's kind.
        """
        image = example.image
        if isinstance(image, bytes):
            image = decode(image, example.name, _memory(), **self._decoding)
        try:
            image, label = self._transform(image, example.label, rng, self._data)
            if rng is None:
                label = _on_canvas(label, self._blank_label)
            _check_label(label, self._blank_label)
        except DecodeError:
            raise
        except ValueError as error:
            raise ValueError(f"{example.name}: {error}") from error
        return image, label


def decoding(data: ConfigDict) -> dict[str, Any]:
    """Return how a config's `data` has images decoded, as options of `decode`."""
    return {
        "grey_range": data.grey_range and tuple(data.grey_range),
        "exif_orientation": data.exif_orientation,
    }


def random(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """Return a generator of its own for the order (stream 0) and for each image of an epoch."""
    words = (seed, epoch, stream)
    # The same numbers from an array, in three quarters of the time.
    return np.random.default_rng(np.array(words, np.uint32) if max(words) < 2**32 else words)


def _memory() -> np.ndarray:
    """Return this thread's memory for the pixels of one image."""
    if not hasattr(_OF_THREAD, "memory"):
        _OF_THREAD.memory = np.empty(MEMORY, np.uint8)
    return _OF_THREAD.memory


def _on_canvas(label: Label, blank: Integer[np.ndarray, "..."] | None) -> Label:
    """Return a map that is smaller than the blank one as the top left of that; any other label as it is."""
    if blank is None or not isinstance(label, np.ndarray) or not label.ndim == blank.ndim == 2:
        return label
    height, width = label.shape
    if label.shape == blank.shape or height > blank.shape[0] or width > blank.shape[1]:
        return label
    canvas = blank.copy()
    canvas[:height, :width] = label
    return canvas


def _check_label(label: Label, blank: Integer[np.ndarray, "..."] | None) -> None:
    """Raise a ValueError unless a label has the shape and the kind of the blank one."""
    if blank is None or (isinstance(label, int) and not blank.shape):
        return
    found = np.asarray(label)
    if found.shape != blank.shape or not np.can_cast(found.dtype, blank.dtype, "same_kind"):
        has = "no label" if label is None else f"a label of {found.dtype}{list(found.shape)}"
        raise ValueError(f"it has {has}, and the task takes {blank.dtype}{list(blank.shape)}")
