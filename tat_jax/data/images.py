"""Images that are learned from without classes; without JAX, as processes that read import it."""

import os
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Integer
from ml_collections import ConfigDict

from tat_jax.buckets import Bucket, place
from tat_jax.data.disk_folder import DiskFolder
from tat_jax.data.folders import Folder, open_folder
from tat_jax.data.listing import PassedOver, Paths, check_all_were_read, list_images
from tat_jax.data.source import SPLITS, Example, Source, apart, notes, printable
from tat_jax.data.tar_shards import ShardImages
from tat_jax.paths import expand

_LAYOUT = "data.root is a folder of images, one of .tar files of them, or a text file with a path a line"


class Store(Protocol):
    """Where images lie, to be read by their numbers."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[bytes, str]:
        """Return an image, and what errors call it."""


class Images:
    """Images of no class: those of a tree of folders, of a text file of paths, or of tar files.

    `root` is a folder with `train/` and `val/`, each of which is taken whole; or any other folder, or a text
    file with a path a line, relative to its own folder. Of those the share `held_out`, evenly spaced over all
    in their order and at least one, are `val`, and the others `train`. A folder with `.tar` files right in it
    is one of shards, on a disk or in a bucket; in any other, images are those of all folders within it.

    Args:
        store: where they lie.
        indices: of those of this split; None is all.
        notes: what whoever trains on them should have read.
    """

    num_classes = 0

    def __init__(self, store: Store, indices: Integer[np.ndarray, " images"] | None, notes: list[str]):
        self._store, self.notes = store, notes
        self._indices = np.arange(len(store)) if indices is None else indices

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the images in `data.root`.

        Raises:
            FileNotFoundError: there are no images, or a file that is listed is missing.
            OSError: folders cannot be read, or the bucket cannot be reached.
            ValueError: a tar file is damaged or cut short, or there is but one image.
        """
        root = place(expand(str(data.root)))
        if isinstance(root, Path) and root.is_file():
            return cls._part_of(*_listed(root), data.held_out, split)
        folder = open_folder(root, _LAYOUT)
        if set(SPLITS) <= set(folder.folders()):
            store, lines = _open(folder, split)
            return cls(store, None, lines)
        if isinstance(root, Bucket):
            around, _, name = root.url.rpartition("/")
            return cls._part_of(*_open(open_folder(around, _LAYOUT), name), data.held_out, split)
        root = root.absolute()
        if not root.is_dir():
            raise FileNotFoundError(f"no folder or file {printable(str(root))}; {_LAYOUT}")
        return cls._part_of(*_open(open_folder(root.parent, _LAYOUT), root.name), data.held_out, split)

    @classmethod
    def _part_of(cls, store: Store, lines: list[str], held_out: float, split: str) -> Source:
        """Return the images of a store that are held out, or all others."""
        if len(store) < 2:
            raise ValueError(
                "data.root has one image, and at least two are needed: to train, and to evaluate"
            )
        held, rest = apart(len(store), max(1, round(held_out * len(store))))
        chosen = held if split == "val" else rest
        if not len(chosen):
            raise ValueError(f"data.held_out={held_out} leaves no image to train on, of {len(store):,}")
        share = f"data.held_out={held_out:g}"
        said = f"{len(held):,} of {len(store):,} images, evenly spaced, are held out ({share})"
        return cls(store, chosen, lines if split == "val" else [*lines, said])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        image, name = self._store.read(int(self._indices[index]))
        return Example(image, None, name)


class WithoutLabels:
    """The images of any source, whose labels are not read.

    Args:
        source: any one.
    """

    num_classes = 0

    def __init__(self, source: Source):
        self._source, self.notes = source, notes(source)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return self._source[index]._replace(label=None)


class _Files:
    """Files on a disk by their paths."""

    def __init__(self, folder: DiskFolder, paths: Paths):
        self._folder, self._paths = folder, paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> tuple[bytes, str]:
        """Return an image, and what errors call it."""
        return self._folder.read_image(self._paths[index])


def _open(folder: Folder, part: str) -> tuple[Store, list[str]]:
    """Return the images of a folder within another one, and what was passed over."""
    if not isinstance(folder, DiskFolder) or _has_shards(folder.root / part):
        images = ShardImages(folder, part)
        return images, images.shards.passed.lines(part)
    here, passed = folder.root / part, PassedOver()
    found, _ = list_images(str(here), passed)
    lines = passed.lines(part)
    check_all_were_read(here, passed, [] if found else [printable(str(here))], [*lines, _LAYOUT])
    return _Files(folder, Paths.of(found)), lines


def _has_shards(folder: Path) -> bool:
    try:
        return any(name.endswith(".tar") and name[0] != "." for name in os.listdir(folder))
    except OSError as error:
        raise type(error)(
            f"{printable(str(folder))} cannot be read ({error.strerror}); let this user read it"
        ) from None


def _listed(file: Path) -> tuple[Store, list[str]]:
    """Return the images whose paths a text file has, a line each, all of which are there.

    Raises:
        FileNotFoundError: one is not, or there are none.
    """
    folder = file.absolute().parent
    paths = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            path = os.path.join(folder, os.fsdecode(line.strip()))
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{file}, line {number}: there is no file {printable(path)}")
            paths.append(path)
    if not paths:
        raise FileNotFoundError(f"{file} lists no images; {_LAYOUT}")
    return _Files(DiskFolder(folder, _LAYOUT), Paths.of(paths)), []
