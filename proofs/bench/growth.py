"""How memory, time and communication grow; and from that, on paper, what large machines would do.

`python -m proofs.bench.growth [--json FILE] [--plot FILE] [--input FILE]`. The step of `configs/r18_r34.py`
at 224² with random weights: by batch size on one device, and by number of simulated devices what they send
each other, read from the compiled program. The TaT loss by positions. `--input` is what
`proofs.bench.input --json` wrote.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from proofs.bench.full_size import full_size
from proofs.bench.loss import compile_loss
from proofs.bench.sidebyside import timed
from proofs.bench.step import PEAKS
from proofs.command import add_json, make_parser, publish, to_read, to_write
from proofs.compiled_step import blank_rows, compile_step
from proofs.report import markdown_table
from tat_jax.losses import tat_loss

BATCHES = (4, 8, 16, 32)
SIDES = (7, 14, 28, 56, 64, 96, 129)
DEVICES = (1, 2, 4, 8)
IMAGENET = 1_281_167
EPOCHS = 100

Figures = dict[str, float]


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


def by_batch() -> list[Figures]:
    """Measure the step on one device: memory besides arguments, time, operations and bytes an image."""
    rows = []
    for batch in BATCHES:
        config = _config(batch)
        step = compile_step(config, blank_rows(config), num_classes=1000)
        cost = step.program.cost_analysis()
        rows.append(
            {
                "batch": batch,
                "MiB": step.program.memory_analysis().temp_size_in_bytes / 2**20,
                "ms": _milliseconds(step.repeated()),
                "GFLOP an image": cost["flops"] / batch / 1e9,
                "MB moved an image": cost["bytes accessed"] / batch / 1e6,
            }
        )
    return rows


def by_positions() -> list[Figures]:
    """Measure the TaT loss with its gradients, one image of 256 channels, one head, float32."""
    rows = []
    rng = np.random.default_rng(0)
    for side in SIDES:
        arrays = [jnp.asarray(rng.normal(0, 0.3, (1, side, side, 256)), jnp.float32) for _ in range(4)]
        program = compile_loss(tat_loss, arrays, heads=1)
        ms = _milliseconds(program, *arrays)
        mib = program.memory_analysis().temp_size_in_bytes / 2**20
        rows.append({"positions": side**2, "MiB": mib, "ms": ms})
    return rows


def by_devices() -> list[Figures]:
    """Read from the compiled step what devices send, for two batches a device."""
    rows = []
    for devices in DEVICES:
        for batch in (2, 8):
            config = _config(batch * devices)
            config.bn_group = batch
            # Parameters, and so what is sent, are the same at this size, which compiles sooner.
            config.data.image_size = 64
            step = compile_step(config, blank_rows(config), devices=devices, num_classes=1000)
            operations, sent = step.bytes_sent()
            rows.append(
                {
                    "devices": devices,
                    "images on each": batch,
                    "collective operations": operations,
                    "MiB": sent / 2**20,
                }
            )
    return rows


def estimate(machine: Machine, step: Figures, sent: float, per_core: float | None) -> dict[str, Any]:
    """Return, on paper, what training does on a machine.

    An image takes the longer of its operations at `flops` and its bytes, half of float32's, at `memory`,
    over `REACHED`; after each step the gradients go round: 2 (n − 1) / n of their bytes at `network`.

    Args:
        machine: where.
        step: of `by_batch`, the largest.
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


def plot(batches: list[Figures], positions: list[Figures], devices: list[Figures], path: Path) -> None:
    """Draw memory by batch size, memory and time by positions, and bytes sent by devices."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    batch, loss, network = figure.subplots(1, 3)
    batch.plot(*_columns(batches, "batch", "MiB"), marker="o")
    batch.set(title="Step, one device", xlabel="batch size", ylabel="temporaries, MiB", ylim=0)
    loss.plot(*_columns(positions, "positions", "MiB"), marker="o", label="temporaries, MiB")
    loss.plot(*_columns(positions, "positions", "ms"), marker="s", label="time, ms")
    loss.set(title="TaT loss and gradients, 256 channels", xlabel="positions", xscale="log", yscale="log")
    loss.legend()
    for images in sorted({row["images on each"] for row in devices}):
        rows = [row for row in devices if row["images on each"] == images]
        style = {"marker": "o"} if images == 2 else {"marker": "x", "linestyle": "--"}
        network.plot(*_columns(rows, "devices", "MiB"), label=f"{images:g} images on each", **style)
    network.set(title="Carried by a step's collectives", xlabel="devices", ylabel="MiB", ylim=0)
    network.legend()
    for axes in (batch, loss, network):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _milliseconds(call: Callable[..., object], *arguments: jax.Array) -> float:
    """Return the median of three calls, after one that does not count."""
    run = timed(lambda: jax.block_until_ready(call(*arguments)))
    run()
    return 1000 * float(np.median([run() for _ in range(3)]))


def _config(batch: int) -> Any:
    config = full_size(on_gpu=False)
    config.batch_size = batch
    return config


def _columns(rows: Sequence[Figures], x: str, y: str) -> tuple[list[float], list[float]]:
    return [row[x] for row in rows], [row[y] for row in rows]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        {k: v if isinstance(v, str) else f"{v:,.4g}" if v < 1e4 else f"{v:,.0f}" for k, v in row.items()}
        for row in rows
    ]
    return markdown_table(cells)


def main() -> None:
    """Measure, print the tables, and write what the options ask for."""
    parser = make_parser(__doc__)
    add_json(parser)
    parser.add_argument("--plot", type=to_write, metavar="FILE", help="draw them into this file")
    parser.add_argument("--input", type=to_read, metavar="FILE", help="rows of bench.input, for the cores")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    devices, batches, positions = by_devices(), by_batch(), by_positions()
    per_core = json.loads(options.input.read_text())[0]["ours"] if options.input else None
    sent = devices[-1]["MiB"] * 2**20
    estimates = [estimate(machine, batches[-1], sent, per_core) for machine in MACHINES]
    figures = {"batches": batches, "positions": positions, "devices": devices, "estimates": estimates}
    publish([_table(rows) for rows in figures.values()], figures, options.json)
    if options.plot:
        plot(batches, positions, devices, options.plot)


if __name__ == "__main__":
    main()
