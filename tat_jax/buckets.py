"""Folders in buckets, gs:// and s3://, through obstore.

A store knows no folders and cannot append: an object is written whole, and is there at once or not at all.
"""

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, TypeVar

from tat_jax import paths

# Where each client looks by itself, see obstore's documentation; said where none of it leads to credentials.
_CREDENTIALS = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, or a Google VM",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a web identity, or the role of an Amazon VM",
}
_ENDPOINTS = ("GOOGLE_BASE_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
_AT_ONCE = 16  # requests
_PART = 16 * 2**20  # bytes of a request that reads, so that each one ends in time
_WINDOW = 4 * 2**20  # bytes of a request where an object is read from one end to the other, by and by
_TIMES = {"timeout": timedelta(seconds=30), "connect_timeout": timedelta(seconds=5)}
_RETRIES = {"max_retries": 10, "retry_timeout": timedelta(seconds=30)}

T = TypeVar("T")
Stamp: TypeAlias = Mapping[str, str]  # of one version of an object


class Entry(NamedTuple):
    """An object as it is listed: its bytes, and what tells its versions apart."""

    size: int
    version: str


class Bucket:
    """A folder in a bucket, named as gs://bucket/folder or s3://bucket/folder.

    Where a request fails it is sent again, for half a minute; what fails then is an OSError in a line.

    Args:
        url: of the folder.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}  # a client belongs to its process

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return self.url.rpartition("/")[2]

    @functools.cached_property
    def _store(self) -> Any:
        with self._telling():
            return _obstore(self.url).store.from_url(
                self.url,
                client_options={
                    **_TIMES,
                    # An emulator's, and only where the environment says so.
                    "allow_http": any(os.environ.get(n, "").startswith("http://") for n in _ENDPOINTS),
                },
                retry_config=_RETRIES,
            )

    @property
    def _obs(self) -> Any:
        return _obstore(self.url)

    def objects(self, below: str = "") -> dict[str, Entry]:
        """Return all objects in the folder, or in one of it, by name; empty where there is none."""
        with self._telling():
            return {
                found["path"]: _entry(found)
                for found in self._obs.list(self._store, prefix=below or None).collect()
            }

    def folders(self, below: str = "") -> list[str]:
        """Return the names of the folders directly in the folder, or in one of it, sorted."""
        with self._telling():
            found = self._obs.list_with_delimiter(self._store, prefix=below or None)["common_prefixes"]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def read(self, name: str) -> bytes:
        """Return an object.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.read_stamped(name)[0]

    def read_stamped(self, name: str) -> tuple[bytes, Stamp]:
        """Return an object, and the stamp of its version."""
        with self._telling(name):
            found = self._obs.get(self._store, name)
            return bytes(found.bytes()), _stamp(found.meta)

    def read_part(self, name: str, entry: Entry, start: int, size: int) -> bytes:
        """Return bytes of an object.

        Raises:
            FileNotFoundError: it is gone.
            OSError: it is another one than was listed.
        """
        if not size:
            return b""
        with self._telling(name):
            found = self._obs.get(self._store, name, options={"range": (start, start + size)})
            if _entry(found.meta) == entry:
                return bytes(found.bytes())
        raise OSError(f"{self.url}/{name} has changed since it was listed")

    def open(self, name: str, entry: Entry) -> BinaryIO:
        """Return an object as a file that can be sought in, and asks for a part when it is needed."""
        return io.BufferedReader(_Parts(self, name, entry), _WINDOW)

    def write(self, name: str, data: bytes | Path) -> None:
        """Write an object whole, bytes or a file."""
        with self._telling(name):
            self._obs.put(self._store, name, data)

    def write_instead(self, name: str, data: bytes, before: Stamp | None) -> Stamp:
        """Write an object in the place of that version alone, or where there is none if None.

        Raises:
            FileExistsError: there is another version.
        """
        with self._telling(name):
            mode = dict(before) if before else "create"
            return _stamp(self._obs.put(self._store, name, data, mode=mode))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that are gone already are no error."""
        with self._telling():
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._obs.delete(self._store, name)

    def fetch(self, entries: Mapping[str, Entry], to: Path) -> None:
        """Copy objects, as they are listed, into files of the same names.

        Raises:
            FileNotFoundError: one was deleted meanwhile.
        """
        parts = []
        for name, entry in entries.items():
            file = to / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as opened:
                opened.truncate(entry.size)
            parts += [(name, start, entry.size) for start in range(0, entry.size, _PART)]

        def fetch_part(part: tuple[str, int, int]) -> None:
            name, start, size = part
            length = min(_PART, size - start)
            with self._telling(name):
                data = self._obs.get_range(self._store, name, start=start, length=length)
            with (to / name).open("r+b") as opened:
                opened.seek(start)
                opened.write(data)

        side_by_side(fetch_part, parts)

    @contextlib.contextmanager
    def _telling(self, name: str = "") -> Iterator[None]:
        """Say in a line what a request came to that failed."""
        place = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except Exception as error:  # whatever the client raises
            kind, said = type(error).__name__, str(error)
            if "NoSuchBucket" in said or "bucket does not exist" in said:
                raise FileNotFoundError(f"there is no bucket of {self.url}") from None
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"there is no {place}") from None
            if kind in ("AlreadyExistsError", "PreconditionError"):
                raise FileExistsError(f"{place} was written by another") from None
            if type(error).__module__.partition(".")[0] != "obstore":
                raise
            raise _refused(place, kind, said) from None


class _Parts(io.RawIOBase):
    """An object as a file without a buffer."""

    def __init__(self, bucket: Bucket, name: str, entry: Entry):
        self._bucket, self._name, self._entry, self._at = bucket, name, entry, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._entry.size - self._at))
        buffer[:size] = self._bucket.read_part(self._name, self._entry, self._at, size)
        self._at += size
        return size


Place: TypeAlias = Path | Bucket


def place(named: str | Path | Bucket) -> Place:
    """Return the folder that a text names, on this machine or in a bucket.

    Raises:
        ValueError: it is an address of another kind.
    """
    if isinstance(named, Bucket):
        return named
    if paths.is_in_bucket(str(named)):
        return Bucket(str(named))
    if paths.is_address(str(named)):
        raise ValueError(f"{named} is not {paths.ANYWHERE}")
    return Path(named)


def read(folder: Place, name: str) -> bytes:
    """Return a file of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    return folder.read(name) if isinstance(folder, Bucket) else (folder / name).read_bytes()


def side_by_side(function: Callable[[T], object], arguments: Sequence[T]) -> None:
    """Call a function with each of many arguments, some at once; the first error ends it all."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        for _ in pool.map(function, arguments):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _obstore(url: str) -> Any:
    try:
        import obstore
        import obstore.store
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{url} needs obstore: pip install obstore") from None
    return obstore


def _entry(said: Mapping[str, Any]) -> Entry:
    return Entry(said["size"], said["e_tag"] or str(said["last_modified"]))


def _stamp(said: Mapping[str, Any]) -> Stamp:
    return {name: said[name] for name in ("e_tag", "version") if said.get(name)}


def _refused(place: str, kind: str, message: str) -> OSError:
    """Return the error of a request that failed for good, with the way out."""
    scheme = place.partition(":")[0]
    if kind == "UnauthenticatedError" or re.search(r"token request|credential|169\.254\.", message, re.I):
        return PermissionError(f"no credentials for {place}; they come from {_CREDENTIALS[scheme]}")
    if kind == "PermissionDeniedError":
        return PermissionError(f"access to {place} is denied; give the account of these credentials access")
    status = re.search(r"status code: (\d+ [\w ]+)", message)
    reason = status[1].strip() if status else _innermost(message)
    return OSError(f"{place} cannot be reached: {reason}")


def _innermost(message: str) -> str:
    """Return of a chain of causes the line that the client says first, without the request."""
    line = message.split("\n")[0]
    return re.sub(r"^Generic \w+ error: ", "", line)[:200].rstrip(": ")
