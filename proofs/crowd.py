"""Many processes of `main.py` on one machine, forked from one that has imported all that they import.

Sixty-four interpreters would take 25 GB, and import for minutes. `Crowd` starts this module, which forks
them: `python -m proofs.crowd FOLDER COUNT ARGUMENT…`, the arguments being those of `main.py`.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.figure
import optax
import PIL.Image

from proofs.program import Program, by_address, simulated
from tat_jax import check, cli, evaluate, study, train

_WARM = (check, evaluate, jax, matplotlib.figure, optax, study, train)  # imported before the fork, so once
_EVENTS = {"open": "open", "os.listdir": "list", "os.scandir": "list"}  # of Python, by what they are here
_PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when the one that started it ends
_LIMIT = 1200.0  # seconds until it counts as hanging


class Touched(NamedTuple):
    """A file that a process opened, or a folder that it listed.

    Attributes:
        what: "open" or "list".
        path: of which.
        writes: whether it was opened for writing.
    """

    what: str
    path: str
    writes: bool


class Ended(NamedTuple):
    """How a process ended: its code, the seconds of a core that it took, and when."""

    code: int
    seconds: float
    at: float


class Crowd(Program):
    """So many processes of one job, of one device each.

    Args:
        folder: of what they leave: what each printed and touched, and how it ended.
        count: of processes.
        arguments: of `main.py`.
    """

    def __init__(self, folder: Path, count: int, *arguments: str):
        self.folder, self.count = folder, count
        folder.mkdir(parents=True)
        cache = {"XDG_CACHE_HOME": str(folder.parent / "cache")}
        # Of several cores the threads of one process are no gain where there are so many processes.
        lean = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        super().__init__(
            [sys.executable, "-m", "proofs.crowd", str(folder), str(count), *arguments],
            folder / "crowd.log",
            environment={**simulated(1), **cache, **lean},
            limit=_LIMIT,
        )

    def said(self, index: int) -> str:
        """Return what a process has printed so far."""
        path = self.folder / f"{index}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def touched(self, index: int) -> list[Touched]:
        """Return the files and folders that a process touched, in order."""
        lines = (self.folder / f"{index}.files").read_text().splitlines()
        return [Touched(*json.loads(line)) for line in lines]

    def signal(self, index: int, number: int) -> None:
        """Send a signal to one of the processes; one that has ended does not hear it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((self.folder / f"{index}.pid").read_text()), number)

    def is_alive(self, index: int) -> bool:
        """Return whether one of the processes has not ended."""
        pid = int((self.folder / f"{index}.pid").read_text())
        return Path(f"/proc/{pid}").exists()

    def ended(self) -> list[Ended]:
        """Wait, and return how each process ended.

        Raises:
            RuntimeError: what starts them failed.
        """
        self.finish()
        return [Ended(*ended) for ended in json.loads((self.folder / "ended.json").read_text())]


def main(folder: Path, count: int, *arguments: str) -> None:
    """Fork processes, and write down how each ended."""
    _end_with_parent()
    environments = by_address(count) if count > 1 else [{}]
    gc.collect()
    gc.freeze()  # or the collector would write to, and so copy, what they share
    pids = []
    for index, environment in enumerate(environments):
        pid = os.fork()
        if not pid:
            _become(folder, index, environment)
            sys.argv = ["main.py", *arguments]
            cli.start()
            return
        (folder / f"{index}.pid").write_text(str(pid))
        pids.append(pid)
    ended: dict[int, Ended] = {}
    while len(ended) < count:
        pid, status, used = os.wait4(-1, 0)
        seconds = used.ru_utime + used.ru_stime
        ended[pid] = Ended(os.waitstatus_to_exitcode(status), seconds, time.monotonic())
    (folder / "ended.json").write_text(json.dumps([ended[pid] for pid in pids]))


def _become(folder: Path, index: int, environment: dict[str, str]) -> None:
    """Make a forked process the one of a number: its environment, where it prints, what is noted of it."""
    _end_with_parent()
    os.environ.update(environment)
    output = os.open(folder / f"{index}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    noted = os.open(folder / f"{index}.files", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if (what := _EVENTS.get(event)) and isinstance(arguments[0], str | os.PathLike):
            flags = arguments[2] if what == "open" else 0
            touched = Touched(what, os.path.abspath(arguments[0]), bool(flags & (os.O_WRONLY | os.O_RDWR)))
            os.write(noted, json.dumps(touched).encode() + b"\n")

    sys.addaudithook(note)


def _end_with_parent() -> None:
    """Let this process end with the one that started it, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    PIL.Image.init()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
