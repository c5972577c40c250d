"""Bring about every fault, and print what survives: `make torture`, two and a half hours on two cores.

Parts that are named run alone. Each writes its table into docs/torture.md.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from proofs.command import Part, make_parser, run_parts
from proofs.photographs import add_photos
from proofs.program import ROOT
from proofs.torture import (
    buckets,
    disk,
    elastic,
    endurance,
    hosts,
    kill,
    pod,
    preemption,
    processes,
    strangers,
)
from proofs.torture.fault import Fault
from proofs.torture.small_run import SEGMENTATION

DOCUMENT = ROOT / "docs" / "torture.md"
PARTS: Mapping[str, Part] = {
    "kill": lambda _: kill.faults(),
    "preemption": lambda _: preemption.faults(),
    "elastic": lambda _: elastic.faults(),
    "segmentation": lambda _: _faults_of_segmentation(),
    "processes": lambda _: processes.faults(),
    "hosts": lambda _: hosts.hosts(),
    "pod": lambda _: pod.signal_faults(),
    "intervals": lambda _: pod.interval_faults(),
    "disk": lambda _: disk.faults(),
    "buckets": lambda _: buckets.faults(),
    "strangers": lambda chosen: strangers.faults(
        photos=[photo.jpeg for photo in chosen.photos[:50]],
        seconds=60 * chosen.fuzz,
        keep=Path("runs") / "strangers",
    ),
    "endurance": lambda chosen: endurance.faults(chosen.long, plot=DOCUMENT.with_name("endurance.png")),
}


def _faults_of_segmentation() -> list[Fault]:
    """Do to a segmentation what is done to the classification, once each."""
    with tempfile.TemporaryDirectory() as temporary:
        return [
            *kill.faults(kill.PHASES, epochs=6, miniature=SEGMENTATION),
            *preemption.faults(preemption.SIGNALS, epochs=6, miniature=SEGMENTATION),
            elastic.device_fault(Path(temporary), SEGMENTATION),
        ]


def main() -> None:
    """Run the parts that the command line names; exit with 1 if something did not survive."""
    parser = make_parser(__doc__, prog="python -m proofs.torture")
    add_photos(parser)
    parser.add_argument(
        "--fuzz", type=float, default=10, metavar="MINUTES", help="for each of images, weights"
    )
    parser.add_argument("--long", type=float, default=60, metavar="MINUTES", help="of the long run")
    run_parts(parser, PARTS, DOCUMENT)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
