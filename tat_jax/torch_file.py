"""Read PyTorch's and safetensors' weight files as NumPy arrays, without PyTorch and without running code.

A `.pth` file is a pickle that refers to raw storages, in a zip archive or, before PyTorch 1.6, in one stream.
It is read here as `torch.load(..., weights_only=True)` does: only what a dictionary of tensors is made of may
be named in it, and every size is checked against the bytes that are there.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

Entries = dict[str, np.ndarray]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_SAFETENSORS_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
}


def read_entries(path: Path) -> Entries:
    """Return the tensors of a `.safetensors` or `.pth` file by name.

    A state dict may lie under `state_dict` or `model`, and its names may begin with `module.`, as
    DistributedDataParallel leaves them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or holds more than weights; nothing in it is executed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        return _named_tensors(_read_pth(path))
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # A broken pickle makes the unpickler raise nearly anything.
        raise ValueError(f"{path} is no PyTorch weight file, or it is damaged: {error}") from error


class _RefusedError(ValueError):
    """A file holds what no weight file holds."""


class _Storage:
    """Raw numbers of one type; in a legacy file their bytes follow later."""

    def __init__(self, dtype: np.dtype, size: int):
        self.dtype, self.size = dtype, size
        self.bytes = b""


class _Tensor(NamedTuple):
    """A view of a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        storage = self.storage
        if len(storage.bytes) != storage.size * storage.dtype.itemsize:
            raise _RefusedError(f"a storage of {storage.size} elements has {len(storage.bytes)} bytes")
        if not all(type(n) is int and n >= 0 for n in (self.offset, *self.shape, *self.strides)):
            raise _RefusedError("a tensor has a negative size, stride or offset")
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((size - 1) * stride for size, stride in steps)
        count = int(math.prod(self.shape))
        if count > storage.size or (count and last >= storage.size):
            raise _RefusedError(f"a tensor of shape {self.shape} reaches beyond its {storage.size} elements")
        flat = np.frombuffer(storage.bytes, storage.dtype)[self.offset :]
        strides = [stride * storage.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False).copy()


class _WeightsOnlyUnpickler(pickle.Unpickler):
    """Unpickle dictionaries of tensors and nothing else."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        raise _RefusedError(f"refused, because a weight file has no need of {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise _RefusedError(f"refused, because it refers to {pid!r}")
        return self.storages.setdefault(key, _Storage(dtype, size))


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


def _read_pth(path: Path) -> Any:
    with path.open("rb") as file:
        return _read_archive(file) if zipfile.is_zipfile(file) else _read_legacy(file)


def _read_archive(file: BinaryIO) -> Any:
    length = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        for member in members.values():
            # PyTorch never compresses; a compressed member can unpack to any size.
            if member.compress_type != zipfile.ZIP_STORED or member.file_size > length:
                raise _RefusedError(f"refused, because its member {member.filename} is compressed")
        (pickled,) = (name for name in members if name.endswith("/data.pkl") and name.count("/") == 1)
        folder = pickled.removesuffix("/data.pkl")
        if f"{folder}/byteorder" in members and archive.read(f"{folder}/byteorder") != b"little":
            raise _RefusedError("its numbers are not little-endian")
        unpickler = _WeightsOnlyUnpickler(io.BytesIO(archive.read(pickled)))
        root = unpickler.load()
        for key, storage in unpickler.storages.items():
            storage.bytes = archive.read(f"{folder}/data/{key}")
    return root


def _read_legacy(file: BinaryIO) -> Any:
    file.seek(0)
    if [_WeightsOnlyUnpickler(file).load() for _ in range(2)] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise _RefusedError("it does not begin as a PyTorch file")
    system = _WeightsOnlyUnpickler(file).load()
    if not system["little_endian"]:
        raise _RefusedError("its numbers are not little-endian")
    unpickler = _WeightsOnlyUnpickler(file)
    root = unpickler.load()
    for key in _WeightsOnlyUnpickler(file).load():
        storage = unpickler.storages[key]
        if int.from_bytes(file.read(8), "little") != storage.size:
            raise _RefusedError(f"its storage {key} is not of the size it claims")
        storage.bytes = file.read(storage.size * storage.dtype.itemsize)
    return root


def _named_tensors(root: Any) -> Entries:
    for wrapper in ("state_dict", "model"):
        if isinstance(root, dict) and isinstance(root.get(wrapper), dict):
            root = root[wrapper]
    if not isinstance(root, dict):
        raise _RefusedError(f"it holds a {type(root).__name__} instead of tensors by name")
    for name, tensor in root.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise _RefusedError(f"its entry {name!r} is no tensor")
    return _without_prefix({name: tensor.array() for name, tensor in root.items()})


def _read_safetensors(path: Path) -> Entries:
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or it is damaged: {error}") from error
    entries = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _SAFETENSORS_TYPES:
            raise ValueError(f"{path}: {name} is of type {tensor['dtype']}, which no network here has")
        flat = np.frombuffer(tensor["data"], _SAFETENSORS_TYPES[tensor["dtype"]])
        entries[name] = flat.reshape(tensor["shape"])
    return _without_prefix(entries)


def _without_prefix(entries: Entries) -> Entries:
    return {name.removeprefix("module."): array for name, array in entries.items()}
