"""A folder in a bucket that holds the images of the splits in folders of their classes."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import BinaryIO

import numpy as np
from jaxtyping import Integer

from tat_jax.buckets import Bucket, Entry
from tat_jax.data.listing import PassedOver, Paths, is_image
from tat_jax.data.source import printable

_AT_ONCE = 32  # classes that are listed; a page has a thousand names, and takes a tenth of a second


class BucketFolder:
    """The folder that holds the splits, in a bucket; what it does is what `DiskFolder` does.

    Args:
        root: its address.
        layout: where images belong, which errors say of `{root}`.
    """

    def __init__(self, root: Bucket, layout: str):
        self.root = root
        self._layout = layout.format(root=root)

    def check_is_there(self, split: str) -> None:
        """Raise a FileNotFoundError unless a split has folders."""
        if not self.root.folders(split):
            raise FileNotFoundError(f"no folders in {self.root / split}; {self._layout}")

    def where_images_belong(self, split: str) -> str:
        """Return where images belong."""
        return self._layout

    def folders(self, below: str = "") -> list[str]:
        """Return the names of the folders in it, or in a folder of it, sorted."""
        return self.root.folders(below)

    def class_folders(self, split: str, passed: PassedOver) -> list[str]:
        """Return the folders of the classes as they are called, in torchvision's order."""
        folders = self.root.folders(split)
        passed.hidden += [f"{self.root}/{split}/{folder}" for folder in folders if folder[0] == "."]
        return [folder for folder in folders if folder[0] != "."]

    def list_images(
        self, split: str, folders: list[str], passed: PassedOver
    ) -> tuple[Paths, Integer[np.ndarray, " folders"]]:
        """Return the paths of the images, one folder after the other, and how many each of them has."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            listed = pool.map(lambda folder: list(self.root.objects(f"{split}/{folder}")), folders)
            lists = [sorted(self._images(names, passed), key=os.path.split) for names in listed]
        return Paths.of(list(chain.from_iterable(lists))), np.array(list(map(len, lists)), np.int64)

    def read_image(self, path: str) -> tuple[bytes, str]:
        """Return an image, and what errors call it."""
        return self.root.read(path), printable(f"{self.root}/{path}")

    def files(self, split: str) -> dict[str, Entry]:
        """Return the files in a split by name, not those in its folders."""
        below = {name[len(split) + 1 :]: entry for name, entry in self.root.objects(split).items()}
        # An object of the split's own name is the mark of a folder, which consoles of stores make.
        return {name: entry for name, entry in below.items() if name and "/" not in name}

    def have_settled(self, files: Mapping[str, Entry]) -> bool:
        """Return True: each version of an object is called otherwise."""
        return True

    def open(self, path: str, entry: Entry) -> BinaryIO:
        """Open a file of `files`, by its path in this folder."""
        return self.root.open(path, entry)

    def read_part(self, path: str, entry: Entry, start: int, size: int) -> bytes:
        """Return bytes of a file that is as it was listed."""
        return self.root.read_part(path, entry, start, size)

    def check_links(self, split: str, found: dict[str, str], trained: dict[str, str]) -> list[str]:
        """Return nothing: a bucket has no links."""
        return []

    def _images(self, names: list[str], passed: PassedOver) -> list[str]:
        images = []
        for name in names:
            parts = name.split("/")[1:]  # without the split
            if any(part[0] == "." for part in parts if part):
                passed.hidden.append(f"{self.root}/{name}")
            elif is_image(name):
                images.append(name)
            else:
                passed.endings[os.path.splitext(name)[1].lower() or "without ending"] += 1
        return images
