"""Images in folders of their classes, as PyTorch has them."""

import functools
import os
import unicodedata
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Integer
from ml_collections import ConfigDict

from tat_jax.buckets import Bucket, Place, place
from tat_jax.data import bucket_folder
from tat_jax.data.kept_lists import list_folders
from tat_jax.data.listing import EXTENSIONS, PassedOver, Paths, identity, is_image, leads_to
from tat_jax.data.source import SPLITS, Example, Source, printable, some
from tat_jax.paths import expand

FOLDERS = "folders"  # what `data.classes` says where ImageNet's ids are names like others
_NOT_VAL = ("validation", "valid", "dev", "test")  # what the validation images are called elsewhere


class ImageFolder:
    """Images in `root/train/<class>/` and `root/val/<class>/`, PyTorch's layout, in torchvision's order.

    Labels number the class folders of `train`, sorted, in both splits; names are the same if Unicode's normal
    forms of them are. Where every class folder is a WordNet id of ImageNet's 1,000 classes, labels are
    ImageNet's, even if some classes are missing. Names that begin with a dot are passed over.

    Args:
        root: holds the splits, on this machine or in a bucket.
        split: `train` or `val`.
        classes: "folders" to number folders even if all are ImageNet's ids.

    Attributes:
        classes: the names of the classes by their labels.
        notes: what was passed over, and how labels came about, where that may not be what is meant.

    Raises:
        FileNotFoundError: the folder, the split or the images are missing.
        OSError: some folders cannot be read, or the bucket cannot be reached.
        ValueError: images lie outside class folders, or `val` has a class that `train` lacks.
    """

    def __init__(self, root: str | Place, split: str, classes: str | None = None):
        root = place(expand(str(root)))
        passed = PassedOver()
        if isinstance(root, Bucket):
            bucket_folder.check_is_there(root, split)
        else:
            _check_is_there(root, root, split)
            _check_is_there(root / split, root, split)
        found = _folders(root, split, passed)
        if not found:
            raise ValueError(f"{root / split} has no class folders; {_layout(root, split)}")
        trained = found
        if split != "train":
            trained = _folders(root, "train", PassedOver())
        ids = imagenet_classes()
        has_ids = classes != FOLDERS and found.keys() | trained.keys() <= set(ids)
        if not has_ids:
            _check_names(root, split, found, trained)
        self.classes = ids if has_ids else list(trained)
        self.num_classes = len(self.classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._bucket = root if isinstance(root, Bucket) else None
        folders = [str(root / split / folder_name) for folder_name in found.values()]
        self._paths, counts = _list(root, split, found.values(), passed)
        self._labels = np.repeat(np.array([numbers[name] for name in found], np.int32), counts)
        empty = [folder for folder, count in zip(folders, counts, strict=True) if not count]
        self.notes = passed.lines(split)
        _check_all_were_read(root, passed, empty, self.notes)
        if not isinstance(root, Bucket):
            self.notes += _notes_of_links(root, split, found, trained)
        self.notes += _notes_of_classes(root, split, found, trained, has_ids)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the images in `data.root`."""
        return cls(data.root, split, data.classes)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        path = self._paths[index]
        if self._bucket:
            name = printable(f"{self._bucket}/{path}")
            return Example(self._bucket.read(path), int(self._labels[index]), name)
        try:
            return Example(read(path), int(self._labels[index]), printable(path))
        except OSError as error:
            # Of the same kind, but without a number: what it comes of is no matter of the run's folder.
            raise type(error)(
                f"{printable(path)} cannot be read ({error.strerror}); make it readable, or take it out of "
                "its folder"
            ) from error


def read(path: str) -> bytes:
    """Return what a file holds, in half of the calls that Python's files make, which threads wait for."""
    file = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(file).st_size
        found = os.read(file, size)
        while len(found) < size and (more := os.read(file, size - len(found))):  # as of a disk far away
            found += more
        return found
    finally:
        os.close(file)


@functools.cache
def imagenet_classes() -> list[str]:
    """Return the WordNet ids of ImageNet's 1,000 classes; the place of an id is its label."""
    return (Path(__file__).parent / "imagenet_wnids.txt").read_text().split()


def _folders(root: Place, split: str, passed: PassedOver) -> dict[str, str]:
    if isinstance(root, Bucket):
        return bucket_folder.class_folders(root, split, passed)
    return _class_folders(root / split, passed) if os.path.isdir(root / split) else {}


def _list(
    root: Place, split: str, folders: Iterable[str], passed: PassedOver
) -> tuple[Paths, Integer[np.ndarray, " folders"]]:
    """Return the paths of the images, one folder after the other, and how many each folder has."""
    if isinstance(root, Bucket):
        lists = bucket_folder.list_images(root, split, folders, passed)
        return Paths.of(list(chain.from_iterable(lists))), np.array(list(map(len, lists)), np.int64)
    return list_folders([str(root / split / folder) for folder in folders], passed)


def _check_is_there(folder: Path, root: Path, split: str) -> None:
    """Raise unless a path leads to a folder."""
    try:
        folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no folder {folder}; {_layout(root, split)}") from None
    except OSError as error:
        raise type(error)(f"{folder} cannot be reached ({error.strerror}); let this user read it") from None
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file and no folder; {_layout(root, split)}")


def _layout(root: Place, split: str) -> str:
    """Return where images belong, and what may have been meant by a root that has no such split."""
    layout = f"images belong in {root}/train/<class>/ and {root}/val/<class>/"
    if isinstance(root, Bucket):
        return layout
    if root.name in SPLITS and os.path.isdir(root.parent / split):
        return f"{layout}; did you mean --config.data.root={root.parent}?"
    if split == "val" and not os.path.lexists(root / split):
        for name in _NOT_VAL:
            if os.path.isdir(root / name):
                return f"{layout}; if {root / name} holds the images to validate, call it val"
    inner = [root / name for name in _folder_names(root) if os.path.isdir(root / name / split)]
    return f"{layout}; did you mean --config.data.root={inner[0]}?" if len(inner) == 1 else layout


def _folder_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if leads_to(entry) == "folder")
    except OSError:
        return []


