"""Photographs, and CIFAR's images, to batches of crops: ours beside Pillow in a torch DataLoader and tf.data.

`python -m proofs.bench.input [--photos FOLDER] [--pairs FOLDER] [--json FILE]`. Each contender is a process
of its own, and may use so many cores and no more.
"""

import argparse
import functools
import io
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from proofs.bench import segments, small
from proofs.bench.handover import Asleep, Photographs, draw
from proofs.bench.sidebyside import Row, compare_times, main
from proofs.photographs import Photograph, add_photos
from proofs.report import announce
from proofs.torch_transforms import RATIO, SCALE, SIZE, crop_resize_and_flip, resize_and_centre_crop
from tat_jax.configs.base import base
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.transforms import random_resized_crop_box
from tat_jax.tasks.classification import Classification

BATCH = 64
IMAGES = 1024  # an epoch at least; files are read again to fill it
READERS, HANDED_OVER = 64, 16  # of that, times as many images
Files = tuple[str, ...]


def measure(photos: list[Photograph], pairs: Path | None) -> list[Row]:
    """Compare training crops on one core and on two, evaluation on one, and crops of label maps on one."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, photo in enumerate(photos):
            paths.append(f"{folder}/{i}.jpg")
            Path(paths[-1]).write_bytes(photo.jpeg)
        files = tuple(paths * math.ceil(IMAGES / len(paths)))
        beside = functools.partial(compare, files)
        what = "training crops, one core"
        rows = [
            beside(f"{what}, beside torch", ours, torch_loader, bound=1.4),
            beside(f"{what}, beside tf.data", ours, tf_data, bound=1.2),
            beside("evaluation, one core, beside torch", ours, torch_loader, train=False, bound=1.0),
            *measure_small(),
            *measure_segments(segments.write_pairs(photos, Path(folder, "pairs")), "VOC's sizes"),
            *(measure_segments(segments.pairs_of(pairs), pairs.name) if pairs else ()),
        ]
        if len(_cores()) > 1:
            rows += [
                beside("training crops, two cores, beside torch", ours, torch_loader, cores=(2, 2)),
                beside("training crops, two threads beside one", ours, ours, cores=(2, 1), bound=1.8),
                beside(
                    "training crops, two processes beside one thread",
                    ours_by_processes,
                    ours,
                    cores=(2, 1),
                    bound=1.9,
                ),
            ]
            for where, read_files in (("in memory", False), ("read", True)):
                ways = [functools.partial(way, read_files=read_files) for way in (processes, threads)]
                what = f"handed over, files {where}, {READERS} readers, two cores, processes beside threads"
                rows.append(compare(files * HANDED_OVER, what, *ways, cores=(2, 2)))
        return rows


def measure_small() -> list[Row]:
    """Compare padded crops of CIFAR's images, which lie in memory, and evaluation, on one core."""
    what = "CIFAR in memory, one core, beside torch"
    contenders = small.ours, small.torch_loader
    return [
        compare(small.NUMBERS, f"padded crops of {what}", *contenders, bound=1.2),
        compare(small.NUMBERS, f"evaluation of {what}", *contenders, train=False),
    ]


def measure_segments(files: Files, name: str) -> list[Row]:
    """Compare the published crops of 513² with their labels, and evaluation, on one core."""
    what = f"segmentation, {name}, one core, beside torch"
    contenders = segments.ours, segments.torch_loader
    return [
        compare(files, f"crops of {what}", *contenders, bound=1.2),
        compare(files, f"evaluation of {what}", *contenders, train=False),
    ]


def ours(files: Files, cores: int, train: bool) -> None:
    """Read an epoch by `tat_jax.data.pipeline`; on one core in the caller's thread, as torch does."""
    for _ in _pipeline(files, 0 if cores == 1 else cores, train).epoch(0):
        pass


def ours_by_processes(files: Files, cores: int, train: bool) -> None:
    """Read an epoch by processes of one thread, one for each core."""
    for _ in _pipeline(files, 1, train, cores).epoch(0):
        pass


def torch_loader(files: Files, cores: int, train: bool) -> None:
    """Read an epoch by a DataLoader in torchvision's way; on one core without workers, which is fastest."""
    for _ in _torch_loader(files, 0 if cores == 1 else cores, train):
        pass


