"""Programs started as users start them, in one process or several; what they print and log."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from tat_jax.metrics import read_rows

ROOT = Path(__file__).parents[1]
_SOON, _LATE = 300.0, 3600.0  # seconds after which a program counts as hanging
_PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]

Environment = Mapping[str, str]


class Layout(NamedTuple):
    """So many processes, with so many simulated devices each."""

    processes: int
    devices: int

    def __str__(self) -> str:
        processes = f"{self.processes} × " if self.processes > 1 else ""
        return f"{processes}{self.devices} device{'s' if self.devices > 1 else ''}"


class Program:
    """A program at work in a process of its own.

    Args:
        command: what starts it.
        log: the file for what it prints.
        environment: variables besides this process's.
        limit: seconds after which it counts as hanging.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Environment | None = None,
        limit: float = _SOON,
    ):
        self.log, self.limit = log, limit
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(_PATHS), **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_until(self, holds: Callable[[], object], what: str) -> None:
        """Wait until something holds.

        Raises:
            RuntimeError: the program ended before; `what` tells before what.
            TimeoutError: neither came.
        """
        end = time.monotonic() + self.limit
        while time.monotonic() < end:
            code = self.process.poll()
            if holds():
                return
            if code is not None:
                raise RuntimeError(f"it ended with {code} before {what}:\n{self.output[-3000:]}")
            time.sleep(0.002)
        self._give_up(what)

    def wait(self) -> int:
        """Return the code with which it ends.

        Raises:
            TimeoutError: it does not.
        """
        try:
            return self.process.wait(self.limit)
        except subprocess.TimeoutExpired:
            return self._give_up("its end")

    def finish(self) -> str:
        """Wait for its end, and return what it printed.

        Raises:
            RuntimeError: it failed.
            TimeoutError: it does not end.
        """
        if code := self.wait():
            raise RuntimeError(f"it ended with {code}:\n{self.output[-3000:]}")
        return self.output

    def kill(self) -> None:
        """End it at once, and whatever it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _give_up(self, what: str) -> NoReturn:
        self.kill()
        raise TimeoutError(f"it hangs before {what}:\n{self.output[-3000:]}")


def main_command(config: str, folder: str | Path, *options: str) -> list[str]:
    """Return the command that runs `main.py` in a folder with one of `configs/`."""
    main = [sys.executable, str(ROOT / "main.py")]
    return [*main, f"--config={ROOT / 'configs' / config}", f"--workdir={folder}", *options]


def simulated(devices: int) -> dict[str, str]:
    """Return the environment in which JAX has so many devices."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


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


def run_everywhere(layout: Layout, command: Sequence[str], *, x64: bool = False) -> list[str]:
    """Run a command in every process of a layout, and return what each printed.

    Raises:
        RuntimeError: a process failed.
    """
    shared = simulated(layout.devices) | {"JAX_ENABLE_X64": str(int(x64))}
    environments = by_address(layout.processes) if layout.processes > 1 else [{}]
    with tempfile.TemporaryDirectory() as folder:
        programs = [
            Program(command, Path(folder) / str(i), environment=shared | own, limit=_LATE)
            for i, own in enumerate(environments)
        ]
        for program in programs:
            program.wait()
        return [program.finish() for program in programs]


def logged(folder: Path, name: str = "train/loss") -> list[float]:
    """Return what a run logged under a name."""
    return [row[name] for row in read_rows(folder) if name in row]
