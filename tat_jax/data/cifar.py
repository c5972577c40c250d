"""CIFAR-10 and CIFAR-100 in memory, from their official archives or from folders of classes."""

import gzip
import tarfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int32, UInt8
from ml_collections import ConfigDict

from tat_jax.buckets import Bucket, place
from tat_jax.data.image_folder import ImageFolder
from tat_jax.data.pickles import bytes_of, read_pickle
from tat_jax.data.source import Example, Source, notes, printable
from tat_jax.data.transforms import decode
from tat_jax.paths import expand

SIDE = 32
_MOST = 2**29  # bytes unpacked; the official archives have 186 million


class Cifar:
    """Images of 32×32 pixels with their labels, all in memory.

    Args:
        images: RGB.
        labels: of each.
        classes: names by label.
        name: what errors call the images, before their number.
        notes: what whoever trains on them should have read.
    """

    files: ClassVar[dict[str, tuple[str, ...]]]
    folder: ClassVar[str]  # in the archive
    names: ClassVar[tuple[str, bytes]]  # the file of the classes' names, and their key
    label_key: ClassVar[bytes]

    def __init__(
        self,
        images: UInt8[np.ndarray, "images 32 32 3"],
        labels: Int32[np.ndarray, " images"],
        classes: list[str],
        name: str,
        notes: Sequence[str] = (),
    ):
        self._images, self._labels, self._name = images, labels.tolist(), name
        self.classes, self.num_classes, self.notes = classes, len(classes), list(notes)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the archive `data.root`, of its files in a folder, or of folders of classes.

        Raises:
            FileNotFoundError: nothing of the kind is there.
            ValueError: it is another data set, or damaged.
        """
        root = place(expand(str(data.root)))
        if isinstance(root, Bucket):
            raise ValueError(f"{root}: CIFAR is read from disks alone; copy it to one")
        if (root / "train").is_dir():
            return cls._of_folders(root, split)
        (names, key), files = cls.names, cls.files[split]
        found = _read_files(root, cls.folder, (names, *files))
        classes = _classes(found[names], key, f"{root}: {names}")
        parts = [_part(found[file], cls.label_key, len(classes), f"{root}: {file}") for file in files]
        images, labels = map(np.concatenate, zip(*parts, strict=True))
        return cls(images, labels, classes, f"{printable(str(root))}, {split}")

    @classmethod
    def _of_folders(cls, root: Path, split: str) -> Source:
        source = ImageFolder(root, split)
        images = np.empty((len(source), SIDE, SIDE, 3), np.uint8)
        labels = np.empty(len(source), np.int32)
        for i in range(len(source)):
            image, label, name = source[i]
            rgb = decode(image, name) if isinstance(image, bytes) else image
            if rgb.shape != images.shape[1:]:
                raise ValueError(f"{name} is {rgb.shape[0]}×{rgb.shape[1]}, and CIFAR's are {SIDE}×{SIDE}")
            images[i], labels[i] = rgb, np.asarray(label)
        return cls(images, labels, source.classes, printable(str(root / split)), notes(source))

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], self._labels[index], f"{self._name} {index}")


class Cifar10(Cifar):
    """CIFAR-10 (Krizhevsky, 2009)."""

    files: ClassVar = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)}
    folder = "cifar-10-batches-py"
    names = ("batches.meta", b"label_names")
    label_key = b"labels"


class Cifar100(Cifar):
    """CIFAR-100 (Krizhevsky, 2009), with its hundred fine classes."""

    files: ClassVar = {"train": ("train",), "val": ("test",)}
    folder = "cifar-100-python"
    names = ("meta", b"fine_label_names")
    label_key = b"fine_labels"


def _read_files(root: Path, folder: str, files: Sequence[str]) -> dict[str, bytes]:
    """Return files of a `.tar.gz`, or of the folder that it unpacks to, which may lie in `root`.

    Raises:
        FileNotFoundError: some are not there.
        ValueError: the archive is damaged.
    """
    layout = f"data.root is the .tar.gz or the folder {folder}, or has train/<class>/ and val/<class>/"
    if not root.exists():
        raise FileNotFoundError(f"{root} is not there; {layout}")
    if root.is_dir():
        here = root / folder if (root / folder).is_dir() else root
        found = {file: (here / file).read_bytes() for file in files if (here / file).is_file()}
    else:
        found = _unpacked(root, folder, files)
    if missing := [file for file in files if file not in found]:
        raise FileNotFoundError(f"{root} has no {folder}/{missing[0]}; {layout}")
    return found


def _unpacked(archive: Path, folder: str, files: Sequence[str]) -> dict[str, bytes]:
    """Return those of the files that a `.tar.gz` has.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with gzip.open(archive) as opened:
            # To its end, where the check sum is.
            content = opened.read(_MOST + 1)
        if len(content) > _MOST:
            raise tarfile.TarError(f"more than {_MOST:,} bytes")
        with tarfile.open(fileobj=BytesIO(content), mode="r:") as tar:
            members = {member.name: tar.extractfile(member) for member in tar if member.isfile()}
            return {file: member.read() for file in files if (member := members.get(f"{folder}/{file}"))}
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{archive} is no .tar.gz, cut short or damaged ({error}): fetch it anew") from None


def _part(
    content: bytes, label_key: bytes, classes: int, said: str
) -> tuple[UInt8[np.ndarray, "images 32 32 3"], Int32[np.ndarray, " images"]]:
    """Return the images and the labels of a file.

    Raises:
        ValueError: they are not there, or not as many of one as of the other; or there is no such class.
    """
    found = _dictionary(content, said)
    labels = found.get(label_key)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{said} has no {label_key.decode()}: it is another data set, or damaged")
    if strange := [label for label in labels if not 0 <= label < classes]:
        raise ValueError(f"{said} has the label {strange[0]}, and there are {classes} classes")
    try:
        planes = bytes_of(found.get(b"data"))
    except ValueError as error:
        raise ValueError(f"{said}: its data are {error}") from None
    if planes.shape != (len(labels), 3 * SIDE**2):
        raise ValueError(
            f"{said} has {len(labels):,} labels and data {list(planes.shape)}, and an image of "
            f"{SIDE}×{SIDE} has {3 * SIDE**2:,} bytes"
        )
    images = planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int32)


def _classes(content: bytes, key: bytes, said: str) -> list[str]:
    names = _dictionary(content, said).get(key)
    if not isinstance(names, list) or not names or not all(type(name) is bytes for name in names):
        raise ValueError(f"{said} has no {key.decode()}: it is another data set, or damaged")
    return [name.decode("utf-8", "replace") for name in names]


def _dictionary(content: bytes, said: str) -> dict[bytes, Any]:
    try:
        found = read_pickle(content)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{said} is no dictionary: it is another data set, or damaged")
    return found
