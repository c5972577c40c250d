"""Lists of images that lie in the cache, and hold for as long as none of the folders changes."""

import contextlib
import hashlib
import json
import os
import time
import zipfile
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np

from tat_jax import paths
from tat_jax.data.listing import PassedOver, Paths, list_images, state

_MANY = 50_000  # images from which on a list is kept: fewer are listed in a moment
_SETTLED = 5.0  # seconds without a change before a list: times of folders may be as coarse


def list_folders(folders: list[str], passed: PassedOver) -> tuple[Paths, np.ndarray]:
    """Return the paths of the images in folders, one folder after the other, and how many each of them has.

    Args:
        folders: of images, as `listing.list_images` lists each.
        passed: is told of what is passed over.
    """
    place = _place(folders)
    kept = _read(place) if place else None
    if kept is None:
        within = PassedOver()
        lists, states = [], {}
        for folder in folders:
            images, found_in = list_images(folder, within)
            lists.append(images)
            states.update(found_in)
        counts = np.array(list(map(len, lists)), np.int64)
        kept = Paths.of(list(chain.from_iterable(lists))), counts, within
        # What links lead to may come and go without a change of the folder that they lie in.
        if place and counts.sum() >= _MANY and not (within.nowhere or within.back or within.unreadable):
            _write(place, *kept, states)
    found, counts, within = kept
    passed.add(within)
    return found, counts


def _place(folders: list[str]) -> Path | None:
    """Return the file that keeps the list of folders; None where there is no place for it."""
    try:
        cache = paths.cache()
    except ValueError:
        return None
    named = "\0".join([os.getcwd(), *folders])
    return cache / "lists" / f"{hashlib.sha256(os.fsencode(named)).hexdigest()}.npz"


def _read(place: Path) -> tuple[Paths, np.ndarray, PassedOver] | None:
    """Return the list that a file keeps, unless there is none, or it does not hold any more."""
    try:
        with place.open("rb") as file, np.load(file) as kept:
            said = json.loads(kept["said"].tobytes())
            if any(state(folder) != tuple(then) for folder, then in said["states"].items()):
                return None
            found, counts = Paths(kept["text"], kept["ends"]), kept["counts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    within = PassedOver(**said["passed"] | {"endings": Counter(said["passed"]["endings"])})
    return (found, counts, within) if len(found) == counts.sum() else None


def _write(
    place: Path, found: Paths, counts: np.ndarray, within: PassedOver, states: dict[str, tuple[int, ...]]
) -> None:
    """Keep a list, unless a folder changed just before, so that another change may not show."""
    if any(not there or time.time() - there[-1] / 1e9 < _SETTLED for there in states.values()):
        return
    said = json.dumps({"states": states, "passed": vars(within)}).encode()
    with contextlib.suppress(OSError):  # without a list kept, it is listed again
        place.parent.mkdir(parents=True, exist_ok=True)
        with paths.replacing(place) as partial, partial.open("wb") as file:
            np.savez(
                file, text=found.text, ends=found.ends, counts=counts, said=np.frombuffer(said, np.uint8)
            )
