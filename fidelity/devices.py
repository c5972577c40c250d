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

from tat_jax.metrics import read_rows

ROOT = Path(__file__).parents[1]


class Layout(NamedTuple):
    """So many processes, with so many simulated devices each."""

    processes: int
    devices: int

    def __str__(self) -> str:
        return (
            f"{self.processes} × {self.devices} devices" if self.processes > 1 else f"{self.devices} devices"
        )


def train(layout: Layout, workdir: Path, *options: str, x64: bool = False) -> Float[np.ndarray, " steps"]:
    """Run `main.py` on the miniature of `configs/r18_r34.py` and return the loss of every step.

    Raises:
        RuntimeError: a process failed; its last lines are told.
    """
    command = [sys.executable, str(ROOT / "main.py"), f"--config={ROOT / 'configs' / 'r18_r34.py'}:smoke"]
    start(layout, [*command, f"--workdir={workdir}", *options], x64=x64)
    return np.array([row["train/loss"] for row in read_rows(workdir) if "train/loss" in row])


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
    if layout.processes > 1:
        environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
        environment["JAX_NUM_PROCESSES"] = str(layout.processes)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(i) for i in range(layout.processes)]
        running = []
        for i, output in enumerate(outputs):
            own = environment | ({"JAX_PROCESS_ID": str(i)} if layout.processes > 1 else {})
            with output.open("w") as file:
                running.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
        codes = [process.wait() for process in running]
        texts = [output.read_text() for output in outputs]
    for i, (code, text) in enumerate(zip(codes, texts, strict=True)):
        if code:
            raise RuntimeError(f"process {i} of {layout} ended with {code}:\n{text[-3000:]}")
    return texts


def free_port() -> int:
    """Return the number of a port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
