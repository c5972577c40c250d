"""A long run: its resident memory, its open files and its speed from the beginning to the end."""

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from proofs.program import logged
from proofs.torture.fault import Fault
from proofs.torture.small_run import Run
from tat_jax.metrics import read_rows

# All of the embedded digits; an evaluation about every minute, and a checkpoint besides that at twice that.
_OPTIONS = (
    "--config.data.labels_per_class=100",
    "--config.epochs=100000",
    "--config.eval_every=60",
    "--config.log_every=200",
    "--config.checkpoint_minutes=2",
)
_EVERY = 5.0  # seconds between two looks
_ALLOWED = 0.05  # of memory and speed


class Record(NamedTuple):
    """What a process held at each look, as /proc tells, and the images/s of the rows that it logged."""

    seconds: Float[np.ndarray, " looks"]
    resident: Float[np.ndarray, " looks"]  # MiB
    files: Float[np.ndarray, " looks"]
    speed: Float[np.ndarray, " rows"]

    def change(self, name: str) -> float:
        """Return by which part a column's median in the last sixth of the time differs from the second's."""
        parts = np.array_split(getattr(self, name), 6)
        return float(np.median(parts[-1]) / np.median(parts[1]) - 1)


def record(minutes: float) -> Record:
    """Train for so many minutes, looking at the process every few seconds."""
    seconds, resident, files = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        run = Run(Path(temporary) / "long", *_OPTIONS)
        run.wait_until(lambda: read_rows(run.folder), "its first row")
        began = time.monotonic()
        while time.monotonic() < began + 60 * minutes and run.process.poll() is None:
            seconds.append(time.monotonic() - began)
            resident.append(_resident(run.process.pid))
            files.append(len(os.listdir(f"/proc/{run.process.pid}/fd")))
            time.sleep(_EVERY)
        if run.process.poll() is not None:
            raise RuntimeError(f"the run ended with {run.process.returncode}:\n{run.output[-3000:]}")
        run.process.send_signal(signal.SIGTERM)
        run.wait()
        speed = logged(run.folder, "train/images_per_second")
    return Record(*(np.array(column, float) for column in (seconds, resident, files, speed)))


def _resident(process: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def faults(minutes: float, *, plot: Path) -> list[Fault]:
    """Train for so many minutes, draw the record, and compare its end with its beginning."""
    recorded = record(minutes)
    draw(recorded, plot)
    return changes(recorded)


def changes(recorded: Record) -> list[Fault]:
    """Return whether memory, files and speed of the end are those of the beginning."""
    minutes = recorded.seconds[-1] / 60
    found = []
    for name, what in (("resident", "resident memory"), ("files", "open files"), ("speed", "images/s")):
        change = recorded.change(name)
        worse = -change if name == "speed" else change
        median = np.median(getattr(recorded, name))
        lost = f"{change:+.1%} from the second sixth to the last, median {median:,.0f}"
        fault = f"{minutes:.0f} minutes of training: {what}" + (", MiB" if name == "resident" else "")
        found.append(Fault(fault, 1, int(worse <= (0 if name == "files" else _ALLOWED)), lost))
    return found


def draw(recorded: Record, path: Path) -> None:
    """Draw memory, files and speed over the time."""
    figure = Figure(figsize=(13, 3.5), layout="constrained")
    minutes = recorded.seconds / 60
    of_rows = np.linspace(0, minutes[-1], len(recorded.speed))  # about: rows come evenly
    for axes, x, y, label in zip(
        figure.subplots(1, 3),
        (minutes, minutes, of_rows),
        (recorded.resident, recorded.files, recorded.speed),
        ("resident memory, MiB", "open files", "training, images/s"),
        strict=True,
    ):
        axes.plot(x, y, linewidth=0.8)
        axes.set(xlabel="minutes", title=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
