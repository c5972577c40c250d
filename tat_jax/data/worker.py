"""What a process does that reads: it fills rows of batches in shared memory. It imports no JAX."""

import mmap
import os
import pickle
import struct
import threading
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

from tat_jax.data.rows import Rows
from tat_jax.data.shared import Layout, thaw

# A task: the number of the epoch's iteration, the epoch, the slot, the first row and how many rows there are.
# Of a size that divides what a pipe passes on as one piece, so that none is torn among those who read.
TASK = struct.Struct("<IIIIQQ")
DONE = struct.Struct("<II")  # the slot, and how many messages went before
_HEARTBEAT = 1.0  # seconds within which a process sees that the one that started it is gone


class Files(NamedTuple):
    """The open files by which a process that reads is told and tells.

    Attributes:
        setup: holds what `thaw` returns: rows, layout, number of threads.
        memory: the slots.
        tasks: gives the tasks to whoever is free.
        done: takes the slot of each task that is done.
        messages: takes what else there is to say, before that.
    """

    setup: int
    memory: int
    tasks: int
    done: int
    messages: int


def work(parent: int, files: Files) -> None:
    """Fill rows until the tasks end, or the process that started this one.

    Args:
        parent: the process that started this one.
        files: are this process's own from now on.
    """
    messages = Connection(files.messages, readable=False)
    try:
        rows, layout, threads = thaw(files.setup)
        worker = _Worker(rows, layout, mmap.mmap(files.memory, layout.bytes), files, messages)
    except Exception as error:
        messages.send((None, 0, _portable(error)))
        return
    messages.send((None, 0, None))
    readers = [threading.Thread(target=worker.run, daemon=True) for _ in range(threads)]
    for reader in readers:
        reader.start()
    while alive := [reader for reader in readers if reader.is_alive()]:
        alive[0].join(_HEARTBEAT)
        if os.getppid() != parent:  # whatever else may hold the other end of the pipe open
            os._exit(1)


class _Worker:
    def __init__(self, rows: Rows, layout: Layout, memory: mmap.mmap, files: Files, messages: Connection):
        self._rows, self._files, self._messages = rows, files, messages
        self._slots = [layout.slot(memory, number)[0] for number in range(layout.slots)]
        self._iteration = layout.iteration(memory)
        self._one_at_a_time = threading.Lock()

    def run(self) -> None:
        """Do tasks until there are none."""
        try:
            while task := os.read(self._files.tasks, TASK.size):
                iteration, epoch, slot, first, count, _ = TASK.unpack(task)
                said = iteration == int(self._iteration[0]) and self._fill(epoch, slot, first, count)
                os.write(self._files.done, DONE.pack(slot, said))
        except BrokenPipeError:  # whoever waited for this is gone
            os._exit(1)
        except BaseException:  # or the task would be waited for without end
            traceback.print_exc()
            os._exit(1)

    def _fill(self, epoch: int, slot: int, first: int, count: int) -> bool:
        """Fill rows, and return whether there was something to say of them."""
        image, label, where, indices = self._slots[slot]
        part = slice(first, first + count)
        labels = None if label is None else label[part]
        try:
            found: object = self._rows.fill(image[part], labels, where[part], epoch, indices[part])
        except Exception as error:
            found = _portable(error)
        if found:
            with self._one_at_a_time:
                self._messages.send((slot, first, found))
        return bool(found)


def _portable(error: Exception) -> Exception:
    """Return an error that another process can read; one that does not say all itself with where it arose."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of somebody's own does
        error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    if not isinstance(error, ValueError | OSError | MemoryError):
        error.add_note("".join(traceback.format_exception(error)))
    return error
