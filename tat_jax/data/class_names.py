"""`classes.txt`, which names the classes of a folder, and may say in which colours they are drawn."""

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from tat_jax import buckets
from tat_jax.buckets import Place

CLASSES = "classes.txt"
_COLOURED = re.compile(r"(.*[^\s,])[\s,]+(\d{1,9})[\s,]+(\d{1,9})[\s,]+(\d{1,9})")


class Classes(NamedTuple):
    """The names of classes by their labels, and their colours in RGB where they are said."""

    names: list[str]
    colours: UInt8[np.ndarray, "classes 3"] | None


def read_lines(root: Place) -> list[str] | None:
    """Return the lines of a folder's `classes.txt`; None where there is none.

    Raises:
        ValueError: it is no text, or a line is empty.
    """
    place = root / CLASSES
    try:
        lines = buckets.read(root, CLASSES).decode("utf-8-sig").rstrip().split("\n")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{place} is no text in UTF-8") from None
    names = [line.strip() for line in lines]
    if "" in names:
        raise ValueError(f"line {1 + names.index('')} of {place} is empty: each one names a class, by label")
    return names


def read_classes(root: Place) -> Classes | None:
    """Return the classes of a folder, a line each, `name` or `name R G B`; None where none are said.

    Raises:
        ValueError: it is no text, a line is empty, a name comes twice, some classes have a colour and others
            do not, or a colour is beyond 255.
    """
    if (lines := read_lines(root)) is None:
        return None
    place = root / CLASSES
    found = [_COLOURED.fullmatch(line) for line in lines]
    names = [match[1] if match else line for match, line in zip(found, lines, strict=True)]
    for number, name in enumerate(names):
        if (first := names.index(name)) != number:
            raise ValueError(f"lines {1 + first} and {1 + number} of {place} name the same class, {name!r}")
    if not any(found):
        return Classes(names, None)
    if not all(found):
        raise ValueError(f"line {1 + found.index(None)} of {place} says no colour, and others do")
    colours = np.array([[int(value) for value in match.groups()[1:]] for match in found if match])
    if (wrong := np.flatnonzero((colours > 255).any(1))).size:
        raise ValueError(f"line {1 + wrong[0]} of {place} says a colour beyond 255: {lines[wrong[0]]}")
    return Classes(names, colours.astype(np.uint8))
