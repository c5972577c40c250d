"""Read PyTorch's and safetensors' weight files as NumPy arrays, without PyTorch and without running code.

A `.pth` file is a pickle that refers to raw storages, in a zip archive or, before PyTorch 1.6, in one stream.
It is read here as `torch.load(..., weights_only=True)` does: its instructions are carried out one by one,
those alone that a dictionary of tensors is made of, and every size is checked against the bytes that are
there. So a file takes no more memory than a few times its size, whatever it says.
"""

import io
import math
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

Entries = dict[str, np.ndarray]

_MAX_AXES = 32
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
        if len(self.shape) > _MAX_AXES:
            raise _RefusedError(f"a tensor has {len(self.shape)} axes")
        steps = zip(self.shape, self.strides, strict=True)
        last = self.offset + sum((size - 1) * stride for size, stride in steps)
        count = int(math.prod(self.shape))
        if count > storage.size or (count and last >= storage.size):
            raise _RefusedError(f"a tensor of shape {self.shape} reaches beyond its {storage.size} elements")
        flat = np.frombuffer(storage.bytes, storage.dtype)[self.offset :]
        strides = [stride * storage.dtype.itemsize for stride in self.strides]
        # No copy: any number of tensors may share a storage.
        return np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False)


class _Unpickled(NamedTuple):
    """What a pickle says, and the storages it refers to by key."""

    root: Any
    storages: dict[str, _Storage]


def _unpickle(file: BinaryIO) -> _Unpickled:
    """Carry out a pickle's instructions, if they make dictionaries of tensors and nothing else."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages: dict[str, _Storage] = {}

    def pop_from(start: int) -> list[Any]:
        popped = stack[start:]
        del stack[start:]
        return popped

    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_from(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop_from(len(stack) - int(opcode.name[-1]))))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND" | "APPENDS":
                items = pop_from(marks.pop() if opcode.name == "APPENDS" else len(stack) - 1)
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = pop_from(marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _expect(stack[-1], dict)[_expect(key, str | int)] = value
            case "GLOBAL" | "STACK_GLOBAL":
                names = argument.split(" ", 1) if opcode.name == "GLOBAL" else pop_from(len(stack) - 2)
                stack.append(_named(*(_expect(name, str) for name in names)))
            case "REDUCE":
                function, arguments = pop_from(len(stack) - 2)
                stack.append(_call(function, _expect(arguments, tuple)))
            case "BUILD":  # gives a state dict the versions of its modules, which mean nothing here
                stack.pop()
                _expect(stack[-1], OrderedDict)
            case "BINPERSID":
                stack.append(_storage(storages, *_expect(stack.pop(), tuple)))
            case "STOP":
                return _Unpickled(stack.pop(), storages)
            case name:
                raise _RefusedError(f"refused, because a weight file has no need of the instruction {name}")
    raise _RefusedError("it ends within its pickle")


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise _RefusedError(f"refused, because it has a {type(value).__name__} where no weight file has one")
    return value


def _named(module: str, name: str) -> Any:
    """Return what stands for the function, class or storage type of that name."""
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    if (module, name) in _FUNCTIONS:
        return _FUNCTIONS[module, name]
    raise _RefusedError(f"refused, because a weight file has no need of {module[:80]}.{name[:80]}")


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    if not any(function is known for known in _FUNCTIONS.values()):
        raise _RefusedError(f"refused, because it calls a {type(function).__name__}")
    return function(*arguments)


def _storage(
    storages: dict[str, _Storage], kind: str, dtype: np.dtype, key: str, place: str, size: int, *view: Any
) -> _Storage:
    """Return the storage that a persistent id refers to."""
    if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
        raise _RefusedError("refused, because it refers to something else than a storage")
    return storages.setdefault(_expect(key, str), _Storage(dtype, _expect(size, int)))


def _ordered_dict(pairs: Any = ()) -> OrderedDict:
    return OrderedDict((_expect(key, str | int), value) for key, value in pairs)


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _Tensor:
    return _Tensor(_expect(storage, _Storage), offset, _expect(shape, tuple), _expect(strides, tuple))


def _rebuild_parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return _expect(tensor, _Tensor)


_FUNCTIONS = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


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
        if sum(member.file_size for member in members.values()) > length:
            raise _RefusedError("refused, because its members overlap")
        (pickled,) = (name for name in members if name.endswith("/data.pkl") and name.count("/") == 1)
        folder = pickled.removesuffix("/data.pkl")
        if f"{folder}/byteorder" in members and archive.read(f"{folder}/byteorder") != b"little":
            raise _RefusedError("its numbers are not little-endian")
        root, storages = _unpickle(io.BytesIO(archive.read(pickled)))
        for key, storage in storages.items():
            storage.bytes = archive.read(f"{folder}/data/{key}")
    return root


def _read_legacy(file: BinaryIO) -> Any:
    file.seek(0)
    file = io.BytesIO(file.read())  # of which nobody can ask more than there is
    if [_unpickle(file).root for _ in range(2)] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise _RefusedError("it does not begin as a PyTorch file")
    if not _unpickle(file).root["little_endian"]:
        raise _RefusedError("its numbers are not little-endian")
    root, storages = _unpickle(file)
    for key in _unpickle(file).root:
        storage = storages[key]
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
