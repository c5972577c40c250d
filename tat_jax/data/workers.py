"""Processes that read: they are told what to read through a pipe, and hand it over in shared memory."""

import contextlib
import mmap
import os
import pickle
import select
import selectors
import signal
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import numpy as np

from tat_jax.data.rows import Rows
from tat_jax.data.shared import Layout, Slot, allocate, freeze
from tat_jax.data.worker import DONE, TASK, Files

AHEAD = 3  # batches that are read at a time
# Batches that whoever takes them may hold without their being copied: one is put on the devices ahead of its
# step, and JAX lets go of them late.
HELD = 4
INTERPRETER = 50 * 2**20  # bytes that a process takes before it reads
_ROWS = 32  # of a task at most
_RETRY = 0.01  # seconds until a pipe that was full is tried again
_PIECE = select.PIPE_BUF // TASK.size * TASK.size  # that a pipe takes whole or not at all
# What a terminal or a scheduler sends to all processes of a job is for the one that trains to decide on.
_NOT_FOR_READERS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
# The libraries of a process that reads would start threads of their own for each core. What an image took of
# memory is kept for the next one, up to what glibc allows: to get it anew costs as much as to read the file.
_ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_ENVIRONMENT |= {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)}
_WORK = (
    "import sys; sys.path[:] = {path!r}; from tat_jax.data.worker import Files, work; "
    "work({parent}, Files({files}))"
)


class Read(NamedTuple):
    """A batch, and the names of the files that did not decode, by index."""

    arrays: Slot
    skipped: dict[int, str]


