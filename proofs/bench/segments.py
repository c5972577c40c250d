"""Images with label maps to batches of published crops: what `bench.input` compares, ours and Pillow's."""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from proofs.photographs import Photograph
from proofs.published_crops import flip_scale_crop_and_blur
from tat_jax.configs.base import base
from tat_jax.data.label_folder import LabelFolder
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.transforms import decode
from tat_jax.tasks.segmentation import Segmentation

BATCH, SIZE = 16, 513
HEIGHT, WIDTH = 375, 500  # as most of VOC's have
_CLASSES = 21
Files = tuple[str, ...]


def write_pairs(photos: list[Photograph], root: Path) -> Files:
    """Write photographs in the size of VOC's, labelled by their soft brightness, and return their paths."""
    paths = []
    for folder in ("images", "labels"):
        (root / folder / "train").mkdir(parents=True)
    for number, photo in enumerate(photos):
        image = Image.fromarray(decode(photo.jpeg, photo.name)).resize((WIDTH, HEIGHT))
        soft = np.asarray(image.convert("L").filter(ImageFilter.BoxBlur(8)))
        label = Image.fromarray((soft // -(-256 // _CLASSES)).astype(np.uint8), "L").convert("P")
        paths.append(f"{root}/images/train/{number}.jpg")
        image.save(paths[-1], quality=90)
        label.save(f"{root}/labels/train/{number}.png")
    return tuple(paths)


def pairs_of(root: Path) -> Files:
    """Return the paths of the images to train that have labels, as `label_folder` lists them."""
    source = LabelFolder(root, "train", 255)
    return tuple(source[index].name for index in range(len(source)))


def ours(files: Files, cores: int, train: bool) -> None:
    """Read an epoch by `tat_jax.data.pipeline`, in the caller's thread."""
    for _ in _pipeline(files, train).epoch(0):
        pass


def torch_loader(files: Files, cores: int, train: bool) -> None:
    """Read an epoch by a DataLoader, without workers."""
    for _ in _torch_loader(files, train):
        pass


class _Pairs(Dataset):
    def __init__(self, files: Files, train: bool):
        self._files, self._train = files, train
        self._rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.open(self._files[index]).convert("RGB")
        label: Image.Image = Image.open(_label_of(self._files[index]))
        if self._train:
            image, label = flip_scale_crop_and_blur(image, label, self._rng, SIZE, 0)
        else:
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            label = label.resize((SIZE, SIZE), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(image)), torch.from_numpy(np.array(label))


def _label_of(path: str) -> str:
    image = Path(path)
    return str(image.parents[2] / "labels" / image.parent.name / f"{image.stem}.png")


@functools.cache
def _pipeline(files: Files, train: bool) -> Pipeline:
    data = base().data
    data.image_size = SIZE
    return Pipeline(
        LabelFolder(Path(files[0]).parents[2], "train", 255),
        Segmentation(),
        data,
        batch_size=BATCH,
        train=train,
        seed=0,
        threads=0,
    )


@functools.cache
def _torch_loader(files: Files, train: bool) -> DataLoader:
    torch.set_num_threads(1)
    return DataLoader(_Pairs(files, train), BATCH, shuffle=train)
