"""CIFAR-10 and CIFAR-100 in memory, from their official archives or from folders of classes.

The archives hold pickles. None is executed: their texts and numbers are read off one after the other, and
which are which follows from the keys before them.
"""

import pickletools
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from tat_jax.data.image_folder import ImageFolder
from tat_jax.data.source import Example, Source, printable
from tat_jax.data.transforms import decode
from tat_jax.paths import expand

SIDE = 32
_PIXELS = 3 * SIDE**2
_MOST = 10_000_000  # operations of a pickle; CIFAR-100's has 0.2 million
_TEXTS = ("STRING", "BYTES", "UNICODE")  # of which the names of pickle's operations for them end


class Cifar:
    """Images of 32×32 pixels with their labels, all in memory.

    Args:
        images: RGB.
        labels: of each.
        classes: names by label.
        name: what errors call the images, before their number.
    """

    files: ClassVar[dict[str, tuple[str, ...]]]
    folder: ClassVar[str]  # in the archive
    names: ClassVar[tuple[str, str]]  # the file of the classes' names, and their key
    label_key: ClassVar[str]

    def __init__(
        self, images: UInt8[np.ndarray, "images 32 32 3"], labels: np.ndarray, classes: list[str], name: str
    ):
        self._images, self._labels, self._name = images, labels.tolist(), name
        self.classes, self.num_classes = classes, len(classes)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the archive `data.root`, of its files in a folder, or of folders of classes.

        Raises:
            FileNotFoundError: nothing of the kind is there.
            ValueError: it is another data set, or damaged.
        """
        root = Path(expand(str(data.root)))
        if (root / "train").is_dir():
            return cls._of_folders(root, split)
        read = _Archive(root, cls.folder)
        classes = _texts(read(cls.names[0]), cls.names[1], read.said(cls.names[0]))
        images, labels = [], []
        for file in cls.files[split]:
            found = _read(read(file), cls.label_key, read.said(file))
            images.append(found[0])
            labels.append(found[1])
        all_labels = np.concatenate(labels)
        if len(classes) <= int(all_labels.max()):
            raise ValueError(f"{read.said(file)} has label {all_labels.max()}, of {len(classes)} classes")
        return cls(np.concatenate(images), all_labels, classes, f"{printable(root.name)}, {split}")

    @classmethod
    def _of_folders(cls, root: Path, split: str) -> Source:
        source = ImageFolder(root, split)
        images = np.empty((len(source), SIDE, SIDE, 3), np.uint8)
        labels = np.empty(len(source), np.int32)
        for i in range(len(source)):
            example = source[i]
            image = decode(example.image, example.name) if isinstance(example.image, bytes) else example.image
            if image.shape != images.shape[1:]:
                raise ValueError(f"{example.name} is {image.shape[0]}×{image.shape[1]}, not {SIDE}×{SIDE}")
            images[i], labels[i] = image, np.asarray(example.label)
        return cls(images, labels, source.classes, f"{printable(root.name)}/{split}")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], self._labels[index], f"{self._name} {index}")


class Cifar10(Cifar):
    """CIFAR-10."""

    folder = "cifar-10-batches-py"
    files: ClassVar = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)}
    names = ("batches.meta", "label_names")
    label_key = "labels"


class Cifar100(Cifar):
    """CIFAR-100, with its hundred fine classes."""

    folder = "cifar-100-python"
    files: ClassVar = {"train": ("train",), "val": ("test",)}
    names = ("meta", "fine_label_names")
    label_key = "fine_labels"


class _Archive:
    """The files of a `.tar.gz`, or of the folder that it unpacks to, which may lie in `root`."""

    def __init__(self, root: Path, folder: str):
        self._root, self._folder = root, folder
        self._layout = (
            f"data.root is the archive of {folder}, that folder, or one with train/<class>/ and val/<class>/"
        )
        if not root.exists():
            raise FileNotFoundError(f"no file or folder {printable(str(root))}; {self._layout}")

    def said(self, file: str) -> str:
        """Return what errors call a file."""
        return f"{printable(str(self._root))}, {file}"

    def __call__(self, file: str) -> bytes:
        """Return what is in a file.

        Raises:
            FileNotFoundError: there is none of this name.
            ValueError: the archive is damaged.
        """
        if self._root.is_dir():
            for place in (self._root / file, self._root / self._folder / file):
                if place.is_file():
                    return place.read_bytes()
            raise FileNotFoundError(f"{printable(str(self._root))} has no {file}; {self._layout}")
        try:
            with tarfile.open(self._root) as archive:
                member = archive.extractfile(f"{self._folder}/{file}")
                if member is not None:
                    return member.read()
        except KeyError:
            pass
        except (tarfile.TarError, EOFError, OSError) as error:
            raise ValueError(f"{printable(str(self._root))} is no .tar.gz, or cut short ({error})") from None
        raise FileNotFoundError(f"{printable(str(self._root))} has no {self._folder}/{file}; {self._layout}")


def _values(pickle: bytes, said: str) -> Iterator[bytes | int]:
    """Yield the texts and the whole numbers of a pickle, in their order.

    Raises:
        ValueError: it is no pickle, or cut short, or far too long.
    """
    try:
        for count, (operation, value, _) in enumerate(pickletools.genops(BytesIO(pickle))):
            if count > _MOST:
                raise ValueError(f"more than {_MOST:,} operations")
            if operation.name.endswith(_TEXTS):
                yield value.encode("latin-1", "replace") if isinstance(value, str) else bytes(value or b"")
            elif "INT" in operation.name and isinstance(value, int):
                yield value
    except Exception as error:
        raise ValueError(f"{said} is no pickle of CIFAR's, or is cut short ({error})") from None


def _read(pickle: bytes, label_key: str, said: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and the labels of a file.

    Raises:
        ValueError: they are not there, or not as many of one as of the other.
    """
    pixels, labels, key = b"", [], ""
    keys = {"data", "labels", "fine_labels", "coarse_labels", "filenames", "batch_label"}
    for value in _values(pickle, said):
        if isinstance(value, bytes):
            text = value.decode("latin-1") if len(value) < 32 else ""
            if text in keys:
                key = text
            elif key == "data" and len(value) > len(pixels):
                pixels = value
        elif key == label_key:
            labels.append(value)
    if not labels or len(pixels) != _PIXELS * len(labels):
        raise ValueError(
            f"{said} has {len(pixels):,} bytes of data and {len(labels):,} {label_key}, where an image has "
            f"{_PIXELS:,} and one: it is another data set, or damaged"
        )
    planes = np.frombuffer(pixels, np.uint8).reshape(-1, 3, SIDE, SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.array(labels, np.int32)


def _texts(pickle: bytes, key: str, said: str) -> list[str]:
    """Return the names that follow a key.

    Raises:
        ValueError: there are none.
    """
    found: list[str] = []
    follows = False
    for value in _values(pickle, said):
        if isinstance(value, bytes):
            text = value.decode("latin-1")
            if text.endswith("label_names"):
                follows = text == key
            elif follows:
                found.append(text)
        else:
            follows = False
    if not found:
        raise ValueError(f"{said} has no {key}: it is another data set, or damaged")
    return found