class Workers:
    """Processes that fill batches of so many rows, and end with this object or with this process.

    Args:
        rows: how they are filled. Is sent to the processes: its source and its transform are importable.
        layout: of batches of `AHEAD + HELD`.
        processes: how many.
        threads: in each process, at least one.

    Raises:
        MemoryError: there is no room for the batches.
        TypeError: the rows cannot be sent.
    """

    def __init__(self, rows: Rows, layout: Layout, *, processes: int, threads: int):
        self._layout = layout
        threads = max(threads, 1)
        # Small enough for all to have some of the next batch, while one of them still reads the last of this.
        self._task_rows = max(1, min(_ROWS, 2 * layout.rows // (processes * threads)))
        with contextlib.ExitStack() as only_here:
            memory = allocate(layout.bytes)
            only_here.callback(os.close, memory)
            setup = _freeze((rows, layout, threads))
            only_here.callback(os.close, setup)
            self._memory = mmap.mmap(memory, layout.bytes)
            self._iteration = layout.iteration(self._memory)
            tasks, self._tasks = os.pipe()
            only_here.callback(os.close, tasks)
            self._done, done = os.pipe()
            only_here.callback(os.close, done)
            os.set_blocking(self._tasks, False)
            self._unsent = bytearray()
            self._selector = selectors.DefaultSelector()
            self._selector.register(self._done, selectors.EVENT_READ)
            self._of: dict[Connection, subprocess.Popen] = {}
            self._end = weakref.finalize(
                self, _end, os.getpid(), self._of, self._selector, (self._tasks, self._done)
            )
            for _ in range(processes):
                messages, their_messages = Pipe(duplex=False)
                with their_messages:
                    files = Files(setup, memory, tasks, done, their_messages.fileno())
                    self._of[messages] = _start(files)
                self._selector.register(messages, selectors.EVENT_READ)
        self._missing = np.zeros(layout.slots, int)  # tasks of each slot that are not done
        self._skipped: list[dict[int, str]] = [{} for _ in range(layout.slots)]
        self._errors: list[dict[int, Exception]] = [{} for _ in range(layout.slots)]
        self._holders: list[weakref.ref[np.ndarray] | None] = [None] * layout.slots
        self._starting = processes
        self._unheard = 0  # messages that were sent and not read yet

    def start(self) -> None:
        """Wait until all processes are ready.

        Raises:
            ChildProcessError: one has ended.
        """
        while self._starting:
            self._listen()

    def read(self, epoch: int, batches: Iterable[np.ndarray]) -> Iterator[Read]:
        """Yield batches of an epoch in order, given the indices of their images; of those left out, the rest.

        A batch keeps its memory as long as anything refers to it. Only one iteration goes on at a time.

        Args:
            epoch: that of the augmentation.
            batches: for each the indices of all its rows, −1 where there is no image.

        Raises:
            ChildProcessError: a process has ended.
            Exception: what reading an image of the batch raised.
        """
        while self._missing.any():  # of an iteration that was left off
            self._listen()
        waiting, asked = iter(batches), deque[int]()
        self._iteration[0] += 1
        try:
            while self._ask(epoch, waiting, asked):
                slot = asked.popleft()
                while self._missing[slot] or self._unheard:
                    self._listen()
                if errors := self._errors[slot]:
                    raise errors[min(errors)]
                read = Read(self._hand_over(slot), self._skipped[slot])
                self._ask(epoch, waiting, asked)
                yield read
                del read
        finally:
            self._iteration[0] += 1  # what was asked for is not read any more

    def close(self) -> None:
        """End the processes. What they have read stays."""
        self._end()

    @property
    def is_open(self) -> bool:
        """Return whether the processes are there."""
        return self._end.alive

    def _ask(self, epoch: int, waiting: Iterator[np.ndarray], asked: deque[int]) -> int:
        """Ask for batches into the slots that are free, and return how many are asked for."""
        while len(asked) < AHEAD:
            slot = next(
                (n for n in range(self._layout.slots) if n not in asked and not self._is_held(n)), None
            )
            indices = None if slot is None else next(waiting, None)
            if slot is None or indices is None:
                break
            self._layout.slot(self._memory, slot)[0].indices[:] = indices
            self._skipped[slot], self._errors[slot] = {}, {}
            firsts = range(0, self._layout.rows, self._task_rows)
            self._missing[slot] = len(firsts)
            for first in firsts:
                count = min(self._task_rows, self._layout.rows - first)
                self._unsent += TASK.pack(int(self._iteration[0]), epoch, slot, first, count, 0)
            asked.append(slot)
        self._send()
        return len(asked)

    def _is_held(self, slot: int) -> bool:
        holder = self._holders[slot]
        return holder is not None and holder() is not None

    def _hand_over(self, slot: int) -> Slot:
        """Return the arrays of a slot; copies where whoever takes them holds as many as may be without."""
        arrays, holder = self._layout.slot(self._memory, slot)
        if sum(map(self._is_held, range(self._layout.slots))) >= HELD:
            copies: list[Any] = [None if array is None else array.copy() for array in arrays]
            return Slot(*copies)
        self._holders[slot] = weakref.ref(holder)
        return arrays

    def _send(self) -> None:
        """Send of the tasks what the pipe takes, the rest when it is read."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                del self._unsent[: os.write(self._tasks, self._unsent[:_PIECE])]

    def _listen(self) -> None:
        """Wait until a process says something, and note it."""
        self._send()
        for key, _ in self._selector.select(_RETRY if self._unsent else None):
            if key.fileobj == self._done:
                slots, said = np.frombuffer(os.read(self._done, 4096 * DONE.size), "<u4").reshape(-1, 2).T
                self._missing -= np.bincount(slots, minlength=self._layout.slots)
                self._unheard += int(said.sum())
            else:
                self._hear(key.fileobj)

    def _hear(self, messages: Any) -> None:
        try:
            slot, first, found = messages.recv()
        except (EOFError, OSError):
            process = self._of[messages]
            process.wait()
            self.close()
            raise ChildProcessError(_obituary(process)) from None
        if slot is None:
            if found:
                self.close()
                raise found
            self._starting -= 1
            return
        self._unheard -= 1
        if isinstance(found, Exception):
            self._errors[slot][first] = found
        else:
            self._skipped[slot] |= found


def _freeze(setup: tuple[Rows, Layout, int]) -> int:
    try:
        return freeze(setup)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise TypeError(
            f"processes that read cannot be sent what they need ({error}); define it in a module, or read "
            "without them: data.processes=0"
        ) from error


def _start(files: Files) -> subprocess.Popen:
    """Start a process that reads."""
    # Not by multiprocessing, which would import the user's script once more in each process.
    code = _WORK.format(path=sys.path, parent=os.getpid(), files=", ".join(map(str, files)))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_READERS)  # which the process inherits
    try:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=files,
            env=os.environ | _ENVIRONMENT,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(
    starter: int,
    processes: dict[Connection, subprocess.Popen],
    selector: selectors.BaseSelector,
    files: tuple[int, ...],
) -> None:
    """End processes at once: nothing that they do outlives this one, and what they wrote stays."""
    if os.getpid() != starter:  # a fork of it
        return
    for process in processes.values():
        process.kill()
    for messages, process in processes.items():
        with contextlib.suppress(subprocess.TimeoutExpired):  # a disk that does not answer may hold it
            process.wait(10)
        messages.close()
    selector.close()
    for file in files:
        os.close(file)


def _obituary(process: subprocess.Popen) -> str:
    """Say how a process ended."""
    status = process.returncode
    who = f"a process that reads images ({process.pid})"
    if status >= 0:
        return f"{who} ended with status {status}; what it said stands above"
    name = signal.Signals(-status).name
    why = ", as happens where the machine's memory is full" if -status == signal.SIGKILL else ""
    return (
        f"{who} was ended by {name}{why}: lower --config.data.processes, --config.data.threads or "
        "--config.batch_size, and run the same command again"
    )
