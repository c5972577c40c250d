"""How measurements are written down: tables, and what they were measured with."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "torch")


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of them the heading, as a Markdown table, which is readable as it stands."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def write_between(document: Path, name: str, text: str) -> None:
    """Write text between the marks of that name in a document, instead of what stands there."""
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    before, _, rest = document.read_text().partition(begin)
    _, _, after = rest.partition(end)
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def versions() -> str:
    """Return the versions of what computes, and the machine's kind."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"{packages}, Python {platform.python_version()}, {os.cpu_count()} cores ({platform.machine()})"
