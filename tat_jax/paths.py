"""Paths as they are typed: `~` is the home folder, `$NAME` a variable, gs:// and s3:// lead into buckets."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/")
_IN_BUCKET = re.compile(r"(gs|s3)://[^/?#\s]+")
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
LOCAL = "on a disk of this machine; mount a bucket first, as gcsfuse does, and name where it lies"
ANYWHERE = "on a disk of this machine, or in a bucket, as gs://bucket/folder or s3://bucket/folder"


def is_address(text: str) -> bool:
    """Return whether a path is an address of any kind, as gs://bucket/run and file:///run are."""
    return _ADDRESS.match(text) is not None


def is_in_bucket(text: str) -> bool:
    """Return whether a path leads into a bucket of a kind that can be reached."""
    return _IN_BUCKET.match(text) is not None


def expand(text: str) -> str:
    """Return a path with its variables and the home folder written out, as a shell does.

    Raises:
        ValueError: a variable is not set, or there is no such home folder.
    """
    if unset := [name for name in _VARIABLE.findall(text) if name.strip("{}") not in os.environ]:
        raise ValueError(f"{text}: ${unset[0]} is not set")
    path = os.path.expanduser(os.path.expandvars(text))
    if path.startswith("~"):
        raise ValueError(f"{text}: there is no such home folder; ./{text} is one of that name here")
    return path


def local(text: str) -> Path:
    """Return the path that a text names on this machine.

    Raises:
        ValueError: the text is empty or an address, or what it begins with is not known, see `expand`.
    """
    if is_address(text):
        raise ValueError(f"{text} is not {LOCAL}")
    if not text:
        raise ValueError("a path is empty")
    path = expand(text)
    if is_address(path):
        raise ValueError(f"{text}, {path}, is not {LOCAL}")
    return Path(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file that is to be at `path` whole or not at all, whoever else writes it now."""
    # Not the number of this process, which one of another machine may have that shares this disk.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write(path: Path, data: bytes) -> None:
    """Write a file whole, or nothing, and the folders that it lies in.

    Raises:
        OSError: it cannot be written; the message names it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        is_other = error.filename and not str(error.filename).startswith(f"{path}.")
        place = f" ({error.filename})" if is_other else ""
        raise OSError(f"cannot write {path}: {error.strerror}{place}") from None


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
