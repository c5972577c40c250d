"""Networks in buckets, brought to this machine for as long as they are read."""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from tat_jax.buckets import Bucket, Place
from tat_jax.weights.store import EMA

T = TypeVar("T")
# Written last of a checkpoint that is copied into a bucket, and deleted first: what lacks it is not whole.
MARK = "_CHECKPOINT_METADATA"
_OF_STEP = re.compile(r"checkpoints/(\d+)/(.+)")
_OF_NETWORK = ("student", EMA, "network", "data", "metrics")


@contextlib.contextmanager
def at_hand(place: Place, items: tuple[str, ...] = _OF_NETWORK) -> Iterator[Path]:
    """Yield a folder that holds what is read of a network, or of those of a run: itself, or a copy for now.

    Errors that name the copy are told of the bucket.

    Args:
        place: the folder.
        items: of each checkpoint that are read.

    Raises:
        FileNotFoundError: there is nothing of the kind in the bucket.
        OSError: it cannot be reached.
    """
    if not isinstance(place, Bucket):
        yield place
        return
    wanted = re.compile(rf"(checkpoints/\d+/)?(({'|'.join(items)})/.+|_[^/]+)")
    found = {name: entry for name, entry in whole(place.objects()).items() if wanted.fullmatch(name)}
    if not found:
        raise FileNotFoundError(f"there are no weights and no run in {place}")
    with tempfile.TemporaryDirectory(prefix="tat_jax_") as folder:
        place.fetch(found, Path(folder))
        try:
            yield Path(folder)
        except (ValueError, OSError) as error:
            kind = next(k for k in (FileNotFoundError, OSError, ValueError) if isinstance(error, k))
            raise kind(str(error).replace(folder, str(place))) from error


def step_of(name: str) -> int | None:
    """Return the step of the checkpoint to which a file of a run's folder belongs; None of any other."""
    match = _OF_STEP.fullmatch(name)
    return int(match[1]) if match else None


def mark_of(step: int) -> str:
    """Return the name of the file that says that a checkpoint is whole."""
    return f"checkpoints/{step}/{MARK}"


def whole(files: Mapping[str, T]) -> dict[str, T]:
    """Return the files of a run's folder by name but those of checkpoints that are not whole."""
    return {
        name: file
        for name, file in files.items()
        if (step := step_of(name)) is None or mark_of(step) in files
    }