def _class_folders(split: Path, passed: PassedOver) -> dict[str, str]:
    """Return the folders of a split as they are called, by their names in Unicode's composed form.

    They come sorted as torchvision sorts them.

    Raises:
        FileNotFoundError: some are links that lead nowhere, whose classes would silently be missing.
        OSError: the split cannot be read.
        ValueError: two names are the same to the eye.
    """
    folders: dict[str, str] = {}
    nowhere = []
    try:
        with os.scandir(split) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise type(error)(f"{split} cannot be read ({error.strerror}); let this user read it") from None
    for entry in entries:
        kind, is_hidden = leads_to(entry), entry.name[0] == "."
        if kind == "nowhere" and not (is_hidden or is_image(entry.name)):
            target = f" → {os.readlink(entry.path)}" if entry.is_symlink() else ""
            nowhere.append(f"{entry.name}{target}")
        elif kind == "nowhere":
            passed.nowhere.append(entry.path)
        elif is_hidden and kind == "folder":
            passed.hidden.append(entry.path)
        elif kind == "folder":
            name = unicodedata.normalize("NFC", entry.name)
            if name in folders:
                raise ValueError(
                    f"{split} has two folders of one name in two Unicode forms, {folders[name]!a} and "
                    f"{entry.name!a}: put their images into one"
                )
            folders[name] = entry.name
        elif is_image(entry.name):
            passed.beside.append(entry.path)
    if nowhere:
        raise FileNotFoundError(
            f"class folders of {split} are links that lead nowhere: {some(nowhere)}; mount their disk, or "
            "remove the links to do without these classes"
        )
    return folders


def _check_names(root: Place, split: str, found: Iterable[str], trained: Iterable[str]) -> None:
    """Raise unless `train` has classes, and all of those that the split has."""
    if not trained:
        raise FileNotFoundError(f"no class folders in {root / 'train'} to number those of {split}")
    unknown = sorted(set(found) - set(trained))
    near = {_like(name): name for name in trained}
    names = [
        f"{name!r} (train has {near[_like(name)]!r})" if _like(name) in near else name for name in unknown
    ]
    if names:
        raise ValueError(f"{root / split} has classes that train lacks: {some(names)}")


def _like(name: str) -> str:
    """Return what names have in common that differ in capitals, blanks and the like alone."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", name).casefold()))


def _check_all_were_read(root: Place, passed: PassedOver, empty: list[str], lines: list[str]) -> None:
    """Raise if folders could not be read, or have no images."""
    if passed.unreadable:
        raise OSError(
            f"folders of images cannot be read: {some(passed.unreadable)}; let this user read them, or move "
            f"them out of {root}"
        )
    if empty:
        what = "".join(f"; {line}" for line in lines)
        raise FileNotFoundError(f"no images in {some(empty)} ({' '.join(EXTENSIONS)}){what}")


def _notes_of_links(root: Path, split: str, found: dict[str, str], trained: dict[str, str]) -> list[str]:
    """Return what to note of class folders of `val` that are folders of `train` under another path.

    Raises:
        ValueError: two classes of the split are one folder, whose images would be of both.
    """
    places: dict[tuple[int, int], str] = {}
    for name, folder_name in found.items():
        first = places.setdefault(identity(str(root / split / folder_name)), name)
        if first != name:
            raise ValueError(
                f"{root / split} has two classes that are one folder, {printable(first)} and "
                f"{printable(name)}: its images would be of both; remove the link that is wrong"
            )
    if split == "train":
        return []
    same = [
        name for name, folder_name in trained.items() if identity(str(root / "train" / folder_name)) in places
    ]
    return [f"{split} and train share the folders of their images: {some(same)}"] if same else []


def _notes_of_classes(
    root: Place, split: str, found: dict[str, str], trained: dict[str, str], has_ids: bool
) -> list[str]:
    """Return what should be known of the classes of a split, and may not be what is meant."""
    lines = []
    if split != "train":
        if missing := sorted(set(trained) - set(found)):
            lines.append(
                f"{split} lacks {len(missing):,} of train's {len(trained):,} classes: {some(missing)}"
            )
    elif has_ids and len(found) < len(imagenet_classes()):
        lines.append(
            f"all class folders ({len(found):,}) are ids of ImageNet, so that labels are those of its 1,000 "
            f"classes; --config.data.classes={FOLDERS} numbers the folders"
        )
    elif len(found) == 1:
        (name,) = found.values()
        here = root / split / name
        inner = here.folders() if isinstance(here, Bucket) else _folder_names(here)
        within = f"; if {some(inner)} in it are the classes, they belong in {root / split}" if inner else ""
        lines.append(f"train has one class, {printable(name)}: nothing is to be told apart{within}")
    return lines
