"""Unpickle dictionaries of tensors, knowing nothing else.

Python's own unpickler can be told what a pickle may name. The rest is the pickle's to say: a memo index of
four bytes fills gigabytes, a key of nested tuples hashes for years, and whatever may be named can be given
attributes.
"""

import io
import pickletools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import jax.numpy as jnp
import numpy as np

from tat_jax.weights.harmless import is_harmless
from tat_jax.weights.tensors import RefusedError, Storage, Tensor

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
# A network of 152 layers with its optimiser needs a tenth. A million take seconds, and 100 MB at most.
_MAX_OPERATIONS = 1_000_000
_MAX_ARGUMENTS = 8


class Opaque:
    """A Python object that was stepped over; it holds nothing, and whatever is made of it is another."""


_OPAQUE = Opaque()


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    """Return a dictionary; only Python 2 gave its items as an argument."""
    return _with_keys((key, value) for key, value in items)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor has no storage")
    return Tensor(storage, offset, shape, strides)


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
            raise RefusedError("its pickle takes more than it has")
        values = self.values[len(self.values) - count :]
        del self.values[len(self.values) - count :]
        return values

    def since_mark(self) -> list[Any]:
        return self.popped(len(self.values) - self.marks.pop())

    def fill(self, kind: type, values: list[Any], add: Callable[[Any, list[Any]], None]) -> None:
        """Add values to the one on top, unless it was stepped over."""
        if not isinstance(self.values[-1], Opaque):
            if type(self.values[-1]) is not kind:
                raise RefusedError(f"refused, because it fills a {type(self.values[-1]).__name__}")
            add(self.values[-1], values)


class Unpickler:
    """Unpickles what weight files are made of, and steps over what is harmless beside it.

    Attributes:
        storages: those that the pickle refers to, by their keys.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._left = _MAX_OPERATIONS

    def load(self, file: io.BufferedReader | io.BytesIO) -> Any:
        """Return what the pickle at the file's position describes, and stop behind it.

        Raises:
            RefusedError: it needs more than a weight file does; a broken pickle raises anything.
        """
        stack = _Stack()
        for operation, argument, _ in pickletools.genops(file):
            self._spend(1)
            self._do(operation.name, argument, stack)
        (root,) = stack.values
        return root

    def _spend(self, operations: int) -> None:
        self._left -= operations
        if self._left < 0:
            raise RefusedError(f"refused, because its pickle has more than {_MAX_OPERATIONS:,} operations")

    def _do(self, operation: str, argument: Any, stack: _Stack) -> None:
        match operation:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.marks.append(len(stack.values))
            case "APPEND" | "APPENDS":
                values = stack.popped(1) if operation == "APPEND" else stack.since_mark()
                stack.fill(list, values, list.extend)
            case "SETITEM" | "SETITEMS":
                values = stack.popped(2) if operation == "SETITEM" else stack.since_mark()
                stack.fill(dict, values, _set_items)
            case "ADDITEMS":
                stack.fill(Opaque, stack.since_mark(), lambda *_: None)
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
            case "SHORT_BINBYTES" | "BINBYTES" | "EMPTY_SET":
                return _OPAQUE
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                return {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[operation]()
            case "TUPLE":
                return tuple(stack.since_mark())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                return tuple(stack.popped(int(operation[-1])))
            case "FROZENSET":
                stack.since_mark()
                return _OPAQUE
            case "BINGET" | "LONG_BINGET":
                return stack.memo[argument]
            case "GLOBAL":
                return _named(*argument.split(" "))
            case "STACK_GLOBAL":
                return _named(*stack.popped(2))
            case "REDUCE" | "NEWOBJ":
                return self._called(*stack.popped(2))
            case "BINPERSID":
                return self._storage(*_few(stack.popped(1)[0]))
        raise RefusedError(f"refused, because a weight file has no need of pickle's {operation}")

    def _called(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Opaque):
            return function
        if not isinstance(function, FunctionType):
            raise RefusedError(f"refused, because it calls a {type(function).__name__}")
        if function is _ordered_dict:
            self._spend(sum(len(items) for items in _few(arguments)))
        return function(*_few(arguments))

    def _storage(self, kind: Any, dtype: Any, key: Any, _: Any, size: Any, *view: Any) -> Storage:
        if kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str or any(view):
            raise RefusedError("refused, because it refers to something that is no storage")
        if type(size) is not int or size < 0:
            raise RefusedError(f"its storage {key} is of no size")
        return self.storages.setdefault(key, Storage(dtype, size))


def _set_items(target: dict[Any, Any], values: list[Any]) -> None:
    target.update(_with_keys(zip(values[::2], values[1::2], strict=True)))


def _with_keys(items: Any) -> dict[Any, Any]:
    """Return the items that have a name or a number; of other keys, those that do nothing are passed over."""
    found = {}
    for key, value in items:
        if type(key) in (str, int):
            found[key] = value
        elif key is not None and not isinstance(key, bool | float | Opaque):
            raise RefusedError("refused, because it has keys that are neither names nor numbers")
    return found


def _few(arguments: Any) -> tuple[Any, ...]:
    """Return the arguments of a call; a long tuple, kept in the memo, could be copied a thousand times."""
    if type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
        raise RefusedError("refused, because it calls something with what are no arguments")
    return arguments


def _named(module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise RefusedError("refused, because it names something by what is no name")
    if (module, name) in _NAMES:
        return _NAMES[module, name]
    if is_harmless(module, name):
        return _OPAQUE
    raise RefusedError(
        f"refused, and nothing of it run, because a weight file has no need of {module}.{name}: "
        "where it was made, save the weights alone, torch.save(model.state_dict(), FILE)"
    )
