"""What a machine with an NVIDIA GPU shows: tests, fidelity, speed, a kill; `make gpu`, ten minutes.

Parts that are named run alone. Each writes its table into docs/gpu.md.
"""

import os
import sys
from collections.abc import Mapping

# Before JAX starts: PyTorch, and the programs that are started here, are to have memory, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

from proofs.bench import cifar, step, together
from proofs.command import Part, make_parser, run_parts
from proofs.gpu import kill, large_maps, loop, precision, suite
from proofs.photographs import add_photos
from proofs.program import ROOT

DOCUMENT = ROOT / "docs" / "gpu.md"
PARTS: Mapping[str, Part] = {
    "tests": lambda _: suite.results(),
    "fidelity": lambda chosen: precision.claims(chosen.photos),
    "step": lambda _: step.classification(),
    "cifar": lambda _: cifar.measure(),
    "together": lambda _: together.measure(),
    "loss": lambda _: large_maps.measure(),
    "loop": lambda chosen: loop.measure(chosen.photos),
    "kill": lambda _: kill.faults(),
}


def main() -> None:
    """Measure what the command line names; exit with 1 if a bound is not held."""
    parser = make_parser(__doc__, prog="python -m proofs.gpu")
    add_photos(parser)
    if "-h" not in sys.argv and "--help" not in sys.argv and jax.default_backend() != "gpu":
        parser.error(
            f"JAX {jax.__version__} finds no NVIDIA GPU here, only {jax.default_backend()}: `nvidia-smi` "
            "tells whether there is one, and jax[cuda12] or jax[cuda13] computes on it"
        )
    run_parts(parser, PARTS, DOCUMENT)


if __name__ == "__main__":
    main()
