"""COCO-Stuff 10k: images of COCO with a class of things or stuff for each pixel."""

import functools
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tat_jax import paths
from tat_jax.data.disk_folder import DiskFolder
from tat_jax.data.id_lists import files_of, read_ids
from tat_jax.data.label_maps import class_map, largest
from tat_jax.data.listing import Paths
from tat_jax.data.mat_file import read_matrix
from tat_jax.data.source import Example, Source

_LAYOUT = "{root} is to be the folder of COCO-Stuff 10k, with images/, annotations/ and imageLists/"
_LISTS = {"train": "train", "val": "test"}
_UNLABELLED = -1  # 0 in the files, where classes begin with 1


class CocoStuff:
    """COCO-Stuff 10k's 9,000 images to train, and its 1,000 to test as those to validate.

    Its 91 things and 91 kinds of stuff are classes 0 to 181; eleven of the things have no pixel anywhere.

    Args:
        root: holds `images/`, `annotations/` and `imageLists/`.
        split: `train` or `val`.

    Attributes:
        classes: the names of the classes by their labels.
        largest: height and width within which all images of the split lie.

    Raises:
        FileNotFoundError: a folder, a list, or files that it names are missing.
        OSError: a folder cannot be read.
        ValueError: a list is empty.
    """

    def __init__(self, root: str | Path, split: str):
        self._folder = DiskFolder(paths.local(str(root)), _LAYOUT)
        self._folder.check_is_there("imageLists")
        root, layout = self._folder.root, _LAYOUT.format(root=self._folder.root)
        ids = read_ids(root / "imageLists" / f"{_LISTS[split]}.txt", layout)
        self._images = Paths.of(files_of(root / "images", ids, ".jpg", layout))
        self._labels = Paths.of(files_of(root / "annotations", ids, ".mat", layout))
        self.classes = class_names()
        self.num_classes = len(self.classes)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the images in `data.root`."""
        return cls(data.root, split)

    @functools.cached_property
    def largest(self) -> tuple[int, int]:
        """Return the largest height and width."""
        return largest(self._images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        file, label_name = self._folder.read_image(self._labels[index])
        indices = read_matrix(file, ("S",), label_name).astype(np.int32) - 1
        image, name = self._folder.read_image(self._images[index])
        return Example(image, class_map(indices, self.num_classes, _UNLABELLED, f"{label_name}: S − 1"), name)


@functools.cache
def class_names() -> list[str]:
    """Return the names of its 182 classes, as its authors list them."""
    return (Path(__file__).parent / "cocostuff_classes.txt").read_text().splitlines()
