"""A folder on a disk that holds the images of the splits in folders of their classes."""

import os
import stat
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Integer

from tat_jax.buckets import Entry
from tat_jax.data import kept_lists
from tat_jax.data.listing import PassedOver, Paths, identity, is_image, leads_to, list_images, state
from tat_jax.data.source import SPLITS, printable, some

_MANY = 50_000  # images from which on a list is kept: fewer are listed in a moment
_NOT_VAL = ("validation", "valid", "dev", "test")  # what the validation images are called elsewhere


class DiskFolder:
    """The folder that holds the splits, on a disk.

    Args:
        root: its path.
        layout: where images belong, which errors say of `{root}`.
    """

    def __init__(self, root: Path, layout: str):
        self.root = root
        self._layout = layout.format(root=root)

    def check_is_there(self, split: str) -> None:
        """Raise unless there is a folder of that name.

        Raises:
            FileNotFoundError: there is none.
            NotADirectoryError: it is a file.
            OSError: it cannot be reached.
        """
        for folder in (self.root, self.root / split):
            try:
                folder.stat()
            except (FileNotFoundError, NotADirectoryError):
                raise FileNotFoundError(f"no folder {folder}; {self.where_images_belong(split)}") from None
            except OSError as error:
                raise type(error)(
                    f"{folder} cannot be reached ({error.strerror}); let this user read it"
                ) from None
            if not folder.is_dir():
                raise NotADirectoryError(
                    f"{folder} is a file and no folder; {self.where_images_belong(split)}"
                )

    def where_images_belong(self, split: str) -> str:
        """Return where images belong, and what may have been meant by a root that has no such split."""
        root, layout = self.root, self._layout
        if root.name in SPLITS and os.path.isdir(root.parent / split):
            return f"{layout}; did you mean --config.data.root={root.parent}?"
        if split == "val" and not os.path.lexists(root / split):
            for name in _NOT_VAL:
                if os.path.isdir(root / name):
                    return f"{layout}; if {root / name} holds the images to validate, call it val"
        inner = [root / name for name in self.folders() if os.path.isdir(root / name / split)]
        return f"{layout}; did you mean --config.data.root={inner[0]}?" if len(inner) == 1 else layout

    def folders(self, below: str = "") -> list[str]:
        """Return the names of the folders in it, or in one of it, sorted; none of what cannot be read."""
        try:
            with os.scandir(self.root / below) as entries:
                return sorted(entry.name for entry in entries if leads_to(entry) == "folder")
        except OSError:
            return []

    def class_folders(self, split: str, passed: PassedOver) -> list[str]:
        """Return the folders of the classes as they are called, in torchvision's order.

        Args:
            split: may be missing, and has none then.
            passed: is told of what is passed over.

        Raises:
            FileNotFoundError: some are links that lead nowhere, whose classes would silently be missing.
            OSError: the split cannot be read.
        """
        here = self.root / split
        folders, nowhere = [], []
        if not here.is_dir():
            return []
        try:
            with os.scandir(here) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            raise type(error)(f"{here} cannot be read ({error.strerror}); let this user read it") from None
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
                folders.append(entry.name)
            elif is_image(entry.name):
                passed.beside.append(entry.path)
        if nowhere:
            raise FileNotFoundError(
                f"class folders of {here} are links that lead nowhere: {some(nowhere)}; mount their disk, or "
                "remove the links to do without these classes"
            )
        return folders

    def list_images(
        self, split: str, folders: list[str], passed: PassedOver
    ) -> tuple[Paths, Integer[np.ndarray, " folders"]]:
        """Return the paths of the images, one folder after the other, and how many each of them has.

        Args:
            split: holds the folders.
            folders: each with all within it, as `listing.list_images` lists it.
            passed: is told of what is passed over.
        """
        paths = [str(self.root / split / folder) for folder in folders]
        if kept := _load(paths):
            found, counts, within = kept
        else:
            within = PassedOver()
            lists, states = [], {}
            for path in paths:
                images, found_in = list_images(path, within)
                lists.append(images)
                states.update(found_in)
            found = Paths.of(list(chain.from_iterable(lists)))
            counts = np.array(list(map(len, lists)), np.int64)
            _save(paths, found, counts, within, states)
        passed.add(within)
        return found, counts

    def read_image(self, path: str) -> tuple[bytes, str]:
        """Return an image, and what errors call it."""
        try:
            return read(path), printable(path)
        except OSError as error:
            # Of the same kind, but without a number: what it comes of is no matter of the run's folder.
            raise type(error)(
                f"{printable(path)} cannot be read ({error.strerror}); make it readable, or take it out of "
                "its folder"
            ) from error

    def files(self, split: str) -> dict[str, Entry]:
        """Return the files in a split by name, not those in its folders.

        Raises:
            FileNotFoundError: there is no split, or a file is a link that leads nowhere.
            OSError: the split cannot be read.
        """
        self.check_is_there(split)
        try:
            with os.scandir(self.root / split) as entries:
                files = {entry.name: entry.stat() for entry in entries if not entry.is_dir()}
        except OSError as error:
            raise type(error)(f"{error.filename} cannot be read ({error.strerror})") from error
        return {name: _entry(found) for name, found in files.items() if stat.S_ISREG(found.st_mode)}

    def have_settled(self, files: Mapping[str, Entry]) -> bool:
        """Return whether no file changed just before, so that another change would show."""
        return all(kept_lists.has_settled(int(entry.version) / 1e9) for entry in files.values())

    def open(self, path: str, entry: Entry) -> BinaryIO:
        """Open a file of `files`, by its path in this folder."""
        return (self.root / path).open("rb")

    def read_part(self, path: str, entry: Entry, start: int, size: int) -> bytes:
        """Return bytes of a file that is as it was listed.

        Raises:
            OSError: it cannot be read, or is another one by now.
        """
        name = f"{self.root}/{path}"
        try:
            file = os.open(name, os.O_RDONLY)
            try:
                found = os.pread(file, size, start) if _entry(os.fstat(file)) == entry else b""
                while 0 < len(found) < size and (
                    more := os.pread(file, size - len(found), start + len(found))
                ):
                    found += more
            finally:
                os.close(file)
        except OSError as error:
            raise type(error)(f"{printable(name)} cannot be read ({error.strerror})") from error
        if len(found) < size:
            raise OSError(f"{printable(name)} has changed since it was listed")
        return found

    def check_links(self, split: str, found: dict[str, str], trained: dict[str, str]) -> list[str]:
        """Return what to note of class folders of `val` that are folders of `train` under another path.

        Args:
            split: is looked at.
            found: its class folders by the names of the classes.
            trained: those of `train`.

        Raises:
            ValueError: two classes of the split are one folder, whose images would be of both.
        """
        places: dict[tuple[int, int], str] = {}
        for name, folder in found.items():
            first = places.setdefault(identity(str(self.root / split / folder)), name)
            if first != name:
                raise ValueError(
                    f"{self.root / split} has two classes that are one folder, {printable(first)} and "
                    f"{printable(name)}: its images would be of both; remove the link that is wrong"
                )
        if split == "train":
            return []
        same = [
            name for name, folder in trained.items() if identity(str(self.root / "train" / folder)) in places
        ]
        return [f"{split} and train share the folders of their images: {some(same)}"] if same else []


def _entry(status: os.stat_result) -> Entry:
    return Entry(status.st_size, str(status.st_mtime_ns))


def _load(folders: list[str]) -> tuple[Paths, np.ndarray, PassedOver] | None:
    """Return the list of folders that is kept, unless there is none, or it does not hold any more."""
    if (kept := kept_lists.load(folders)) is None:
        return None
    arrays, said = kept
    if any(state(folder) != tuple(then) for folder, then in said["states"].items()):
        return None
    return Paths(arrays["text"], arrays["ends"]), arrays["counts"], PassedOver.of(said["passed"])


def _save(
    folders: list[str],
    found: Paths,
    counts: np.ndarray,
    within: PassedOver,
    states: dict[str, tuple[int, ...]],
) -> None:
    """Keep a list of many images, unless a folder changed just before: another change may not show."""
    # What links lead to may come and go without a change of the folder that they lie in.
    if len(found) < _MANY or within.nowhere or within.back or within.unreadable:
        return
    if all(there and kept_lists.has_settled(there[-1] / 1e9) for there in states.values()):
        arrays = {"text": found.text, "ends": found.ends, "counts": counts}
        kept_lists.save(folders, arrays, {"states": states, "passed": vars(within)})


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
