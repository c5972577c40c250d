"""Which files of a folder are images, in torchvision's order, and what is passed over on the way."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Integer, UInt8

from tat_jax.data.source import some

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


@dataclass
class PassedOver:
    """What is no image of a split, or cannot be reached.

    Attributes:
        endings: how many files have names that end so.
        hidden: images and folders whose names begin with a dot.
        beside: images that lie in no class folder.
        nowhere: links that lead to nothing.
        back: links that lead to a folder around them.
        unreadable: folders, with the reason.
    """

    endings: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    nowhere: list[str] = field(default_factory=list)
    back: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, said: dict[str, Any]) -> Self:
        """Return what `vars` gave, and JSON kept."""
        return cls(**said | {"endings": Counter(said["endings"])})

    def add(self, other: "PassedOver") -> None:
        """Take in what was passed over elsewhere."""
        self.endings.update(other.endings)
        for name, paths in vars(other).items():
            if name != "endings":
                getattr(self, name).extend(paths)

    def lines(self, split: str) -> list[str]:
        """Return a line for each kind of what was passed over in a split."""
        kinds = [f"{count:,} {ending}" for ending, count in self.endings.most_common()]
        lines = [f"{split}: passed over {some(kinds)}; read are {' '.join(EXTENSIONS)}"] if kinds else []
        for names, what in (
            (self.hidden, "names that begin with a dot"),
            (self.beside, "images outside class folders"),
            (self.nowhere, "links that lead nowhere"),
            (self.back, "links that lead back to a folder around them"),
        ):
            if names:
                lines.append(f"{split}: passed over {what} ({len(names):,}): {some(names, 2)}")
        return lines


@dataclass(frozen=True)
class Paths:
    """Paths in two arrays: in half of the memory that texts take, and processes share it.

    Attributes:
        text: the bytes of all of them.
        ends: where each one ends, after a 0.
    """

    text: UInt8[np.ndarray, " bytes"]
    ends: Integer[np.ndarray, " ends"]

    @classmethod
    def of(cls, paths: list[str]) -> Self:
        """Return paths in arrays."""
        encoded = list(map(os.fsencode, paths))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)]))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes())


def is_image(name: str) -> bool:
    """Return whether a file's name says that it is an image which torchvision reads."""
    return name.lower().endswith(EXTENSIONS)


def leads_to(entry: os.DirEntry[str]) -> Literal["folder", "file", "else", "nowhere"]:
    """Return what a name in a folder stands for, links followed."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself, or through a file
        return "nowhere"
    return "nowhere" if entry.is_symlink() else "else"


def list_images(folder: str, passed: PassedOver) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Return the paths of the images in a folder and in all within it, in torchvision's order.

    Args:
        folder: links in it are followed, but for those that lead back to a folder around them.
        passed: is told of what is passed over.

    Returns:
        The paths, and the `state` in which each folder was found.
    """
    states: dict[str, tuple[int, ...]] = {}
    found: list[tuple[str, list[str]]] = []
    waiting = [(folder, _around(folder))]
    while waiting:
        here, around = waiting.pop()
        states[here] = state(here)
        try:
            with os.scandir(here) as scanned:
                entries = list(scanned)
        except OSError as error:
            passed.unreadable.append(f"{here} ({error.strerror})")
            continue
        images = []
        for entry in entries:
            # At once for nearly all: a million names are listed before a training begins.
            if entry.is_file(follow_symlinks=False) and is_image(entry.name) and entry.name[0] != ".":
                images.append(entry.name)
                continue
            kind = leads_to(entry)
            if kind == "nowhere":
                passed.nowhere.append(entry.path)
            elif entry.name[0] == ".":
                if kind == "folder" or is_image(entry.name):
                    passed.hidden.append(entry.path)
            elif kind == "folder":
                here_is = identity(entry.path)
                if here_is in around and entry.is_symlink():
                    passed.back.append(entry.path)
                else:
                    waiting.append((entry.path, around | {here_is}))
            elif kind == "file" and is_image(entry.name):
                images.append(entry.name)
            else:
                ending = os.path.splitext(entry.name)[1].lower() or "without ending"
                passed.endings[ending if kind == "file" else f"{ending} that are no files"] += 1
        found.append((here, images))
    return [os.path.join(here, name) for here, images in sorted(found) for name in sorted(images)], states


def check_all_were_read(root: object, passed: PassedOver, empty: list[str], lines: list[str]) -> None:
    """Raise if folders could not be read, or have no images.

    Args:
        root: where they lie.
        passed: what was passed over, and what could not be read.
        empty: folders without images.
        lines: what more to say of those.

    Raises:
        OSError: folders cannot be read.
        FileNotFoundError: they have no images.
    """
    if passed.unreadable:
        raise OSError(
            f"folders of images cannot be read: {some(passed.unreadable)}; let this user read them, or move "
            f"them out of {root}"
        )
    if empty:
        what = "".join(f"; {line}" for line in lines)
        raise FileNotFoundError(f"no images in {some(empty)} ({' '.join(EXTENSIONS)}){what}")


def _around(folder: str) -> frozenset[tuple[int, int]]:
    """Return the identities of a folder and of all that it lies in, by its name and by where links lead."""
    paths: set[str] = set()
    for path in (os.path.abspath(folder), os.path.realpath(folder)):
        while path not in paths:
            paths.add(path)
            path = os.path.dirname(path)
    return frozenset(map(identity, paths))


def state(folder: str) -> tuple[int, ...]:
    """Return what changes when a folder becomes another one, or a name in it comes or goes."""
    try:
        status = os.stat(folder)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def identity(path: str) -> tuple[int, int]:
    """Return what two names of the same folder have in common; of one that is gone, nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return status.st_dev, status.st_ino
