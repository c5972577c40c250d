"""torchvision's published weights, fetched once."""

import hashlib
import os
import urllib.request
from pathlib import Path

from tat_jax.metrics import progress_of_bytes

PUBLISHED_AT = "https://download.pytorch.org/models"


def fetch(name: str, folder: Path, *, published_at: str = PUBLISHED_AT) -> Path:
    """Download a file of published weights into `folder`, unless it is there, and return its path.

    Args:
        name: of the file, as in `resnet18-f37072fd.pth`: after the dash, the beginning of its SHA-256.
        folder: where files are kept.
        published_at: the address before the name.

    Raises:
        OSError: the server does not answer as it should.
        ValueError: what came is not the published file.
    """
    path, url = folder / name, f"{published_at}/{name}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            _download(url, partial)
            _check_hash(partial, name, url)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    _check_hash(path, name, str(path))
    return path


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as file:
            size = int(answer.headers["Content-Length"] or 0)
            with progress_of_bytes(size, description=url.rsplit("/", 1)[1]) as bar:
                while chunk := answer.read(1 << 20):
                    bar.update(file.write(chunk))
    except OSError as error:
        raise OSError(
            f"cannot fetch {url}: {error}; fetch it elsewhere, and name the file with --from"
        ) from error
    if path.stat().st_size != size:
        raise ValueError(f"{url} ended after {path.stat().st_size:,} of {size:,} bytes; try again")


def _check_hash(path: Path, name: str, source: str) -> None:
    wanted = name.rsplit("-", 1)[1].removesuffix(".pth")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(wanted):
        raise ValueError(
            f"{source} is not the published file: its SHA-256 begins with {found[:8]}, not {wanted}"
        )
