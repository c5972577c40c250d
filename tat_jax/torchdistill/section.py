"""A mapping that is read key by key, so that nothing in it is passed over."""

import reprlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

Key = tuple[str | int, ...]

_KINDS = {int: "whole numbers", float: "numbers", str: "texts"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


class Section:
    """A mapping of a file. Values that nobody takes, `refuse_the_rest` names.

    Args:
        file: what errors call the file.
        key: where in the file this is.
        values: what it holds.
        lines: the line of each key in the file.
        within: the section that this one is part of.
    """

    def __init__(
        self,
        file: str,
        key: Key,
        values: dict[str, Any],
        lines: dict[Key, int],
        within: "Section | None" = None,
    ):
        self._file = file
        self._key = key
        self._values = values
        self._lines = lines
        self._within = within
        self._taken: set[Key] = within._taken if within else set()

    def __contains__(self, name: str) -> bool:
        """Return whether a key is there and has a value."""
        return self._values.get(name) is not None

    def take(self, name: str, default: Any = None) -> Any:
        """Return the value of a key as it is."""
        self._taken.add((*self._key, name))
        return self._values.get(name, default)

    def ignore(self, *names: str) -> None:
        """Take keys that change nothing, whatever they say."""
        for name in names:
            self.take(name)

    def allow(self, name: str, *harmless: Any) -> None:
        """Take a key if it says what changes nothing; else it stays, to be refused."""
        if _is_one_of(self._values.get(name), harmless):
            self.take(name)

    def one_of(self, name: str, *allowed: Any) -> Any:
        """Return a value that is one of `allowed`.

        Raises:
            ValueError: it is another, or missing.
        """
        if not _is_one_of(value := self.take(name), allowed):
            raise self.wrong(name, f"is not {' or '.join(map(repr, allowed))}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number.

        Raises:
            ValueError: the value is none, or is missing and has no default.
        """
        value = self.take(name, default)
        if not _is_number(value):
            raise self.wrong(name, "is no number")
        return float(value)

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number from `least` on.

        Raises:
            ValueError: the value is none, or is missing and has no default.
        """
        value = self.take(name, default)
        if type(value) is not int or value < least:
            raise self.wrong(name, f"is no whole number from {least} on")
        return value

    def text(self, name: str) -> str:
        """Return a text.

        Raises:
            ValueError: the value is none, or is missing.
        """
        if not isinstance(value := self.take(name), str):
            raise self.wrong(name, "is no text")
        return value

    def several(self, name: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        """Return a list of values of one kind; whole numbers are floats, too.

        Raises:
            ValueError: the value is none, or is missing and has no default.
        """
        value = self.take(name)
        value = default if value is None else value
        fits = _is_number if kind is float else lambda item: type(item) is kind
        if not isinstance(value, list) or not all(map(fits, value)):
            raise self.wrong(name, f"is no list of {_KINDS[kind]}")
        return [kind(item) for item in value]

    def section(self, name: str) -> "Section":
        """Return the mapping of a key; an empty one where the key is missing or has no value.

        Raises:
            ValueError: the value is something else.
        """
        if not (value := self._values.get(name)):
            self.allow(name, None, {})
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise self.wrong(name, "is no mapping")
        return self._below(value, name)

    def sections(self) -> dict[str, "Section"]:
        """Return all mappings here by their keys.

        Raises:
            ValueError: there is something else.
        """
        return {name: self.section(name) for name in self._values}

    def steps(self, name: str) -> list["Section"]:
        """Return the mappings in the list of a key.

        Raises:
            ValueError: the value is something else.
        """
        value = self._values.get(name)
        if not isinstance(value, list) or not all(isinstance(step, dict) for step in value):
            raise self.wrong(name, "is no list of mappings")
        return [self._below(step, name, index) for index, step in enumerate(value)]

    def wrong(self, name: str, why: str) -> ValueError:
        """Return the error that a value is what it must not be, or that it is missing."""
        if name not in self._values:
            return ValueError(f"{self._file}: {_dotted((*self._key, name))} is missing; {self._known()}")
        return ValueError(f"{self._file}: {self._said((*self._key, name), self._values[name])} {why}")

    def refuse_the_rest(self) -> None:
        """Raise a ValueError that names every value here that nobody took."""
        if rest := [self._said(key, value) for key, value in self._rest(self._key, self._values)]:
            raise ValueError(f"{self._file}: no counterpart here for {', '.join(rest)}")

    def _below(self, values: dict[str, Any], *key: str | int) -> "Section":
        return Section(self._file, (*self._key, *key), values, self._lines, self)

    def _known(self) -> str:
        """Return what is there instead, in words."""
        if not self._values and self._within:
            return self._within._known()
        known = ", ".join(map(printable, self._values)) or "nothing"
        return f"{_dotted(self._key) or 'the file'} has {known}"

    def _said(self, key: Key, value: Any) -> str:
        return f"{_dotted(key)}={_SHORT.repr(value)} (line {self._lines[key]})"

    def _rest(self, key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
        """Yield what was not taken; an empty mapping is a value, too, and so is a list of scalars."""
        if key in self._taken:
            return
        parts: Iterable[tuple[str | int, Any]]
        match value:
            case dict() if value:
                parts = value.items()
            case list() if any(isinstance(part, dict | list) for part in value):
                parts = enumerate(value)
            case _:
                yield key, value
                return
        for part, below in parts:
            yield from self._rest((*key, part), below)


def printable(text: str) -> str:
    """Return a text as it can stand in a line of an error."""
    return text if text.isprintable() else repr(text)


def _dotted(key: Key) -> str:
    """Return a key as people write it: `train.steps[0].size`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{printable(part)}" for part in key)
    return "".join(parts).removeprefix(".")


def _is_one_of(value: Any, known: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in known)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
