"""Batches of a source: the same ones whatever the number of threads and of processes, from any step."""

import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Integer
from ml_collections import ConfigDict

from tat_jax.batch import Batch
from tat_jax.data.source import Example, Source, spread
from tat_jax.data.sources import open_source
from tat_jax.data.transforms import DecodeError, decode
from tat_jax.tasks import TASKS
from tat_jax.tasks.task import Label, Task

# Rows that one thread makes at a time. Less than a batch, so that all threads work on the first batch of an
# epoch and on the last; enough that handing them over costs nothing.
_ROWS = 32
# Bytes that a thread keeps for pixels: those of 2048² in RGB. A larger image gets memory of its own.
_MEMORY = 3 * 2048**2


class Pipeline:
    """Decode, transform and batch the images of a source.

    Order and augmentation of an image follow from the seed, the epoch and the image alone. The last batch of
    an epoch is padded, never dropped.

    Args:
        source: the images.
        task: transforms them with their labels.
        data: how they are transformed, as in `configs/base.py`.
        batch_size: images a step, over all processes.
        train: shuffle and augment; else each image comes once, in order, as it is evaluated.
        seed: not negative.
        process_index: which rows of each batch come here.
        process_count: how many processes share a batch evenly.
        threads: that read ahead; 0 reads in the caller's.

    Attributes:
        source: the images.
        steps_per_epoch: batches an epoch.
        skipped: names of the files that did not decode, by index. `data.skip_broken` asks for that;
            else the first one stops the iteration.

    Raises:
        ValueError: the processes cannot share a batch, or the task cannot transform as `data` says.
    """

    def __init__(
        self,
        source: Source,
        task: Task,
        data: ConfigDict,
        *,
        batch_size: int,
        train: bool,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        threads: int,
    ):
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {process_count} processes")
        task.check(data)
        self.source = source
        self.steps_per_epoch = -(-len(source) // batch_size)
        self.skipped: dict[int, str] = {}
        self._task = task
        self._data = data
        self._decoding: dict[str, Any] = {
            "grey_range": data.grey_range and tuple(data.grey_range),
            "exif_orientation": data.exif_orientation,
        }
        self._blank_label = task.blank_label(data)
        self._batch_size = batch_size
        self._local_size = batch_size // process_count
        self._first_row = process_index * self._local_size
        self._parts = -(-self._local_size // _ROWS)
        self._train = train
        self._seed = seed
        self._threads = threads
        self._of_thread = threading.local()

    def epoch(self, index: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield this process's rows of the batches of epoch `index` from `start_step` on.

        Raises:
            DecodeError: a file is no image, unless `data.skip_broken`.
            ValueError: a label is not of the task's kind.
        """
        order = self._order(index)
        parts = grain.MapDataset.range(start_step * self._parts, self.steps_per_epoch * self._parts)
        reader = iter(
            parts.map(lambda part: self._try_rows(index, order, part)).to_iter_dataset(
                grain.ReadOptions(
                    num_threads=self._threads, prefetch_buffer_size=max(self._threads, 2 * self._parts)
                )
            )
        )
        try:
            while rows := list(islice(reader, self._parts)):
                for part in rows:
                    if isinstance(part, Exception):
                        raise part
                yield jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
        finally:
            reader.close()

    def names(self, epoch: int, step: int) -> list[str]:
        """Return the names of this process's images of a batch."""
        first = step * self._batch_size + self._first_row
        chosen = self._order(epoch)[first : first + self._local_size]
        return [self.source[index].name for index in chosen.tolist()]

    def look(self, count: int) -> Iterator[tuple[np.ndarray, Label, str]]:
        """Yield `count` images as the first epoch has them, with their labels and names.

        In training they are its first ones; in evaluation, where classes come one after the other, they are
        spread evenly. Those that do not decode are left out if `data.skip_broken`.
        """
        order = self._order(0)
        if not self._train:
            order = order[spread(len(order), count)]
        for index in order[:count].tolist():
            example = self.source[index]
            try:
                image, label = self._transform(example, 0, index)
            except DecodeError:
                if not self._data.skip_broken:
                    raise
                continue
            yield image, label, example.name

    def _order(self, epoch: int) -> np.ndarray:
        order = np.arange(len(self.source))
        if self._train:
            self._rng(epoch, 0).shuffle(order)
        return order

    def _try_rows(self, epoch: int, order: np.ndarray, part: int) -> Batch | Exception:
        """Return an exception instead of raising it: Grain would add remarks of its own to its message."""
        try:
            return self._rows(epoch, order, part)
        except Exception as error:
            return error

    def _rows(self, epoch: int, order: np.ndarray, part: int) -> Batch:
        """Return consecutive rows; those that the source does not fill are zero, their labels blank."""
        step, part = divmod(part, self._parts)
        rows = min(_ROWS, self._local_size - part * _ROWS)
        first = step * self._batch_size + self._first_row + part * _ROWS
        size, blank = self._data.image_size, self._blank_label
        images = np.zeros((rows, size, size, 3), np.uint8)
        labels = None if blank is None else np.full((rows, *blank.shape), blank)
        where = np.zeros(rows, bool)
        for row, index in enumerate(order[first : first + rows].tolist()):
            example = self.source[index]
            try:
                images[row], label = self._transform(example, epoch, index)
            except DecodeError:
                if not self._data.skip_broken:
                    raise
                self.skipped[index] = example.name
                continue
            where[row] = True
            if labels is not None:
                labels[row] = label
        return Batch(images, labels, where)

    def _memory(self) -> np.ndarray:
        """Return this thread's memory for the pixels of one image."""
        if not hasattr(self._of_thread, "memory"):
            self._of_thread.memory = np.empty(_MEMORY, np.uint8)
        return self._of_thread.memory

    def _transform(self, example: Example, epoch: int, index: int) -> tuple[np.ndarray, Label]:
        image = example.image
        if isinstance(image, bytes):
            image = decode(image, example.name, self._memory(), **self._decoding)
        rng = self._rng(epoch, 1 + index) if self._train else None
        try:
            image, label = self._task.transform(image, example.label, rng, self._data)
            _check_label(label, self._blank_label)
        except DecodeError:
            raise
        except ValueError as error:
            raise ValueError(f"{example.name}: {error}") from error
        return image, label

    def _rng(self, epoch: int, stream: int) -> np.random.Generator:
        """Return a generator of its own for the order (stream 0) and for each image of an epoch."""
        return np.random.default_rng((self._seed, epoch, stream))


def _check_label(label: Label, blank: Integer[np.ndarray, "..."] | None) -> None:
    """Raise a ValueError unless a label has the shape and the kind of the blank one."""
    if blank is None or (isinstance(label, int) and not blank.shape):
        return
    found = np.asarray(label)
    if found.shape != blank.shape or not np.can_cast(found.dtype, blank.dtype, "same_kind"):
        has = "no label" if label is None else f"a label of {found.dtype}{list(found.shape)}"
        raise ValueError(f"it has {has}, and the task takes {blank.dtype}{list(blank.shape)}")


def open_pipeline(config: ConfigDict, split: str, *, batch_size: int | None = None) -> Pipeline:
    """Open the split `train` or `val` of a config's data for its task and this process.

    Args:
        config: as the functions in `configs/` return it.
        split: "train" or "val".
        batch_size: instead of the config's.

    Raises:
        FileNotFoundError: the images are not there.
        ValueError: the config does not fit them or itself.
    """
    return Pipeline(
        open_source(config.data, split),
        TASKS[config.task](),
        config.data,
        batch_size=batch_size or config.batch_size,
        train=split == "train",
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
    )
