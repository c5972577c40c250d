"""Weight files of others, by what is in them: PyTorch's, safetensors', or several with an index."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tat_jax.weights.safetensors_file import read_safetensors_file
from tat_jax.weights.tensors import Entries, RefusedError
from tat_jax.weights.torch_file import read_torch_file

# As Hugging Face names them; the first that a folder has is read.
_IN_FOLDERS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_MAX_INDEX = 1 << 22  # bytes; one of a thousand tensors has a fortieth
_MAX_MESSAGE = 1000  # characters, as names in a file can be of any length


def read_entries(path: Path) -> Entries:
    """Return the tensors of a weight file by name, whatever its ending.

    Args:
        path: a file of `torch.save` or of safetensors, an index of several, or a folder of them as Hugging
            Face lays it out.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is broken, or holds more than weights; nothing in it is executed.
    """
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None
    if path.suffix == ".json":
        return _refusing(path, "index of weight files", _read_shards)
    # The ending may be wrong, but a header of safetensors is JSON behind its length.
    named_so = path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))
    if head[8:] == b"{" or named_so:
        return _refusing(path, "safetensors file", read_safetensors_file)
    return _refusing(path, "PyTorch weight file", read_torch_file)


def _file_in(folder: Path) -> Path:
    for name in _IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no weights in {folder}, as {', '.join(_IN_FOLDERS)}; name the file itself")


def _refusing(path: Path, kind: str, read: Callable[[Path], Entries]) -> Entries:
    """Return what a reader returns, or say in a line why it does not."""
    try:
        entries = read(path)
        for name in entries:
            if not name.isprintable():
                raise RefusedError(f"refused, because a tensor is named {name!a}")
        return entries
    except RefusedError as error:
        message = f"{path}: {error}"
    except Exception as error:  # A broken file makes its readers raise nearly anything.
        message = f"{path} is no {kind}, or it is damaged: {error!r}"
    raise RefusedError("".join(c if c.isprintable() else "�" for c in message[:_MAX_MESSAGE]))


def _read_shards(index: Path) -> Entries:
    if index.stat().st_size > _MAX_INDEX:
        raise RefusedError(f"refused, because it is an index of more than {_MAX_INDEX:,} bytes")
    said = json.loads(index.read_bytes(), object_pairs_hook=_without_repeats)
    places = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise RefusedError("it has no weight_map from names to files")
    entries: Entries = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise RefusedError(f"refused, because its file {file!a} is not beside it")
        if file.endswith(".json") or not (index.parent / file).is_file():
            raise RefusedError(f"its file {file!a} is missing")
        found = read_entries(index.parent / file)
        named = {name for name, place in places.items() if place == file}
        if wrong := sorted(found.keys() ^ named):
            raise RefusedError(f"{wrong[0]} is in {file} or in the index, but not in both")
        entries |= found
    return entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedError("refused, because it says something twice")
    return found
