"""Images in folders of their classes, as PyTorch has them."""

import functools
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tat_jax.buckets import Place
from tat_jax.data.folders import Folder, open_folder
from tat_jax.data.listing import PassedOver, check_all_were_read
from tat_jax.data.source import Example, Source, printable, some

FOLDERS = "folders"  # what `data.classes` says where ImageNet's ids are names like others
_LAYOUT = "images belong in {root}/train/<class>/ and {root}/val/<class>/"


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
        labels: of the images.
        notes: what was passed over, and how labels came about, where that may not be what is meant.

    Raises:
        FileNotFoundError: the folder, the split or the images are missing.
        OSError: some folders cannot be read, or the bucket cannot be reached.
        ValueError: images lie outside class folders, or `val` has a class that `train` lacks.
    """

    def __init__(self, root: str | Place, split: str, classes: str | None = None):
        folder = self._folder = open_folder(root, _LAYOUT)
        folder.check_is_there(split)
        passed, here = PassedOver(), folder.root / split
        found = _by_name(folder.class_folders(split, passed), here)
        if not found:
            raise ValueError(f"{here} has no class folders; {folder.where_images_belong(split)}")
        trained = found
        if split != "train":
            trained = _by_name(folder.class_folders("train", PassedOver()), folder.root / "train")
        ids = imagenet_classes()
        has_ids = classes != FOLDERS and found.keys() | trained.keys() <= set(ids)
        if not has_ids:
            _check_names(folder.root, split, found, trained)
        self.classes = ids if has_ids else list(trained)
        self.num_classes = len(self.classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self._paths, counts = folder.list_images(split, list(found.values()), passed)
        self.labels = np.repeat(np.array([numbers[name] for name in found], np.int32), counts)
        empty = [str(here / name) for name, count in zip(found.values(), counts, strict=True) if not count]
        self.notes = passed.lines(split)
        check_all_were_read(folder.root, passed, empty, self.notes)
        self.notes += folder.check_links(split, found, trained)
        self.notes += _notes_of_classes(folder, split, found, trained, has_ids)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the images in `data.root`."""
        return cls(data.root, split, data.classes)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        image, name = self._folder.read_image(self._paths[index])
        return Example(image, int(self.labels[index]), name)


@functools.cache
def imagenet_classes() -> list[str]:
    """Return the WordNet ids of ImageNet's 1,000 classes; the place of an id is its label."""
    return (Path(__file__).parent / "imagenet_wnids.txt").read_text().split()


def _by_name(folders: list[str], split: Place) -> dict[str, str]:
    """Return folders as they are called, by their names in Unicode's composed form.

    Raises:
        ValueError: two names are the same to the eye.
    """
    names: dict[str, str] = {}
    for folder in folders:
        first = names.setdefault(unicodedata.normalize("NFC", folder), folder)
        if first != folder:
            raise ValueError(
                f"{split} has two folders of one name in two Unicode forms, {first!a} and {folder!a}: put "
                "their images into one"
            )
    return names


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


def _notes_of_classes(
    folder: Folder, split: str, found: dict[str, str], trained: dict[str, str], has_ids: bool
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
        inner = folder.folders(f"{split}/{name}")
        belong = f"; if {some(inner)} in it are the classes, they belong in {folder.root / split}"
        within = belong if inner else ""
        lines.append(f"train has one class, {printable(name)}: nothing is to be told apart{within}")
    return lines
