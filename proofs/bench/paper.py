"""What training would do on machines that are not here, on paper: for `bench.growth`."""

from typing import Any, NamedTuple

from proofs.bench.memory import Figures
from proofs.bench.step import PEAKS

IMAGENET = 1_281_167
EPOCHS = 100


class Machine(NamedTuple):
    """Accelerators as their makers describe them; the price is an assumption.

    Attributes:
        name: how many of which.
        chips: how many.
        flops: of one, dense bfloat16, a second.
        memory: bytes a second between one and its memory.
        network: bytes a second that one sends to the others.
        price: US dollars an hour for one.
        batch: images on one.
    """

    name: str
    chips: int
    flops: float
    memory: float
    network: float
    price: float
    batch: int


# TPUs are not here: their compiler says more than paper, `proofs.pods`.
MACHINES = (Machine("8 × H200", 8, *PEAKS["H200"], 450e9, 4.0, 256),)
# Of what binds, a step of mixed sizes reaches about half: an assumption.
REACHED = 0.5


def estimate(machine: Machine, step: Figures, sent: float, per_core: float | None) -> dict[str, Any]:
    """Return, on paper, what training does on a machine.

    An image takes the longer of its operations at `flops` and its bytes, half of float32's, at `memory`,
    over `REACHED`; after each step the gradients go round: 2 (n − 1) / n of their bytes at `network`.

    Args:
        machine: where.
        step: of `memory.by_batch`, the largest.
        sent: bytes of the gradients.
        per_core: images/s that a core decodes and crops.
    """
    limits = {
        "operations": step["GFLOP an image"] * 1e9 / machine.flops,
        "memory": step["MB moved an image"] / 2 * 1e6 / machine.memory,
    }
    binds = max(limits, key=lambda name: limits[name])
    compute = limits[binds] * machine.batch / REACHED
    network = 2 * (machine.chips - 1) / machine.chips * sent / machine.network
    rate = machine.chips * machine.batch / (compute + network)
    hours = EPOCHS * IMAGENET / rate / 3600
    row = {
        "machine": machine.name,
        "images/s": f"{rate:,.0f}",
        "binds": binds,
        "gradients' share of a step": f"{network / (compute + network):.1%}",
        f"hours for {EPOCHS} epochs": f"{hours:.1f}",
        "US$ (at US$ a chip-hour)": f"{hours * machine.chips * machine.price:,.0f} ({machine.price:g})",
    }
    if per_core:
        row["cores for input"] = f"{rate / per_core:,.0f}"
    return row
