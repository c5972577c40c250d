"""A process in which files are read, watched: time, memory, a crash, and what it executes or writes."""

import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

# One file may take so long of processors: by the clock, a sound reader hangs where the machine is busy.
SECONDS = 10.0
_PATIENCE = 6  # times as long by the clock
# One file may take: 89 million pixels in Pillow's four bytes, in their mode and in RGB, and as bytes.
MEBIBYTES = 1536
_START = 120.0  # seconds for a process to import everything
_ADDRESSES = 8 << 30  # bytes, so that what is not bounded ends there and not with the machine
# What reading a file never does, whatever comes of it.
_RUN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect"),
    "pickle.find_class",
)
# What refusing one never does either; nor does it open files to write them.
_AUDITED = (
    *(*_RUN, "compile"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.chmod"),
)


class Outcome(NamedTuple):
    """What became of one file.

    Attributes:
        name: the file's.
        verdict: "read", "refused", or what went wrong.
        seconds: of processors that it took.
        mebibytes: by which the process grew at most.
    """

    name: str
    verdict: str
    seconds: float
    mebibytes: float

    @property
    def survived(self) -> bool:
        """Whether the file was read or refused, in bounded time and memory."""
        return self.verdict in ("read", "refused") and self.seconds < SECONDS and self.mebibytes < MEBIBYTES


def _peak(*, anew: bool) -> float:
    """Return the most memory that this process has had, in MiB, `anew` counting from now on."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _work(
    sender: Connection,
    attempt: Callable[[Path], str],
    inputs: Callable[..., Iterator[Path]],
    arguments: tuple[Any, ...],
    keep: Path,
    may_write: bool,
) -> None:
    """Try what `inputs` yields; send each path before its trial, and its outcome after it."""
    events: list[str] = []
    watching = False

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if not watching:
            return
        writes = event == "open" and (details[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in _AUDITED:
            events.append(f"{event} {details!r:.200}")

    with (keep / "output.txt").open("a") as output:  # libtiff has something to say of every mutant
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.addaudithook(hook)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    for count, path in enumerate(inputs(*arguments)):
        sender.send(path)
        listing = sorted(os.listdir(path.parent))
        before, began = _peak(anew=True), time.process_time()
        watching = not may_write and count > 0  # the first imports what is imported late
        try:
            verdict = attempt(path)
        except BaseException as error:
            verdict = f"{type(error).__name__}: {error!s:.200}"
        watching = False
        took, grew = time.process_time() - began, _peak(anew=False) - before
        done = [event for event in events if verdict != "read" or event.startswith(_RUN)]
        if done or (verdict != "read" and sorted(os.listdir(path.parent)) != listing):
            verdict = "; ".join(done[:3]) or f"left {sorted(os.listdir(path.parent))}"
        events.clear()
        outcome = Outcome(path.name, verdict, took, grew)
        if not outcome.survived:
            shutil.copy(path, keep)
        sender.send(outcome)


def try_all(
    attempt: Callable[[Path], str],
    inputs: Callable[..., Iterator[Path]],
    arguments: tuple[Any, ...],
    keep: Path,
    *,
    may_write: bool = False,
) -> list[Outcome]:
    """Return what became of files in a process of its own, and its death if it died.

    Args:
        attempt: reads a file; returns "read", "refused", or what was wrong.
        inputs: yields the files' paths, in the process.
        arguments: of `inputs`.
        keep: the folder for copies of what failed, and for what was printed.
        may_write: whether an attempt may write what it deletes again.
    """
    keep.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, attempt, inputs, arguments, keep, may_write))
    process.start()
    sender.close()
    outcomes: list[Outcome] = []
    trying: Path | None = None
    verdict = "it hangs"
    try:
        while receiver.poll(_PATIENCE * SECONDS if outcomes else _START):
            message = receiver.recv()
            trying = message if isinstance(message, Path) else None
            if isinstance(message, Outcome):
                outcomes.append(message)
    except EOFError:
        process.join()
        verdict = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    if trying or process.exitcode:
        if trying:
            shutil.copy(trying, keep)
        outcomes.append(Outcome(trying.name if trying else "between two files", verdict, 0, 0))
    return outcomes
