"""Read PyTorch's weight files as NumPy arrays, without PyTorch and without running code.

A `.pth` file is a pickle that refers to raw storages, in a zip archive or, before PyTorch 1.6, in one stream.
It is read here as `torch.load(..., weights_only=True)` does: only what a dictionary of tensors is made of may
be named in it, every size is checked against the bytes that are there, and the tensors together are no larger
than the file. What describes a training beside them is stepped over, see `harmless`.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

from tat_jax.weights.tensors import Entries, RefusedError, Tensor
from tat_jax.weights.unpickler import Opaque, Unpickler

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_NAME = 512  # characters; those of networks have a tenth
_MAX_ENTRIES = 100_000


def read_torch_file(path: Path) -> Entries:
    """Return the tensors of a file of `torch.save` by name; in dictionaries of dictionaries, names of both.

    So what was saved as `{"model": {"fc.bias": …}}` is `model.fc.bias`. What has numbers for names, as an
    optimiser's state, is left out.

    Raises:
        RefusedError: it is no weight file; a broken one raises anything.
    """
    with path.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        return _named_tensors(
            (_read_archive if zipfile.is_zipfile(file) else _read_legacy)(file, length), length
        )


def _read_archive(file: io.BufferedReader, length: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        for member in members:
            # PyTorch never compresses; a compressed member can unpack to any size.
            if member.compress_type != zipfile.ZIP_STORED:
                raise RefusedError(f"refused, because its member {member.filename} is compressed")
        if sum(member.file_size for member in members) > length:
            raise RefusedError("refused, because its members claim more bytes than it has")
        names = {member.filename for member in members}
        if len(names) < len(members):
            raise RefusedError("refused, because two of its members have one name")
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise RefusedError(f"it has {len(pickles)} members */data.pkl instead of one")
        folder = pickles[0].removesuffix("/data.pkl")
        if f"{folder}/constants.pkl" in names:
            raise RefusedError(
                "it is a program of TorchScript: save the state_dict() of what torch.jit.load reads"
            )
        if f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") != b"little":
            raise RefusedError("its numbers are not little-endian")
        unpickler = Unpickler()
        root = unpickler.load(io.BytesIO(archive.read(pickles[0])))
        for key, storage in unpickler.storages.items():
            storage.bytes = archive.read(f"{folder}/data/{key}")
    return root


def _read_legacy(file: io.BufferedReader, length: int) -> Any:
    file.seek(0)
    if [Unpickler().load(file) for _ in range(2)] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise RefusedError("it does not begin as a PyTorch file")
    system = Unpickler().load(file)
    if not system["little_endian"]:
        raise RefusedError("its numbers are not little-endian")
    unpickler = Unpickler()
    root = unpickler.load(file)
    for key in Unpickler().load(file):
        if type(key) is not str:
            raise RefusedError("one of its storages has no name")
        storage = unpickler.storages[key]
        size = storage.size * storage.dtype.itemsize
        if int.from_bytes(file.read(8), "little") != storage.size or size > length:
            raise RefusedError(f"its storage {key} is not of the size it claims")
        storage.bytes = file.read(size)
    return root


def _named_tensors(root: Any, length: int) -> Entries:
    if not isinstance(root, dict):
        kind = "Python object" if isinstance(root, Opaque) else type(root).__name__
        raise RefusedError(f"it holds a {kind} instead of tensors by name")
    entries: Entries = {}
    counted: set[int] = set()  # as tensors may be one array
    total = 0
    tables, seen = [("", root)], {id(root)}
    for prefix, table in tables:
        for key, value in table.items():
            if type(key) is not str or len(name := prefix + key) > _MAX_NAME:
                continue
            if isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                tables.append((f"{name}.", value))
            elif isinstance(value, Tensor):
                if name in entries:
                    raise RefusedError(f"two of its tensors are named {name}")
                entries[name] = value.array()
                total += 0 if id(entries[name]) in counted else entries[name].nbytes
                counted.add(id(entries[name]))
                # Tensors may share a storage, but no network's share so much; thousands could share one.
                if total > length or len(entries) > _MAX_ENTRIES:
                    raise RefusedError(
                        f"refused, because its tensors together are larger than its {length:,} bytes, "
                        f"or more than {_MAX_ENTRIES:,}"
                    )
    if not entries:
        raise RefusedError("it holds no tensors by name")
    return entries
