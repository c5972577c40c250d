"""Read PyTorch's and safetensors' weight files as NumPy arrays, without PyTorch and without running code.

A `.pth` file is a pickle that refers to raw storages, in a zip archive or, before PyTorch 1.6, in one stream.
It is read here as `torch.load(..., weights_only=True)` does: only what a dictionary of tensors is made of may
be named in it, every size is checked against the bytes that are there, and the tensors together are no larger
than the file.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

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
# A network of 152 layers with its optimiser needs a tenth. A million take seconds, and 100 MB at most.
_MAX_OPERATIONS = 1_000_000
_MAX_DIMENSIONS = 32
_MAX_ARGUMENTS = 8
_MAX_HEADER = 1 << 24  # bytes; safetensors itself allows 100 MB, of which JSON makes gigabytes
_MAX_MESSAGE = 1000  # characters, as names in a file can be of any length


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
    read = _read_safetensors if path.suffix == ".safetensors" else _read_pth
    try:
        return _without_prefix(read(path))
    except _RefusedError as error:
        raise ValueError(f"{path}: {error}"[:_MAX_MESSAGE]) from None
    except Exception as error:  # A broken file makes its readers raise nearly anything.
        kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch weight"
        raise ValueError(f"{path} is no {kind} file, or it is damaged: {error!r}"[:_MAX_MESSAGE]) from error


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
        storage, offset, shape, strides = self
        if not all(
            isinstance(numbers, tuple) and len(numbers) <= _MAX_DIMENSIONS for numbers in (shape, strides)
        ):
            raise _RefusedError("a tensor has no shape and strides that a tensor can have")
        if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
            raise _RefusedError("a tensor has a negative size, stride or offset")
        if len(storage.bytes) != storage.size * storage.dtype.itemsize:
            raise _RefusedError(f"a storage of {storage.size} elements has {len(storage.bytes)} bytes")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count > storage.size or (count and last >= storage.size):
            raise _RefusedError(f"a tensor of shape {shape} reaches beyond its {storage.size} elements")
        flat = np.frombuffer(storage.bytes, storage.dtype)[offset:]
        steps = [stride * storage.dtype.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False).copy()


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise _RefusedError("a tensor has no storage")
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_NAMES: dict[tuple[str, str], np.dtype | Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Stack:
    """What a pickle has made so far."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[Any, Any] = {}

    def popped(self, count: int) -> list[Any]:
        if count > len(self.values):
            raise _RefusedError("its pickle takes more than it has")
        values = self.values[len(self.values) - count :]
        del self.values[len(self.values) - count :]
        return values

    def since_mark(self) -> list[Any]:
        return self.popped(len(self.values) - self.marks.pop())


