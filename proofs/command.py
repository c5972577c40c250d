"""The command lines of the proofs: options, tables on stdout, and where else they go."""

import argparse
import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from proofs.report import Line, announce, circumstances, table, write_between

Part = Callable[[Namespace], Sequence[Line]]


def make_parser(description: str | None, *, prog: str | None = None) -> ArgumentParser:
    """Return a parser whose help is a module's docstring."""
    return ArgumentParser(prog, None, description, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_parts(parser: ArgumentParser, parts: Mapping[str, Part], document: Path) -> None:
    """Measure the parts that the command line names, else all, and write the table of each into a document.

    Exit with 1 if a line does not hold.
    """
    add_parts(parser, parts)
    options = parser.parse_args()
    broken: list[Line] = []
    for name in options.parts or parts:
        announce(name)
        found = parts[name](options)
        print(f"\n{table(found)}\n", flush=True)
        write_between(document, name, f"{table(found)}\n\n{circumstances()}")
        broken += [line for line in found if not line.holds]
        jax.clear_caches()
    if broken:
        sys.exit(f"{len(broken)} do not hold:\n{table(broken)}")


def add_parts(parser: ArgumentParser, parts: Iterable[str], *, metavar: str = "PART") -> None:
    """Add the choice of `parts`, of which none stands for all."""
    names = ", ".join(parts)

    def part(text: str) -> str:
        if text not in parts:
            raise argparse.ArgumentTypeError(f"no {metavar.lower()} {text}; there are {names}")
        return text

    parser.add_argument("parts", nargs="*", type=part, metavar=metavar, help=f"{names}; else all")


def add_json(parser: ArgumentParser) -> None:
    """Add `--json FILE`, for `publish`."""
    parser.add_argument("--json", type=to_write, metavar="FILE", help="write the figures to this file, too")


def to_write(text: str) -> Path:
    """Return the path of a file that is written when all is measured; there is a folder for it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no file in a folder that exists")
    return path


def publish(tables: Sequence[str], figures: Any, to: Path | None) -> None:
    """Print tables, and write the figures that they are made of as JSON."""
    print("", *tables, circumstances(), sep="\n\n")
    if to:
        to.write_text(json.dumps(figures, indent=1) + "\n")
