"""A student handed on: one file of weights under torchvision's names."""

import contextlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import safetensors.numpy

from tat_jax.weights import folders, store
from tat_jax.weights.names import export_entries
from tat_jax.weights.tensors import Entries

CHOICES = {"best": folders.best, "last": folders.last}  # of a run's checkpoints


class Exported(NamedTuple):
    """What was written: `entries` from the network in `folder`, whose `head` is trained or not."""

    entries: int
    folder: Path
    head: str


def export(run: Path, path: Path, checkpoint: str | None = None) -> Exported:
    """Write the network of converted weights, or one of a run, as `.pth` or `.safetensors`.

    Args:
        run: the folder of either.
        path: the file, which must not exist.
        checkpoint: of `CHOICES`, and only of a run; the best one if None.

    Raises:
        FileExistsError: `path` exists.
        OSError: it cannot be written; nothing is left of it.
        ValueError: the file's ending is another one, or `run` has no checkpoints to choose from.
        ModuleNotFoundError: a `.pth` is asked for, and PyTorch is not installed.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path} ends neither in .pth nor in .safetensors")
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it or name another file")
    if checkpoint and folders.is_network(run):
        raise ValueError(f"{run} is one network, not a run: leave out --checkpoint {checkpoint}")
    folder = CHOICES[checkpoint](run) if checkpoint else folders.network_folder(run)
    network = store.load_network(folder)
    entries = export_entries(network)
    _write(path, safetensors.numpy.save(entries) if path.suffix == ".safetensors" else _pth(entries))
    return Exported(len(entries), folder, network.origin["head"])


def _pth(entries: Entries) -> bytes:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a .pth file needs PyTorch: pip install torch, or export .safetensors, which timm reads, too"
        ) from None
    file = io.BytesIO()  # PyTorch's own writer tells of a full disk in a stack trace
    torch.save({name: torch.from_numpy(array) for name, array in entries.items()}, file)
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Write a file whole, or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        place = f" ({error.filename})" if error.filename not in (None, str(partial)) else ""
        raise OSError(f"cannot write {path}: {error.strerror}{place}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
