"""What a source of images is: random access by index to encoded or plain images with their labels."""

import inspect
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int, Integer, UInt8
from ml_collections import ConfigDict

SPLITS = ("train", "val")
Label = int | Integer[np.ndarray, "..."] | None


class Example(NamedTuple):
    """One image, as a file or as RGB, with its label and the name under which errors report it.

    A label is an integer, a map of integers or, where the images have none, None.
    """

    image: bytes | UInt8[np.ndarray, "height width 3"]
    label: int | Integer[np.ndarray, "height width"] | None
    name: str


class Source(Protocol):
    """The images of one split, read by index from any thread.

    It may have `classes` and `colours`, those of its classes by their labels, `labels`, those of its images,
    and `notes`, lines that whoever trains on it should have read; see `class_names`, `class_colours`,
    `all_labels` and `notes`. One of label maps has `largest`, see `largest_image`.
    """

    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class NamedSource(Source, Protocol):
    """A source that a config names."""

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the images that a config's `data` describes."""


def class_names(source: Source) -> list[str] | None:
    """Return the names of a source's classes by their labels; None where it does not know them."""
    return getattr(source, "classes", None)


def class_colours(source: Source) -> UInt8[np.ndarray, "classes 3"] | None:
    """Return the colours of a source's classes by their labels; None where it has none of its own."""
    return getattr(source, "colours", None)


def all_labels(source: Source) -> Int[np.ndarray, " images"]:
    """Return the label of each image; a source that does not list them has to read every one for that.

    Raises:
        ValueError: labels are not one class for each image.
    """
    known = getattr(source, "labels", None)
    if known is None:
        known = (source[index].label for index in range(len(source)))
    labels = list(known)
    if not all(isinstance(label, int | np.integer) for label in labels):
        raise ValueError(
            "it reads the class of every image, and the labels of this data.source are no classes"
        )
    return np.array(labels, np.int32)


def check_label_maps(source: Source) -> None:
    """Raise a ValueError unless a source has `largest`, which is not asked for: it may take long to find."""
    if inspect.getattr_static(source, "largest", None) is None:
        raise ValueError(
            "the labels of this data.source are no maps, and task=segmentation takes a class for each pixel: "
            "take a data.source of label maps, or task=classification"
        )


def largest_image(source: Source) -> tuple[int, int]:
    """Return the largest height and the largest width of the images of a source of label maps.

    Raises:
        ValueError: its labels are no maps.
    """
    check_label_maps(source)
    of_maps: Any = source
    return of_maps.largest


def notes(source: Source) -> list[str]:
    """Return what whoever trains on a source should have read, a line each."""
    return list(getattr(source, "notes", ()))


def spread(length: int, count: int) -> Integer[np.ndarray, " indices"]:
    """Return `count` indices, or all that there are, evenly spaced over so many images."""
    return np.unique(np.linspace(0, length - 1, count).astype(int))


def apart(length: int, count: int) -> tuple[Integer[np.ndarray, " held"], Integer[np.ndarray, " rest"]]:
    """Return `count` indices, evenly spaced over so many images, and all others."""
    held = spread(length, count)
    return held, np.setdiff1d(np.arange(length), held)


def printable(name: str) -> str:
    """Return a name in one line that every terminal and file takes, whatever bytes a file's name has."""
    if name.isprintable():  # at once for nearly all
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def some(names: list[str], most: int = 5) -> str:
    """Return names in a line, of many the first ones and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in names[:most]) + more
