"""Paths as they are typed: `~` is the home folder, and a bucket is no folder."""

import os
import re
from pathlib import Path

_BUCKET = re.compile(r"[A-Za-z][\w+.-]+:/")
LOCAL = "on a disk of this machine; mount a bucket first, as gcsfuse does, and name where it lies"


def is_bucket(text: str) -> bool:
    """Return whether a path is an address, as gs://bucket/run is."""
    return _BUCKET.match(text) is not None


def local(text: str) -> Path:
    """Return the path that a text names on this machine.

    Raises:
        ValueError: the text is empty or an address, or there is no such home folder.
    """
    if is_bucket(text):
        raise ValueError(f"{text} is not {LOCAL}")
    if not text:
        raise ValueError("a path is empty")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"{text}: there is no such home folder; ./{text} is one of that name here")
    return Path(path)


def cache() -> Path:
    """Return the folder for what can be fetched or computed again; it need not exist.

    Raises:
        ValueError: the user has no home folder, and XDG_CACHE_HOME names none.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    folder = named if os.path.isabs(named) else os.path.expanduser("~/.cache")  # as its specification says
    if not os.path.isabs(folder):
        raise ValueError("this user has no home folder")
    return Path(folder) / "tat_jax"