class _Unpickler:
    """Unpickle dictionaries of tensors, knowing nothing else.

    Python's own unpickler can be told what a pickle may name. The rest is the pickle's to say: a memo index
    of four bytes fills gigabytes, a key of nested tuples hashes for years, and whatever may be named can
    be given attributes.
    """

    def __init__(self) -> None:
        self.storages: dict[Any, _Storage] = {}

    def load(self, file: io.BufferedReader | io.BytesIO) -> Any:
        """Return what the pickle at the file's position describes, and stop behind it."""
        stack = _Stack()
        for done, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if done == _MAX_OPERATIONS:
                raise _RefusedError(f"refused, because its pickle has more than {done:,} operations")
            self._do(operation.name, argument, stack)
        (root,) = stack.values
        return root

    def _do(self, operation: str, argument: Any, stack: _Stack) -> None:
        match operation:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.marks.append(len(stack.values))
            case "APPEND" | "APPENDS":
                values = stack.popped(1) if operation == "APPEND" else stack.since_mark()
                stack.values[-1].extend(values)
            case "SETITEM" | "SETITEMS":
                values = stack.popped(2) if operation == "SETITEM" else stack.since_mark()
                keys = values[::2]
                if not all(type(key) in (str, int) for key in keys):
                    raise _RefusedError("refused, because it has keys that are neither names nor numbers")
                stack.values[-1].update(zip(keys, values[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                stack.memo[argument] = stack.values[-1]
            case "MEMOIZE":
                stack.memo[len(stack.memo)] = stack.values[-1]
            case "BUILD":  # attributes, as the versions that a state dict has of its modules
                stack.popped(1)
            case _:
                stack.values.append(self._made(operation, argument, stack))

    def _made(self, operation: str, argument: Any, stack: _Stack) -> Any:
        """Return the value that an operation puts on the stack."""
        match operation:
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                return {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation]
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                return argument
            case "SHORT_BINUNICODE" | "BINUNICODE" | "SHORT_BINSTRING" | "BINSTRING":
                return argument
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                return {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[operation]()
            case "TUPLE":
                return tuple(stack.since_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(stack.popped(int(operation[-1])))
            case "BINGET" | "LONG_BINGET":
                return stack.memo[argument]
            case "GLOBAL":
                return _named(*argument.split(" "))
            case "STACK_GLOBAL":
                return _named(*stack.popped(2))
            case "REDUCE":
                function, arguments = stack.popped(2)
                if not isinstance(function, FunctionType):
                    raise _RefusedError(f"refused, because it calls a {type(function).__name__}")
                return function(*_few(arguments))
            case "BINPERSID":
                return self._storage(*_few(stack.popped(1)[0]))
        raise _RefusedError(f"refused, because a weight file has no need of pickle's {operation}")

    def _storage(self, kind: Any, dtype: Any, key: Any, _: Any, size: Any, *view: Any) -> _Storage:
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str or any(view):
            raise _RefusedError("refused, because it refers to something that is no storage")
        if type(size) is not int or size < 0:
            raise _RefusedError(f"its storage {key} is of no size")
        return self.storages.setdefault(key, _Storage(dtype, size))


def _few(arguments: Any) -> tuple[Any, ...]:
    """Return the arguments of a call; a long tuple, kept in the memo, could be copied a thousand times."""
    if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
        raise _RefusedError("refused, because it calls something with what are no arguments")
    return arguments


def _named(module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise _RefusedError("refused, because it names something by what is no name")
    if (module, name) not in _NAMES:
        raise _RefusedError(f"refused, because a weight file has no need of {module}.{name}")
    return _NAMES[module, name]


def _read_pth(path: Path) -> Entries:
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
                raise _RefusedError(f"refused, because its member {member.filename} is compressed")
        if sum(member.file_size for member in members) > length:
            raise _RefusedError("refused, because its members claim more bytes than it has")
        names = {member.filename for member in members}
        if len(names) < len(members):
            raise _RefusedError("refused, because two of its members have one name")
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise _RefusedError(f"it has {len(pickles)} members */data.pkl instead of one")
        folder = pickles[0].removesuffix("/data.pkl")
        if f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") != b"little":
            raise _RefusedError("its numbers are not little-endian")
        unpickler = _Unpickler()
        root = unpickler.load(io.BytesIO(archive.read(pickles[0])))
        for key, storage in unpickler.storages.items():
            storage.bytes = archive.read(f"{folder}/data/{key}")
    return root


def _read_legacy(file: io.BufferedReader, length: int) -> Any:
    file.seek(0)
    if [_Unpickler().load(file) for _ in range(2)] != [_LEGACY_MAGIC, _LEGACY_PROTOCOL]:
        raise _RefusedError("it does not begin as a PyTorch file")
    system = _Unpickler().load(file)
    if not system["little_endian"]:
        raise _RefusedError("its numbers are not little-endian")
    unpickler = _Unpickler()
    root = unpickler.load(file)
    for key in _Unpickler().load(file):
        if type(key) is not str:
            raise _RefusedError("one of its storages has no name")
        storage = unpickler.storages[key]
        size = storage.size * storage.dtype.itemsize
        if int.from_bytes(file.read(8), "little") != storage.size or size > length:
            raise _RefusedError(f"its storage {key} is not of the size it claims")
        storage.bytes = file.read(size)
    return root


def _named_tensors(root: Any, length: int) -> Entries:
    for wrapper in ("state_dict", "model"):
        if isinstance(root, dict) and isinstance(root.get(wrapper), dict):
            root = root[wrapper]
    if not isinstance(root, dict):
        raise _RefusedError(f"it holds a {type(root).__name__} instead of tensors by name")
    entries: Entries = {}
    total = 0
    for name, tensor in root.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise _RefusedError(f"its entry {name!r} is no tensor")
        entries[name] = tensor.array()
        total += entries[name].nbytes
        # Tensors may share a storage, but no network's share so much; thousands could share a large one.
        if total > length:
            raise _RefusedError(f"refused, because its tensors together are larger than its {length:,} bytes")
    return entries


def _read_safetensors(path: Path) -> Entries:
    content = path.read_bytes()
    if (header := int.from_bytes(content[:8], "little")) > _MAX_HEADER:
        raise _RefusedError(f"refused, because its header claims {header:,} bytes")
    entries = {}
    for name, tensor in safetensors.deserialize(content):
        if tensor["dtype"] not in _SAFETENSORS_TYPES:
            raise _RefusedError(f"{name} is of type {tensor['dtype']}, which no network here has")
        flat = np.frombuffer(tensor["data"], _SAFETENSORS_TYPES[tensor["dtype"]])
        entries[name] = flat.reshape(tensor["shape"])
    return entries


def _without_prefix(entries: Entries) -> Entries:
    plain = {name.removeprefix("module."): array for name, array in entries.items()}
    if len(plain) < len(entries):
        raise _RefusedError("two of its tensors differ in the prefix module. alone")
    return plain
