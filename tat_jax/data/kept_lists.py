"""Lists that lie in the cache, for whoever made them to see whether they still hold."""

import contextlib
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tat_jax import paths

_SETTLED = 5.0  # seconds without a change before a list: times of files and folders may be as coarse


def load(of: Iterable[str]) -> tuple[dict[str, np.ndarray], Any] | None:
    """Return the list that is kept of paths, as `save` was given it; None where there is none."""
    place = _place(of)
    try:
        with contextlib.ExitStack() as opened:
            if place is None:
                return None
            kept = opened.enter_context(np.load(opened.enter_context(place.open("rb"))))
            arrays = {name: kept[name] for name in kept.files}
            return arrays, json.loads(arrays.pop("said").tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def save(of: Iterable[str], arrays: Mapping[str, np.ndarray], said: Any) -> None:
    """Keep a list of paths, where there is a place for it.

    Args:
        of: the paths of what is listed, by which it is found again.
        arrays: whatever it is.
        said: what else there is to it, as JSON has it.
    """
    place = _place(of)
    if place is None:
        return
    with contextlib.suppress(OSError):  # without a list kept, it is listed again
        place.parent.mkdir(parents=True, exist_ok=True)
        with paths.replacing(place) as partial, partial.open("wb") as file:
            kept = {**arrays, "said": np.frombuffer(json.dumps(said).encode(), np.uint8)}
            np.savez(file, **kept)  # type: ignore[arg-type]


def has_settled(changed: float) -> bool:
    """Return whether a change at that time, in seconds, is so long ago that another one would show."""
    return time.time() - changed >= _SETTLED


def _place(of: Iterable[str]) -> Path | None:
    """Return the file that keeps a list; None where there is no place for it."""
    try:
        cache = paths.cache()
    except ValueError:
        return None
    named = "\0".join(path if paths.is_address(path) else os.path.abspath(path) for path in of)
    return cache / "lists" / f"{hashlib.sha256(os.fsencode(named)).hexdigest()}.npz"
