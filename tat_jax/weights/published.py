"""torchvision's published weights, fetched once."""

import contextlib
import hashlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tat_jax import paths
from tat_jax.metrics import progress_of_bytes

PUBLISHED_AT = "https://download.pytorch.org/models"


def fetch_weights(architecture: str, name: str | None, found_at: str = "") -> Path:
    """Return the file of an architecture's published weights, in the user's cache.

    Args:
        architecture: its name.
        name: of the file, as `fetch` has it; None where torchvision has none.
        found_at: where others publish one, in words.

    Raises:
        OSError: none are published, there is no cache, or the server does not answer as it should.
        ValueError: what came is not the published file.
    """
    if name is None and found_at:
        raise FileNotFoundError(
            f"{architecture} is not fetched: get {found_at}, and name it with --from FILE"
        )
    if name is None:
        raise FileNotFoundError(
            f"no weights of {architecture} are published; name a file of them with --from"
        )
    return fetch(name, _cache())


def fetch(name: str, folder: Path, *, published_at: str = PUBLISHED_AT) -> Path:
    """Download a file of published weights into `folder`, unless it is there, and return its path.

    Args:
        name: of the file, as in `resnet18-f37072fd.pth`: after the dash, the beginning of its SHA-256.
        folder: where files are kept.
        published_at: the address before the name.

    Raises:
        OSError: the server does not answer as it should, or the file cannot be written.
        ValueError: what came is not the published file.
    """
    path, url = folder / name, f"{published_at}/{name}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with paths.replacing(path) as partial:
                _download(url, partial)
                _check_hash(partial, name, url)
        except ConnectionError:
            raise
        except OSError as error:
            raise OSError(
                f"cannot keep {path}: {error.strerror}; XDG_CACHE_HOME names another folder, "
                "and --from a file that is there"
            ) from None
    _check_hash(path, name, str(path))
    return path


def _cache() -> Path:
    try:
        return paths.cache()
    except ValueError as error:
        raise FileNotFoundError(
            f"there is no folder to keep a download in: {error}; set HOME or XDG_CACHE_HOME, "
            "or name a file with --from"
        ) from None


def _download(url: str, path: Path) -> None:
    with _reaching(url):
        answer = urllib.request.urlopen(url, timeout=30)
    with answer, path.open("wb") as file:
        size = int(answer.headers["Content-Length"] or 0)
        with progress_of_bytes(size, description=url.rsplit("/", 1)[1]) as bar:
            while chunk := _read(answer, url):
                bar.update(file.write(chunk))
    if path.stat().st_size != size:
        raise ValueError(f"{url} ended after {path.stat().st_size:,} of {size:,} bytes; try again")


def _read(answer: IO[bytes], url: str) -> bytes:
    with _reaching(url):
        return answer.read(1 << 20)


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[None]:
    """Tell what a server does not do from what a disk does not."""
    try:
        yield
    except OSError as error:
        raise ConnectionError(
            f"cannot fetch {url}: {error}; fetch it elsewhere, and name the file with --from"
        ) from error


def _check_hash(path: Path, name: str, source: str) -> None:
    wanted = name.rsplit("-", 1)[1].removesuffix(".pth")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(wanted):
        raise ValueError(
            f"{source} is not the published file: its SHA-256 begins with {found[:8]}, not {wanted}"
        )
