"""Bring about every fault, and print what survives: `make torture`, two hours on two cores.

Parts that are named run alone. Each writes its table into docs/torture.md.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from proofs.fidelity.photographs import photographs
from proofs.fidelity.report import versions, write_between
from proofs.torture import disk, elastic, endurance, kill, preemption, processes, strangers
from proofs.torture.fault import Fault, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "torture.md"


def main() -> None:
    """Run the parts that the command line names; exit with 1 if something did not survive."""
    parser = argparse.ArgumentParser(
        prog="python -m proofs.torture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--photos", type=Path, help="a folder of JPEG files; else pieces of scikit-learn's two"
    )
    parser.add_argument(
        "--fuzz", type=float, default=10, metavar="MINUTES", help="for each of images, weights"
    )
    parser.add_argument("--long", type=float, default=60, metavar="MINUTES", help="of the long run")
    names = ("kill", "preemption", "elastic", "processes", "disk", "strangers", "endurance")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(names)}; else all")
    options = parser.parse_args()
    parts: dict[str, Callable[[], list[Fault]]] = {
        "kill": kill.faults,
        "preemption": preemption.faults,
        "elastic": elastic.faults,
        "processes": processes.faults,
        "disk": disk.faults,
        "strangers": lambda: strangers.faults(
            photos=[photo.jpeg for photo in photographs(options.photos, 50)],
            seconds=60 * options.fuzz,
            keep=Path("runs") / "strangers",
        ),
        "endurance": lambda: endurance.faults(options.long, plot=DOCUMENT.with_name("endurance.png")),
    }
    if unknown := set(options.parts) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    broken = []
    for name in options.parts or parts:
        print(f"{name} …", file=sys.stderr, flush=True)
        found = parts[name]()
        print(f"\n{table(found)}\n", flush=True)
        write_between(DOCUMENT, name, f"{table(found)}\n\nMeasured with {versions()}.")
        broken += [fault for fault in found if fault.survived < fault.tried]
    if broken:
        sys.exit(f"{len(broken)} did not survive:\n{table(broken)}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
