"""Images of CIFAR's size in memory to batches of padded crops: what `bench.input` compares."""

import functools

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from tat_jax.configs.base import base
from tat_jax.data.cifar import SIDE, Cifar
from tat_jax.data.pipeline import Pipeline
from tat_jax.tasks.classification import Classification

BATCH, IMAGES, CLASSES, PADDING = 64, 20_000, 100, 4
NUMBERS = tuple(map(str, range(IMAGES)))  # what stands for the files of other images


def ours(files: tuple[str, ...], cores: int, train: bool) -> None:
    """Read an epoch by `tat_jax.data.pipeline`, in the caller's thread."""
    for _ in _pipeline(train).epoch(0):
        pass


def torch_loader(files: tuple[str, ...], cores: int, train: bool) -> None:
    """Read an epoch by a DataLoader, without workers."""
    for _ in _torch_loader(train):
        pass


@functools.cache
def _drawn() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=IMAGES, dtype=np.int32)
    return rng.integers(256, size=(IMAGES, SIDE, SIDE, 3), dtype=np.uint8), labels


class _Images(Dataset):
    def __init__(self, train: bool):
        (self._images, self._labels), self._train = _drawn(), train
        self._rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self._images[index])
        if self._train:
            left, top = self._rng.integers(2 * PADDING, size=2, endpoint=True).tolist()
            image = ImageOps.expand(image, PADDING).crop((left, top, left + SIDE, top + SIDE))
            if self._rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)), int(self._labels[index])


@functools.cache
def _pipeline(train: bool) -> Pipeline:
    data = base().data
    data.update({"image_size": SIDE, "crop_padding": PADDING})
    source = Cifar(*_drawn(), list(map(str, range(CLASSES))), "drawn")
    return Pipeline(source, Classification(), data, batch_size=BATCH, train=train, seed=0, threads=0)


@functools.cache
def _torch_loader(train: bool) -> DataLoader:
    torch.set_num_threads(1)
    return DataLoader(_Images(train), BATCH, shuffle=train)
