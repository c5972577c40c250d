"""YAML of someone else, read safely: plain values, anchors, aliases, and `!join` of scalars to a text.

A file is small, also with its aliases written out, and no tag makes an object of Python.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from tat_jax.torchdistill.section import Key, Section, printable

_MAX_BYTES = 100_000  # published files have 4,000
_MAX_SIZE = 200_000  # values and characters of a file with its aliases written out
_MAX_DEPTH = 50
_PREFIX = "tag:yaml.org,2002:"
_TAGS = {_PREFIX + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
_TEXT = f"{_PREFIX}str"
# Numbers to everyone but YAML 1.1, which takes them for text.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def read(path: str | Path) -> Section:
    """Read a YAML file.

    Raises:
        ValueError: it cannot be read, is no YAML, no mapping, too large, or has other tags; with the line.
    """
    reader = _Reader(str(path))
    try:
        root = _compose(_text(Path(path)))
        values = None if root is None else reader.value(root, ())
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} is no YAML{line}: {problem or str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError(f"{path}: mappings and lists lie too deep in each other") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping")
    return Section(str(path), (), values, reader.lines)


def _text(path: Path) -> str:
    """Return the text of a small file.

    Raises:
        ValueError: it is missing, no file, too large or not UTF-8.
    """
    try:
        if not path.is_file():
            raise ValueError(f"{path} is {'no file' if path.exists() else 'missing'}")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"{path} has more than {_MAX_BYTES:,} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _compose(text: str) -> yaml.Node | None:
    """Return the nodes of a text."""
    try:
        return yaml.SafeLoader(text).get_single_node()
    except yaml.YAMLError:
        # The published recipe with KD is indented throughout, but for its first line.
        lines = [line for line in text.split("\n")[1:] if line.strip() and not line.lstrip().startswith("#")]
        margin = min((len(line) - len(line.lstrip(" ")) for line in lines), default=0)
        if not margin or text[:1].isspace():
            raise
        return yaml.SafeLoader(" " * margin + text).get_single_node()


class _Reader:
    """Makes values of nodes.

    Attributes:
        lines: the line of each key, from 1 on.
    """

    def __init__(self, file: str):
        self.lines: dict[Key, int] = {}
        self._file = file
        self._size = 0
        self._constructor = yaml.SafeLoader("")

    def value(self, node: yaml.Node, key: Key) -> Any:
        """Return the value of a node.

        Raises:
            ValueError: it has a tag, a key twice or one that is no text, or becomes too large or deep.
        """
        self._count(node, key)
        match node:
            case yaml.SequenceNode(tag="!join"):
                return "".join(str(self._joined(part, key)) for part in node.value)
            case _ if node.tag not in _TAGS:
                raise self._error(node, f"{printable(node.tag)} is not read; !join of a list is the only tag")
            case yaml.MappingNode():
                return self._mapping(node, key)
            case yaml.SequenceNode():
                return self._list(node, key)
            case yaml.ScalarNode(style=None, tag=tag) if tag == _TEXT and _EXPONENT.fullmatch(node.value):
                return float(node.value)
            case _:
                return self._scalar(node)

    def _mapping(self, node: yaml.Node, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            if name_node.tag != _TEXT or not isinstance(name, str):
                raise self._error(name_node, f"{_written(name_node)} is no text, as a key must be")
            if name in values:
                raise self._error(name_node, f"the key {printable(name)} is there twice")
            self.lines[(*key, name)] = name_node.start_mark.line + 1
            values[name] = self.value(value_node, (*key, name))
        return values

    def _list(self, node: yaml.Node, key: Key) -> list[Any]:
        values = []
        for index, part in enumerate(node.value):
            self.lines[(*key, index)] = part.start_mark.line + 1
            values.append(self.value(part, (*key, index)))
        return values

    def _joined(self, node: yaml.Node, key: Key) -> Any:
        """Return a part of a `!join`: a scalar as YAML 1.1 reads it, or another `!join`."""
        if isinstance(node, yaml.ScalarNode) and node.tag in _TAGS:
            self._count(node, key)
            return self._scalar(node)
        if node.tag != "!join":
            raise self._error(node, "!join joins scalars only")
        return self.value(node, (*key, 0))

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self._constructor.construct_object(node)
        except (ArithmeticError, LookupError, ValueError):
            raise self._error(node, f"{node.value[:80]!r} is no {node.tag.removeprefix(_PREFIX)}") from None

    def _count(self, node: yaml.Node, key: Key) -> None:
        self._size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._size > _MAX_SIZE:
            raise self._error(
                node, f"more than {_MAX_SIZE:,} values and characters, with aliases written out"
            )
        if len(key) > _MAX_DEPTH:
            raise self._error(node, "mappings and lists lie too deep in each other, or an alias in itself")

    def _error(self, node: yaml.Node, why: str) -> ValueError:
        return ValueError(f"{self._file}, line {node.start_mark.line + 1}: {why}")


def _written(node: yaml.Node) -> str:
    return repr(node.value[:80]) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
