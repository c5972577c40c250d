"""PyTorch's weights in, and a student's weights out: `python -m tat_jax.convert --help`."""

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
from absl import logging

from tat_jax import outputs, signals
from tat_jax.networks import ARCHITECTURES
from tat_jax.weights import folders, store
from tat_jax.weights.names import convert_entries, export_entries
from tat_jax.weights.published import fetch
from tat_jax.weights.torch_file import Entries, read_entries


def export(run: Path, path: Path) -> int:
    """Write the network of converted weights, or the best of a run, as `.pth` or `.safetensors`.

    Returns:
        The number of entries.

    Raises:
        FileExistsError: `path` exists.
        ValueError: the file's ending is another one.
        ModuleNotFoundError: a `.pth` is asked for, and PyTorch is not installed.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path} ends neither in .pth nor in .safetensors")
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it or name another file")
    entries = export_entries(store.load_network(folders.network_folder(run)))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        if path.suffix == ".safetensors":
            safetensors.numpy.save_file(entries, partial)
        else:
            _save_pth(entries, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(entries)


def _save_pth(entries: Entries, path: Path) -> None:
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a .pth file needs PyTorch: pip install torch, or export .safetensors, which timm reads, too"
        ) from None
    torch.save({name: torch.from_numpy(array) for name, array in entries.items()}, path)


def main(arguments: list[str] | None = None) -> None:
    """Convert what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m tat_jax.convert",
        description="Convert PyTorch's weights of a network, or export those of a run.",
    )
    parser.add_argument(
        "what", metavar="ARCHITECTURE|RUN", help=f"{', '.join(ARCHITECTURES)}; a run to export"
    )
    parser.add_argument("--to", type=Path, help="the folder for the converted weights")
    parser.add_argument(
        "--from",
        dest="file",
        type=Path,
        help="a .pth or .safetensors file with torchvision's or timm's names, instead of a download",
    )
    parser.add_argument("--head", choices=["fresh"], help="convert the backbone, and start a head afresh")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write RUN's best student to this file")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax reports every step of every save
    try:
        if options.export:
            count = export(Path(options.what), options.export)
            print(f"{options.export}: {count} entries under torchvision's names, from {options.what}")
        else:
            _convert(parser, options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def _convert(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.what not in ARCHITECTURES:
        parser.error(f"no architecture {options.what!r}; there are {', '.join(ARCHITECTURES)}")
    if options.to is None:
        parser.error("--to says where the converted weights go")
    if options.to.exists():
        raise FileExistsError(f"{options.to} exists already; remove it or name another folder")
    file = options.file or _published(options.what)
    network = convert_entries(
        read_entries(file), options.what, fresh_head=options.head == "fresh", source=str(file)
    )
    store.save_network(options.to, network)
    parameters = sum(math.prod(np.shape(array)) for array in network.weights.values())
    print(
        f"{options.to}: {options.what}, {len(network.weights)} entries, {parameters:,} numbers, from {file}"
    )
    if options.head == "fresh":
        print("its head is fresh: terms on logits refuse it as a teacher, TaT does not need it")


def _published(architecture: str) -> Path:
    name = ARCHITECTURES[architecture].published
    if name is None:
        raise FileNotFoundError(
            f"no weights of {architecture} are published; name a file of them with --from"
        )
    return fetch(name, Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tat_jax")


if __name__ == "__main__":
    outputs.keep()
    signals.act_at_once()
    main()
