"""Images and their label maps in two folders of the same names."""

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from ml_collections import ConfigDict

from tat_jax import paths
from tat_jax.data.class_names import CLASSES, read_classes
from tat_jax.data.disk_folder import DiskFolder
from tat_jax.data.label_maps import MOST_CLASSES, class_map, decode_indices, largest
from tat_jax.data.listing import PassedOver, Paths, check_all_were_read
from tat_jax.data.source import Example, Source, some
from tat_jax.data.transforms import DecodeError

_LAYOUT = (
    "images belong in {root}/images/train/ and {root}/images/val/, their labels under the same names in "
    "{root}/labels/train/ and {root}/labels/val/, as PNG of class indices"
)
_THREADS = 16


class LabelFolder:
    """Images in `root/images/<split>/`, and PNG of their class indices in `root/labels/<split>/`.

    An image and its label have one name but for the ending, in the folders of a split or in ones within them.
    `root/classes.txt` names the classes, and may give their colours; without it there are as many as the
    greatest index in the labels of `train` says.

    Args:
        root: holds both folders.
        split: `train` or `val`.
        ignored: the index of pixels of no class.

    Attributes:
        classes: the names of the classes by their labels.
        colours: theirs in RGB; None where none are said.
        notes: what was passed over, and how the number of classes came about.
        largest: height and width within which all images of the split lie.

    Raises:
        FileNotFoundError: a folder or the images are missing, or an image or a label is without the other.
        OSError: some folders cannot be read.
        ValueError: labels are no PNG, or of colours where they are counted, or classes are too many.
    """

    def __init__(self, root: str | Path, split: str, ignored: int):
        self._folder = DiskFolder(paths.local(str(root)), _LAYOUT)
        self._ignored = ignored
        passed = PassedOver()
        images = _list(self._folder, "images", split, passed)
        labels = _list(self._folder, "labels", split, passed)
        self._images, self._labels = _pair(self._folder, images, labels)
        self.notes = passed.lines(split)
        if said := read_classes(self._folder.root):
            self.classes, self.colours = said
        else:
            trained = labels if split == "train" else _list(self._folder, "labels", "train", PassedOver())
            count = self._count_classes(trained.values())
            self.classes, self.colours = [str(index) for index in range(count)], None
            self.notes.append(
                f"{count} classes, as many as the labels of train have; {self._folder.root / CLASSES} would "
                "name them"
            )
        self.num_classes = len(self.classes)
        if self.num_classes > MOST_CLASSES:
            raise ValueError(
                f"{self._folder.root / CLASSES} names {self.num_classes} classes; there may be "
                f"{MOST_CLASSES} at most"
            )

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the images in `data.root`, of whose labels `data.ignore_label` is no class."""
        return cls(data.root, split, data.ignore_label)

    @functools.cached_property
    def largest(self) -> tuple[int, int]:
        """Return the largest height and width, as labels begin with theirs."""
        return largest(self._labels)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        indices, label_name = self._read_label(self._labels[index])
        image, name = self._folder.read_image(self._images[index])
        return Example(image, class_map(indices, self.num_classes, self._ignored, label_name), name)

    def _read_label(self, path: str) -> tuple[Integer[np.ndarray, "height width"], str]:
        file, name = self._folder.read_image(path)
        return decode_indices(file, name), name

    def _count_classes(self, labels: Iterable[str]) -> int:
        """Return how many classes labels have: one more than the greatest index.

        Raises:
            ValueError: there is none, or one that is too great.
        """

        def greatest(path: str) -> tuple[int, str]:
            try:
                indices, name = self._read_label(path)
            except DecodeError:  # is told of when it is read, unless the run goes on without such files
                return -1, path
            classes = indices[indices != self._ignored]
            return int(classes.max()) if classes.size else -1, name

        with ThreadPoolExecutor(_THREADS) as pool:
            most, name = max(pool.map(greatest, labels))
        if most < 0:
            raise ValueError(
                f"the labels in {self._folder.root}/labels/train have no index but {self._ignored}, which is "
                "ignored"
            )
        if most >= MOST_CLASSES:
            raise ValueError(
                f"{name} has index {most}, and classes are 0 to {MOST_CLASSES - 1} at most; if it means "
                f"that a pixel is of no class, say --config.data.ignore_label={most}"
            )
        return 1 + most


def _list(folder: DiskFolder, kind: str, split: str, passed: PassedOver) -> dict[str, str]:
    """Return the paths of the images or labels of a split, in torchvision's order, by their common names.

    Raises:
        FileNotFoundError: there are none.
        OSError: some folders cannot be read.
        ValueError: labels are no PNG, or two files differ by their endings alone.
    """
    here = f"{kind}/{split}"
    folder.check_is_there(here)
    listed, counts = folder.list_images(here, [""], passed)
    check_all_were_read(folder.root, passed, [str(folder.root / here)] * (not counts[0]), passed.lines(split))
    start = len(os.path.join(str(folder.root / here), ""))
    found: dict[str, str] = {}
    for path in listed:
        stem, ending = os.path.splitext(path)
        if kind == "labels" and ending.lower() != ".png":
            raise ValueError(f"{path}: a label is a PNG of class indices")
        first = found.setdefault(stem[start:], path)
        if first != path:
            raise ValueError(
                f"{first} and {path} have one name: an image has one label, and a label one image"
            )
    return found


def _pair(folder: DiskFolder, images: dict[str, str], labels: dict[str, str]) -> tuple[Paths, Paths]:
    """Return the paths of images and of their labels.

    Raises:
        FileNotFoundError: one is without the other.
    """
    for kind, there, others in (("labels", images, labels), ("images", labels, images)):
        if missing := [path for stem, path in there.items() if stem not in others]:
            raise FileNotFoundError(
                f"{len(missing):,} of {len(there):,} have nothing of their name in {folder.root / kind}: "
                f"{some(missing)}"
            )
    return Paths.of(list(images.values())), Paths.of([labels[stem] for stem in images])
