"""A student handed on: a file of weights under its names in PyTorch, and beside it how it is used."""

import io
from pathlib import Path
from typing import NamedTuple

import safetensors.numpy

from tat_jax import networks, paths
from tat_jax.buckets import Place
from tat_jax.networks import OwnNetwork
from tat_jax.usage import as_json
from tat_jax.weights import folders, remote, store
from tat_jax.weights.names import export_entries
from tat_jax.weights.tensors import Entries


class Exported(NamedTuple):
    """What was written.

    Attributes:
        entries: how many.
        folder: the network's.
        head: whether its head is trained.
        usage: the file that says how it is used; None where nobody knows.
    """

    entries: int
    folder: str
    head: str
    usage: Path | None


def export(
    run: Place, path: Path, checkpoint: str | None = None, *, student: OwnNetwork | None = None
) -> Exported:
    """Write the network of converted weights, or one of a run, as `.pth` or `.safetensors`.

    A JSON file of the same name says what its images must be and its classes are called.

    Args:
        run: the folder of either, on this machine or in a bucket.
        path: the file, which must not exist.
        checkpoint: "best", "last", "best_ema" or "last_ema", and only of a run; the best one if None.
        student: a network of your own, as in `train.run`, where the folder holds weights of one.

    Raises:
        FileExistsError: `path` exists, or the JSON file beside it and says something else.
        OSError: it cannot be written; nothing is left of it.
        ValueError: the file's ending is another one, or `run` has no checkpoints to choose from.
        ModuleNotFoundError: a `.pth` is asked for, and PyTorch is not installed.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path} ends neither in .pth nor in .safetensors")
    usage = path.with_suffix(".json")
    if path.exists():
        raise _exists(path)
    with remote.at_hand(run) as here:
        if checkpoint and folders.is_network(here):
            raise ValueError(f"{run} is one network, not a run: leave out --checkpoint {checkpoint}")
        folder = folders.CHOICES[checkpoint](here) if checkpoint else folders.network_folder(here)
        network = store.load_network(folder)
        named = str(folder).replace(str(here), str(run), 1)
    own = networks.restore_own(network, student, source=named).view.network if student else None
    entries = export_entries(network, own)
    if network.usage and usage.exists() and usage.read_bytes() != as_json(network.usage):
        raise _exists(usage)
    paths.write(path, safetensors.numpy.save(entries) if path.suffix == ".safetensors" else _pth(entries))
    if network.usage:
        paths.write(usage, as_json(network.usage))
    return Exported(len(entries), named, network.origin["head"], usage if network.usage else None)


def _exists(file: Path) -> FileExistsError:
    return FileExistsError(f"{file} exists already; remove it or name another file")


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
