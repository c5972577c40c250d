"""Batches of a source: the same ones whatever the number of threads and of processes, from any step."""

import hashlib
import json
import os
from collections.abc import Generator, Iterator
from itertools import islice
from typing import Protocol

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.data.held_out import part_of
from tat_jax.data.rows import MEMORY, Rows, Transform, random
from tat_jax.data.shared import Layout
from tat_jax.data.source import Label, Source, class_names, spread
from tat_jax.data.sources import open_source
from tat_jax.data.transforms import DecodeError
from tat_jax.data.workers import AHEAD, HELD, INTERPRETER, Workers
from tat_jax.tasks import task_of

# Rows that one thread makes at a time. Less than a batch, so that all threads work on the first batch of an
# epoch and on the last; enough that handing them over costs nothing.
_ROWS = 32
# Of fewer images the processes would start longer than they read.
_FEW = 10_000
# A process of Python keeps two cores busy; sixteen feed an H200 with ResNet-18 and 34.
_CORES_A_PROCESS, _PROCESSES_A_DEVICE = 2, 8


class Preparation(Protocol):
    """What is asked of a task to read for it: `check`, `blank_label` and `transform` of a `Task`."""

    @property
    def transform(self) -> Transform: ...

    def check(self, data: ConfigDict) -> None: ...

    def blank_label(self, data: ConfigDict, source: Source, *, train: bool) -> np.ndarray | None: ...


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
        processes: that read instead, with so many threads each; 0 reads in this one.

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
        task: Preparation,
        data: ConfigDict,
        *,
        batch_size: int,
        train: bool,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        threads: int,
        processes: int = 0,
    ):
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size={batch_size} is not a multiple of the {process_count} processes")
        task.check(data)
        self.source = source
        self.steps_per_epoch = -(-len(source) // batch_size)
        self.skipped: dict[int, str] = {}
        self._data = data
        self._blank_label = task.blank_label(data, source, train=train)
        self._rows = Rows(source, task.transform, data, self._blank_label, train=train, seed=seed)
        self._batch_size = batch_size
        self._local_size = batch_size // process_count
        self._first_row = process_index * self._local_size
        self._parts = -(-self._local_size // _ROWS)
        self._train = train
        self._seed = seed
        self._threads = threads
        self._processes = processes
        self._layout = Layout.of(AHEAD + HELD, self._local_size, data.image_size, self._blank_label)
        self._idle: list[Workers] = []

    def epoch(self, index: int, start_step: int = 0) -> Generator[Batch]:
        """Yield this process's rows of the batches of epoch `index` from `start_step` on.

        Raises:
            DecodeError: a file is no image, unless `data.skip_broken`.
            ValueError: a label is not of the task's kind.
        """
        order = self._order(index)
        reader = self._by_processes if self._processes else self._by_threads
        return reader(index, order, start_step)

    def start(self) -> None:
        """Start the processes that read, where there are to be any, and wait until they do.

        Raises:
            ChildProcessError: one has ended.
        """
        if self._processes and not self._idle:
            self._idle.append(self._start_workers())
        for workers in self._idle:
            workers.start()

    def close(self) -> None:
        """End the processes that read, if there are any; they end with the last iteration, too."""
        while self._idle:
            self._idle.pop().close()

    @property
    def label_shape(self) -> tuple[int, ...] | None:
        """Return the shape of a label; None where images have none."""
        return None if self._blank_label is None else self._blank_label.shape

    @property
    def memory(self) -> int:
        """Return how many bytes reading takes at most, but for images of more than 4 million pixels."""
        threads = max(self._threads, 1)
        if self._processes:
            return self._layout.bytes + self._processes * (INTERPRETER + threads * MEMORY)
        parts = 2 * self._parts + threads + max(self._threads, 2 * self._parts)
        return parts * self._layout.slot_bytes // self._parts + threads * MEMORY

    def readers(self) -> str:
        """Return who reads, as the config has it."""
        threads = f"data.threads={self._threads}"
        return f"data.processes={self._processes} of {threads} each" if self._processes else threads

    def _by_threads(self, epoch: int, order: np.ndarray, start_step: int) -> Generator[Batch]:
        parts = grain.MapDataset.range(start_step * self._parts, self.steps_per_epoch * self._parts)
        reader = iter(
            parts.map(lambda part: self._try_part(epoch, order, part)).to_iter_dataset(
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

    def _by_processes(self, epoch: int, order: np.ndarray, start_step: int) -> Generator[Batch]:
        workers = self._idle.pop() if self._idle else self._start_workers()
        steps = range(start_step, self.steps_per_epoch)
        try:
            for batch, skipped in workers.read(epoch, (self._indices(order, step) for step in steps)):
                self.skipped |= skipped
                yield Batch(batch.image, batch.label, batch.where, _index(batch.indices, batch.where))
        finally:
            if workers.is_open:
                self._idle.append(workers)

    def _start_workers(self) -> Workers:
        return Workers(self._rows, self._layout, processes=self._processes, threads=self._threads)

    def names(self, epoch: int, step: int) -> list[str]:
        """Return the names of this process's images of a batch."""
        chosen = self._indices(self._order(epoch), step)
        return [self.skipped.get(index) or self.source[index].name for index in chosen[chosen >= 0].tolist()]

    def look(self, count: int) -> Iterator[tuple[np.ndarray, Label, str]]:
        """Yield `count` images as the first epoch has them, with their labels and names.

        In training they are its first ones; in evaluation, where classes come one after the other, they are
        spread evenly. Those that do not decode are left out if `data.skip_broken`.
        """
        order = self._order(0)
        if not self._train:
            order = order[spread(len(order), count)]
        for index in order[:count].tolist():
            rng = random(self._seed, 0, 1 + index) if self._train else None
            try:
                example = self.source[index]
                image, label = self._rows.make(example, rng)
            except DecodeError:
                if not self._data.skip_broken:
                    raise
                continue
            yield image, label, example.name

    def _order(self, epoch: int) -> np.ndarray:
        order = np.arange(len(self.source))
        if self._train:
            random(self._seed, epoch, 0).shuffle(order)
        return order

    def _indices(self, order: np.ndarray, step: int) -> np.ndarray:
        """Return the images of this process's rows of a batch; −1 for rows that the source does not fill."""
        first = step * self._batch_size + self._first_row
        indices = np.full(self._local_size, -1)
        chosen = order[first : first + self._local_size]
        indices[: len(chosen)] = chosen
        return indices

    def _try_part(self, epoch: int, order: np.ndarray, part: int) -> Batch | Exception:
        """Return an exception instead of raising it: Grain would add remarks of its own to its message."""
        try:
            return self._part(epoch, order, part)
        except Exception as error:
            return error

    def _part(self, epoch: int, order: np.ndarray, part: int) -> Batch:
        """Return consecutive rows of a batch."""
        step, part = divmod(part, self._parts)
        indices = self._indices(order, step)[part * _ROWS : (part + 1) * _ROWS]
        size, blank = self._data.image_size, self._blank_label
        images = np.empty((len(indices), size, size, 3), np.uint8)
        labels = None if blank is None else np.empty((len(indices), *blank.shape), blank.dtype)
        where = np.empty(len(indices), bool)
        self.skipped |= self._rows.fill(images, labels, where, epoch, indices)
        return Batch(images, labels, where, _index(indices, where))


def _index(indices: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return the indices of images that count, and −1 for other rows."""
    return np.where(where, indices, -1).astype(np.int32)


def open_pipeline(config: ConfigDict, split: str, *, batch_size: int | None = None) -> Pipeline:
    """Open a split of a config's data for its task and this process.

    Args:
        config: as the functions in `configs/` return it.
        split: "train", "val", or "held_out" of training where the config says so.
        batch_size: instead of the config's.

    Raises:
        FileNotFoundError: the images are not there.
        ValueError: the config does not fit them or itself.
    """
    source, task = source_of(config, split), task_of(config)
    batch_size = batch_size or config.batch_size
    return pipeline_of(config, source, task, batch_size=batch_size, train=split == "train")


def source_of(config: ConfigDict, split: str) -> Source:
    """Open a split of a config's data as its task takes it.

    Raises:
        FileNotFoundError: the images are not there.
        ValueError: no such source or split, or the files cannot be what they should be.
    """
    share = config.data.get("held_out_of_training")
    if share is None or split == "val":
        return task_of(config).take(open_source(config.data, split))
    return part_of(task_of(config).take(open_source(config.data, "train")), share, split)


def pipeline_of(
    config: ConfigDict, source: Source, task: Preparation, *, batch_size: int, train: bool
) -> Pipeline:
    """Return a pipeline of a source for this process, read as a config says.

    Raises:
        ValueError: the config does not fit.
    """
    return Pipeline(
        source,
        task,
        config.data,
        batch_size=batch_size,
        train=train,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
        processes=_processes(config.data.processes, len(source)),
    )


def check_same(config: ConfigDict, *pipelines: Pipeline) -> None:
    """Raise a ValueError unless all processes have one config and found as many images of the same classes.

    Else their epochs would be of other lengths, and all wait forever; or each would train something else.
    Paths, and how a machine reads, may be its own.
    """
    shared = config.to_dict()
    own = {
        "data": ("root", "sbd_root", "threads", "processes"),
        "student": ("weights",),
        "teacher": ("weights",),
        "probe": ("root",),
    }
    for part, names in own.items():
        shared[part] = {name: value for name, value in shared[part].items() if name not in names}
    found = [
        (len(of.source), of.source.num_classes, class_names(of.source), of.label_shape) for of in pipelines
    ]
    things = {"the config": shared, "what was found of images": found}
    sharding.check_same(
        {
            what: hashlib.sha256(json.dumps(thing, sort_keys=True, default=str).encode()).hexdigest()
            for what, thing in things.items()
        }
    )


def _processes(said: int | None, images: int) -> int:
    """Return how many processes read a source, unless it is said.

    One for every two cores, which it keeps busy, as far as the devices can ask for them. This one alone where
    the devices are its cores, where cores are few, and where images are.
    """
    if said is not None:
        return said
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jax.local_devices()[0].platform == "cpu" or cores < 2 * _CORES_A_PROCESS or images < _FEW:
        return 0
    return min(cores // _CORES_A_PROCESS, _PROCESSES_A_DEVICE * jax.local_device_count())
