"""The sources that a config can name."""

import numpy as np
from ml_collections import ConfigDict

from tat_jax.data.cifar import Cifar10, Cifar100
from tat_jax.data.coco_stuff import CocoStuff
from tat_jax.data.digit_masks import DigitMasks
from tat_jax.data.image_folder import ImageFolder
from tat_jax.data.images import Images
from tat_jax.data.label_folder import LabelFolder
from tat_jax.data.source import SPLITS, Example, NamedSource, Source
from tat_jax.data.tfds import Tfds
from tat_jax.data.voc import Voc
from tat_jax.data.webdataset import WebDataset


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels as RGB: 1,000 to train, 797 to validate.

    Args:
        split: `train` or `val`; each class has the same share of both.
        labels_per_class: train on the first so many images of each class; None is all.
    """

    num_classes = 10

    def __init__(self, split: str, labels_per_class: int | None = None):
        # Imported here, because it takes a second that other sources need not wait for.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        halves = train_test_split(
            np.arange(len(digits.target)), train_size=1000, stratify=digits.target, random_state=0
        )
        chosen = halves[SPLITS.index(split)]
        if split == "train" and labels_per_class is not None:
            if labels_per_class < 1:
                raise ValueError(f"labels_per_class={labels_per_class} leaves no image to train on")
            labels = digits.target[chosen]
            first = [np.flatnonzero(labels == digit)[:labels_per_class] for digit in range(self.num_classes)]
            chosen = chosen[np.sort(np.concatenate(first))]
        self.classes = [str(digit) for digit in range(self.num_classes)]
        self._indices = chosen
        self._labels = digits.target[chosen]
        grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self._images = np.repeat(grey[..., None], 3, axis=-1)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split, of that for training the first `data.labels_per_class` images of each class."""
        return cls(split, data.labels_per_class)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]), f"digit {self._indices[index]}")


SOURCES: dict[str, type[NamedSource]] = {
    "imagefolder": ImageFolder,
    "images": Images,
    "webdataset": WebDataset,
    "tfds": Tfds,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "digits": Digits,
    "voc": Voc,
    "cocostuff": CocoStuff,
    "label_folder": LabelFolder,
    "digit_masks": DigitMasks,
}


def open_source(data: ConfigDict, split: str) -> Source:
    """Open the split `train` or `val` of the source that `data.source` names.

    Raises:
        FileNotFoundError: the images are not there.
        ValueError: no such source or split, or the files cannot be what they should be.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if data.source not in SOURCES:
        raise ValueError(f"no data.source {data.source!r}; there are {', '.join(SOURCES)}")
    return SOURCES[data.source].open(data, split)
