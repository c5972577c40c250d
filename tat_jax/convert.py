"""PyTorch's weights in, and a student's weights out: `python -m tat_jax.convert --help`.

torchvision's names and ours differ in the last part alone: `weight` is `kernel` or `scale` here, and
`running_mean` is `mean`. timm names its ResNets as torchvision does.
"""

import argparse
import hashlib
import math
import os
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import logging
from einops import rearrange
from flax import nnx

from tat_jax import checkpoint
from tat_jax.checkpoint import Network
from tat_jax.metrics import progress_of_bytes
from tat_jax.resnet import ARCHITECTURES, ResNet
from tat_jax.torch_file import Entries, read_entries

# torchvision's IMAGENET1K_V1; after the dash, the beginning of the file's SHA-256.
PUBLISHED = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
}
PUBLISHED_AT = "https://download.pytorch.org/models"

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_HEAD = ("fc.weight", "fc.bias")


def convert_entries(
    entries: Mapping[str, np.ndarray], architecture: str, *, fresh_head: bool = False, source: str
) -> Network:
    """Return a network with the weights of `entries`, which carry torchvision's names and layouts.

    Width, stem and number of classes are read from the shapes; `num_batches_tracked` means nothing here.
    Half-precision entries become float32, which is exact.

    Args:
        entries: tensors by name.
        architecture: a key of `ARCHITECTURES`.
        fresh_head: leave the head out, and start one for ImageNet's 1,000 classes afresh.
        source: what errors call the entries, and the network its origin.

    Raises:
        ValueError: entries are missing, extra, empty, of another shape or not finite; each is named.
    """
    entries = {
        name: array
        for name, array in entries.items()
        if not name.endswith("num_batches_tracked") and not (fresh_head and name in _HEAD)
    }
    if not fresh_head and not any(name in entries for name in _HEAD):
        raise ValueError(f"{source} has no head ({', '.join(_HEAD)}); --head fresh starts one afresh")
    empty = [name for name, array in entries.items() if not array.size]
    if empty:  # Its shape may claim any width and any number of classes.
        raise ValueError(f"{source} has no numbers in {', '.join(empty)}")
    arguments = _arguments(entries, architecture)
    expected = _torch_shapes(arguments)
    if fresh_head:
        expected = {name: shape for name, shape in expected.items() if name not in _HEAD}
    checkpoint.check_entries({name: a.shape for name, a in entries.items()}, expected, source=source)
    with np.errstate(over="ignore"):  # What float32 cannot hold becomes infinity, here as in training.
        broken = [name for name, array in entries.items() if not np.isfinite(array.astype(np.float32)).all()]
    if broken:
        raise ValueError(f"{source} has NaN or infinity in {', '.join(broken)}")
    weights = {}
    for path in _paths(arguments):
        if torch_name(path) in entries:
            weights[path] = to_ours(path, entries[torch_name(path)])
    if fresh_head:
        own = checkpoint.network_weights(ResNet(**arguments, rngs=nnx.Rngs(0)))
        weights |= {path: value for path, value in own.items() if torch_name(path) in _HEAD}
    return Network(weights, arguments, {"head": "fresh" if fresh_head else "trained", "source": source})


def export_entries(network: Network) -> Entries:
    """Return the weights of a network under torchvision's names, in PyTorch's layouts.

    Raises:
        ValueError: the network is not one of this package's.
    """
    if not network.arguments:
        raise ValueError("this network is not one of torchvision's kind, so it has no names there")
    return {
        torch_name(path): np.ascontiguousarray(to_torch(path, np.asarray(array)))
        for path, array in network.weights.items()
    }


def torch_name(path: str) -> str:
    """Return torchvision's name of one of our attribute paths."""
    module, leaf = path.rsplit(".", 1)
    return f"{module}.{_LEAVES[leaf]}"


def to_ours(path: str, array: np.ndarray) -> np.ndarray:
    """Return PyTorch's array for the attribute `path` in our layout, in float32 at least."""
    array = array.astype(
        np.promote_types(array.dtype, np.float32) if array.dtype != jnp.bfloat16 else np.float32
    )
    if not path.endswith("kernel"):
        return array
    return rearrange(array, "o i h w -> h w i o" if array.ndim == 4 else "o i -> i o")


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """Return our array at the attribute `path` in PyTorch's layout, as a view."""
    if path.endswith("kernel"):
        array = rearrange(array, "h w i o -> o i h w" if array.ndim == 4 else "i o -> o i")
    return array


def _arguments(entries: Mapping[str, np.ndarray], architecture: str) -> dict[str, Any]:
    """Return the arguments of the `ResNet` that `entries` would fit, as far as they tell."""
    stem, head = entries.get("conv1.weight"), entries.get("fc.weight")
    # A stem with less behind each feature than colours and pixels may claim a width of any size.
    stem_told = stem is not None and stem.shape[1:] in ((3, 3, 3), (3, 7, 7))
    head_told = head is not None and head.ndim == 2
    return {
        "architecture": architecture,
        "num_classes": len(head) if head is not None and head_told else 1000,
        "small_images": stem is not None and stem_told and stem.shape[2] == 3,
        "width": len(stem) if stem is not None and stem_told else 64,
    }


def _torch_shapes(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        torch_name(path): to_torch(path, np.broadcast_to(np.float32(0), shape)).shape
        for path, shape in _paths(arguments).items()
    }


def _paths(arguments: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array of a network, without making one."""
    model = nnx.eval_shape(lambda: ResNet(**arguments, rngs=nnx.Rngs(0)))
    return {path: leaf.shape for path, leaf in checkpoint.network_weights(model).items()}


def fetch(architecture: str, folder: Path, *, published_at: str = PUBLISHED_AT) -> Path:
    """Download torchvision's published weights into `folder`, unless they are there, and return the file.

    Raises:
        OSError: the server does not answer as it should.
        ValueError: what came is not the published file.
    """
    name = PUBLISHED[architecture]
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
    entries = export_entries(checkpoint.load_network(checkpoint.network_folder(run)))
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
        description="Convert PyTorch's weights of a ResNet, or export those of a run.",
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
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tat_jax"
    file = options.file or fetch(options.what, cache)
    network = convert_entries(
        read_entries(file), options.what, fresh_head=options.head == "fresh", source=str(file)
    )
    checkpoint.save_network(options.to, network)
    parameters = sum(math.prod(np.shape(array)) for array in network.weights.values())
    print(
        f"{options.to}: {options.what}, {len(network.weights)} entries, {parameters:,} numbers, from {file}"
    )
    if options.head == "fresh":
        print("its head is fresh: terms on logits refuse it as a teacher, TaT does not need it")


if __name__ == "__main__":
    main()
