"""Dictionaries of numbers, texts and arrays out of pickles, none of which is executed.

Nothing that a pickle names is looked up or called: what would be made of it is kept as what was said of it.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

# CIFAR-100's 50,000 names and 100,000 labels take 0.3 million.
_MAX_OPERATIONS = 10_000_000
_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NAMES = (*_RECONSTRUCT, "numpy ndarray", "numpy dtype")  # of which a pickled array consists


@dataclass(eq=False)
class Made:
    """What a pickle would make by a call.

    Attributes:
        name: module and name of what it would call.
        arguments: of the call.
        state: what it would be given then.
    """

    name: Any
    arguments: Any
    state: Any = None


def read_pickle(content: bytes) -> Any:
    """Return what a binary pickle describes: texts as bytes, and of arrays and their types a `Made`.

    Raises:
        ValueError: it names what no array consists of, or is damaged.
    """
    try:
        return _built(content)
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"its pickle is damaged ({error or type(error).__name__})") from None


def bytes_of(value: Any) -> UInt8[np.ndarray, "rows columns"]:
    """Return a pickled array of bytes with two axes, in the memory of the pickle.

    Raises:
        ValueError: it is something else.
    """
    match value:
        case Made(
            name,
            _,
            (_, (int(rows), int(columns)), Made("numpy dtype", (b"u1" | b"|u1", *_)), False | 0, bytes(raw)),
        ) if name in _RECONSTRUCT and rows * columns == len(raw):
            return np.frombuffer(raw, np.uint8).reshape(rows, columns)
    raise ValueError("no array of bytes with two axes")


def _built(content: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        first = marks.pop()
        values = stack[first:]
        del stack[first:]
        return values

    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if count > _MAX_OPERATIONS:
            raise ValueError(f"its pickle has more than {_MAX_OPERATIONS:,} operations")
        match operation.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "APPEND" | "APPENDS":
                values = [stack.pop()] if operation.name == "APPEND" else since_mark()
                _a(list, stack[-1]).extend(values)
            case "SETITEM" | "SETITEMS":
                values = [stack.pop(-2), stack.pop()] if operation.name == "SETITEM" else since_mark()
                keys = [_a(bytes, key) for key in values[::2]]
                _a(dict, stack[-1]).update(zip(keys, values[1::2], strict=True))
            case "BUILD":
                state = stack.pop()
                _a(Made, stack[-1]).state = state
            case "REDUCE":
                arguments = stack.pop()
                stack.append(Made(stack.pop(), arguments))
            case "GLOBAL":
                stack.append(_allowed(str(argument)))
            case "STACK_GLOBAL":
                module, name = (_a(bytes, stack.pop(-2)), _a(bytes, stack.pop()))
                stack.append(_allowed(f"{module.decode()} {name.decode()}"))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [stack.pop() for _ in range(int(operation.name[-1]))]
                stack.append(tuple(reversed(values)))
            case _:
                stack.append(_constant(operation.name, argument))
    (root,) = stack
    return root


def _constant(operation: str, argument: Any) -> Any:
    match operation:
        case "NONE" | "NEWTRUE" | "NEWFALSE":
            return {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation]
        case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
            return {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[operation]()
        case "BININT" | "BININT1" | "BININT2" | "SHORT_BINBYTES" | "BINBYTES":
            return argument
        case "SHORT_BINSTRING" | "BINSTRING":  # bytes in Python 2
            return argument.encode("latin-1")
        case "SHORT_BINUNICODE" | "BINUNICODE":
            return argument.encode()
    raise ValueError(f"refused, and nothing of it run: no data set has need of pickle's {operation}")


def _allowed(name: str) -> str:
    if name not in _NAMES:
        called = name.replace(" ", ".")
        raise ValueError(f"refused, and nothing of it run: no data set has need of {called!a}")
    return name


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"its pickle is damaged (a {type(value).__name__} instead of a {kind.__name__})")
    return value