def tf_data(files: Files, cores: int, train: bool) -> None:
    """Read an epoch of training crops by tf.data, which decodes only the crop, with antialias."""
    for _ in _tf_data(files, cores):
        pass


def processes(files: Files, cores: int, train: bool, read_files: bool) -> None:
    """Hand over an epoch of photographs whose decoding is a sleep, by a process for each core."""
    _hand_over(files, read_files, cores, READERS // cores)


def threads(files: Files, cores: int, train: bool, read_files: bool) -> None:
    """Hand over likewise, by threads of one process."""
    _hand_over(files, read_files, 0, READERS)


def _hand_over(files: Files, read_files: bool, processes: int, threads: int) -> None:
    for _ in _asleep(files, read_files, processes, threads).epoch(0):
        pass


class _Drawn(Classification):
    """Leaves images as they are."""

    transform = staticmethod(draw)


class _TorchPhotographs(Dataset):
    def __init__(self, files: Files, train: bool):
        self._photographs, self._train = Photographs(files), train
        self._rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._photographs)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self._transformed(index)))

    def _transformed(self, index: int) -> np.ndarray:
        image = Image.open(io.BytesIO(self._photographs[index].image)).convert("RGB")
        if not self._train:
            return resize_and_centre_crop(image)
        box = random_resized_crop_box(image.height, image.width, self._rng, SCALE, RATIO)
        return crop_resize_and_flip(image, box, self._rng.random() < 0.5)


@functools.cache
def _pipeline(files: Files, threads: int, train: bool, processes: int = 0) -> Pipeline:
    return Pipeline(
        Photographs(files),
        Classification(),
        base().data,
        batch_size=BATCH,
        train=train,
        seed=0,
        threads=threads,
        processes=processes,
    )


@functools.cache
def _asleep(files: Files, read_files: bool, processes: int, threads: int) -> Pipeline:
    return Pipeline(
        Asleep(files, read_files),
        _Drawn(),
        base().data,
        batch_size=256,
        train=True,
        seed=0,
        threads=threads,
        processes=processes,
    )


@functools.cache
def _torch_loader(files: Files, workers: int, train: bool) -> DataLoader:
    torch.set_num_threads(1)
    return DataLoader(
        _TorchPhotographs(files, train),
        BATCH,
        shuffle=train,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


@functools.cache
def _tf_data(files: Files, cores: int) -> Any:
    # Imported here, because the other contenders' processes have no use for it.
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": "-1"}
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(cores)
    tf.config.threading.set_inter_op_parallelism_threads(cores)

    def read(path: Any) -> Any:
        jpeg = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(jpeg),
            tf.zeros([0, 0, 4]),
            area_range=SCALE,
            aspect_ratio_range=RATIO,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        crop = tf.image.decode_and_crop_jpeg(jpeg, tf.concat([begin[:2], size[:2]], 0), channels=3)
        image = tf.image.resize(crop, (SIZE, SIZE), antialias=True)
        return tf.image.random_flip_left_right(tf.cast(tf.round(image), tf.uint8))

    data = tf.data.Dataset.from_tensor_slices(list(files)).shuffle(len(files))
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    return data.map(read, num_parallel_calls=cores).batch(BATCH).with_options(options)


def compare(
    files: Files,
    name: str,
    contender: Callable[[Files, int, bool], None],
    rival: Callable[[Files, int, bool], None],
    *,
    train: bool = True,
    cores: tuple[int, int] = (1, 1),
    bound: float | None = None,
) -> Row:
    """Compare epochs of two contenders on so many cores each."""
    announce(name)
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn, _use_cores, (cores[0],)) as one,
        ProcessPoolExecutor(1, spawn, _use_cores, (cores[1],)) as other,
    ):
        return compare_times(
            name,
            lambda: one.submit(contender, files, cores[0], train).result(),
            lambda: other.submit(rival, files, cores[1], train).result(),
            bound=bound,
            images=len(files),
            rounds=7,
            seconds=60,
        )


def _cores() -> list[int]:
    return (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )


def _use_cores(count: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _cores()[:count])


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_photos(parser)
    parser.add_argument(
        "--pairs",
        type=Path,
        metavar="FOLDER",
        help="images/train/ and labels/train/, as data.source=label_folder has",
    )


if __name__ == "__main__":
    main(__doc__, measure, add_options=_add_options)
