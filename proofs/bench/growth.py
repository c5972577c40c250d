"""How memory, time and communication grow.

`python -m proofs.bench.growth [PART …] [--json FILE] [--plot FILE]`. The step of `configs/r18_r34.py` with
random weights: by batch size, crop and classes on one device, and by number of simulated devices what they
send each other, read from the compiled program. What eight send where a loss compares images with each other.
The TaT loss by positions. The step of `seg_voc_r18.py`, by crop and by loss.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from proofs.bench import memory, scaling, segmentation
from proofs.bench.memory import Figures
from proofs.command import add_json, add_parts, make_parser, publish, to_write
from proofs.report import markdown_table


def plot(figures: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """Draw memory by batch, crop and positions, and what devices do by their number.

    Args:
        figures: `batches`, `crops`, `positions`, `weak` and `strong`, as they are measured.
        path: of the picture.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    (batch, crop, loss), (sent, computed, taken) = figure.subplots(2, 3)
    batch.plot(*_columns(figures["batches"], "batch", "MiB"), marker="o")
    batch.set(title="Step, 224², one device", xlabel="batch size", ylabel="temporaries, MiB", ylim=0)
    crop.plot(*_columns(figures["crops"], "pixels", "MiB"), marker="o")
    crop.set(title="Step, 8 images, one device", xlabel="pixels", ylabel="temporaries, MiB", ylim=0)
    loss.plot(*_columns(figures["positions"], "positions", "MiB"), marker="o", label="temporaries, MiB")
    loss.plot(*_columns(figures["positions"], "positions", "ms"), marker="s", label="time, ms")
    loss.set(title="TaT loss and gradients, 256 channels", xlabel="positions", xscale="log", yscale="log")
    loss.legend()
    for axes, name, title in (
        (sent, "MiB sent", "Carried by a step's collectives"),
        (computed, "GFLOP", "Computed by a device"),
        (taken, "temporaries, MiB", "Temporaries of a device"),
    ):
        for kind, marker in (("weak", "o"), ("strong", "x")):
            rows = figures[kind]
            of = "images on each" if kind == "weak" else "images in all"
            images = rows[0]["images on each"]
            axes.plot(*_columns(rows, "devices", name), marker=marker, label=f"{images:g} {of}")
        axes.set(title=title, xlabel="devices", ylabel=name, ylim=0)
        axes.legend()
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _columns(rows: Sequence[Figures], x: str, y: str) -> tuple[list[float], list[float]]:
    return [row[x] for row in rows], [row[y] for row in rows]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        {k: v if isinstance(v, str) else f"{v:,.4g}" if v < 1e4 else f"{v:,.0f}" for k, v in row.items()}
        for row in rows
    ]
    return markdown_table(cells)


PARTS: Mapping[str, Callable[[], Sequence[Any]]] = {
    "processes": scaling.processes,
    "weak": scaling.weak,
    "strong": scaling.strong,
    "pairs": scaling.pairs,
    "batches": memory.by_batch,
    "crops": memory.by_crop,
    "classes": memory.by_classes,
    "positions": memory.by_positions,
    "segmentation": segmentation.temporaries,
}


def main() -> None:
    """Measure, print the tables, and write what the options ask for."""
    parser = make_parser(__doc__)
    add_json(parser)
    parser.add_argument("--plot", type=to_write, metavar="FILE", help="draw all of them into this file")
    add_parts(parser, PARTS)
    options = parser.parse_args()
    if options.plot and options.parts:
        parser.error("--plot draws all parts: name none")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(scaling.DEVICES))
    figures = {name: PARTS[name]() for name in options.parts or PARTS}
    publish([_table(rows) for rows in figures.values()], figures, options.json)
    if options.plot:
        plot(figures, options.plot)


if __name__ == "__main__":
    main()
