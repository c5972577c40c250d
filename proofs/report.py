"""How measurements are written down: tables, their places in documents, and what they were measured with."""

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "torch", "libtpu")
_MODULES = {"pillow": "PIL"}


class Line(Protocol):
    """One line of a table."""

    @property
    def holds(self) -> bool:
        """Return whether it is as it should be."""

    def cells(self) -> dict[str, str]:
        """Return what stands in the line, by heading."""


def table(lines: Sequence[Line]) -> str:
    """Return lines as a Markdown table."""
    return markdown_table([line.cells() for line in lines])


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return rows of the same headings as a Markdown table, which is readable as it stands."""
    whole = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in whole]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def write_between(document: Path, name: str, text: str) -> None:
    """Write text between the marks of that name in a document, instead of what stands there.

    Raises:
        ValueError: the document has no such marks.
    """
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    before, _, rest = document.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{document} has no place for {name}, between {begin} and {end}")
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def circumstances() -> str:
    """Return on which day and with what is measured: versions, and the machine's kind."""
    packages = ", ".join(
        f"{name} {version(name)}" for name in _PACKAGES if find_spec(_MODULES.get(name, name))
    )
    devices = sorted({d.device_kind for d in jax.devices() if d.platform != "cpu"})
    cores = f"{os.cpu_count()} cores ({platform.machine()})"
    machine = ", ".join([f"Python {platform.python_version()}", cores, *devices])
    return f"Measured on {datetime.now(UTC):%Y-%m-%d} with {packages}, {machine}."


def announce(what: str) -> None:
    """Say on stderr what is measured now."""
    print(f"{what} …", file=sys.stderr, flush=True)
