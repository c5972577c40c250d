"""One training on any number of devices and processes: `main.py` itself, started as a user starts it."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from proofs.fidelity.claim import Claim, largest_relative_error
from tat_jax.metrics import read_rows

ROOT = Path(__file__).parents[2]


class Layout(NamedTuple):
    """So many processes, with so many simulated devices each."""

    processes: int
    devices: int

    def __str__(self) -> str:
        processes = f"{self.processes} × " if self.processes > 1 else ""
        return f"{processes}{self.devices} device{'s' if self.devices > 1 else ''}"


LAYOUTS = (Layout(1, 1), Layout(1, 2), Layout(1, 4), Layout(1, 8), Layout(2, 4))
# At the published rate Adam makes steps of gradients that are 0 but for rounding, and what differs between
# two runs by 1e-15 at the second step does so by 1e-5 at the seventh. At this one it stays rounding.
_RATE = "--config.optimizer.learning_rate=1e-6"
SINGLE = (_RATE,)
DOUBLE = (_RATE, "--config.dtype=float64")
_SEVEN_STEPS = ("--config.data.labels_per_class=10",)  # the last of them of four images


def claims() -> list[Claim]:
    """Compare the losses of seven steps on every layout with those on one device."""
    return [
        claim
        for groups, bn in (("the whole batch", ()), ("8 groups", ("--config.bn_group=2",)))
        for dtype, options, bound in (("float32", SINGLE, 5e-6), ("float64", DOUBLE, 1e-13))
        for claim in compare(LAYOUTS, *bn, *options, name=f"{dtype}, BatchNorm over {groups}", bound=bound)
    ]


def compare(layouts: tuple[Layout, ...], *options: str, name: str, bound: float) -> list[Claim]:
    """Compare the losses under `options` on every layout with those on the first."""
    first, *others = (_losses(layout, *options, *_SEVEN_STEPS) for layout in layouts)
    return [
        Claim(
            f"losses of 7 steps on {layout}, {name}",
            str(layouts[0]),
            largest_relative_error(losses, first),
            bound,
        )
        for layout, losses in zip(layouts[1:], others, strict=True)
    ]


def _losses(layout: Layout, *options: str) -> Float[np.ndarray, " steps"]:
    """Train the miniature of `configs/r18_r34.py` with `main.py` and return the loss of every step."""
    config = f"--config={ROOT / 'configs' / 'r18_r34.py'}:smoke"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "main.py"), config, f"--workdir={folder}/run", *options]
        start(layout, command, x64="--config.dtype=float64" in options)
        return np.array([row["train/loss"] for row in read_rows(Path(folder) / "run") if "train/loss" in row])


def start(layout: Layout, command: list[str], *, x64: bool = False) -> list[str]:
    """Run a command in every process of a layout, and return what each printed.

    Raises:
        RuntimeError: a process failed; its last lines are told.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": str(int(x64)),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={layout.devices}",
        "PYTHONPATH": str(ROOT),
    }
    of_processes = by_address(layout.processes) if layout.processes > 1 else [{}]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(i) for i in range(layout.processes)]
        running = []
        for own, output in zip(of_processes, outputs, strict=True):
            with output.open("w") as file:
                running.append(
                    subprocess.Popen(command, env=environment | own, stdout=file, stderr=subprocess.STDOUT)
                )
        codes = [process.wait() for process in running]
        texts = [output.read_text() for output in outputs]
    for i, (code, text) in enumerate(zip(codes, texts, strict=True)):
        if code:
            raise RuntimeError(f"process {i} of {layout} ended with {code}:\n{text[-3000:]}")
    return texts


def by_address(count: int) -> list[dict[str, str]]:
    """Return the environment of each of `count` processes on this machine, as a person sets it."""
    address = f"127.0.0.1:{free_port()}"
    return [
        {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        for i in range(count)
    ]


def free_port() -> int:
    """Return the number of a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
