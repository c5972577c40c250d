"""Memory that processes share, without a name that could outlive them: batches, and what stays as it is."""

import mmap
import os
import pickle
import tempfile
from typing import Any, NamedTuple, Self

import numpy as np

_ALIGNED = mmap.PAGESIZE  # of each slot; within it as of the devices' buffers, so that a CPU's need no copy
_WITHIN = 64


class Slot(NamedTuple):
    """Arrays of a batch in shared memory.

    Attributes:
        image: uint8 [rows, size, size, 3].
        label: [rows, …]; None where images have no labels.
        where: the rows that have an image.
        indices: of the images that belong there; −1 is none.
    """

    image: np.ndarray
    label: np.ndarray | None
    where: np.ndarray
    indices: np.ndarray


class Layout(NamedTuple):
    """Where the arrays of each slot lie.

    Attributes:
        slots: how many batches there is room for.
        rows: of a batch.
        size: height and width of the images.
        label: the type and the shape of a label; None where there are none.
    """

    slots: int
    rows: int
    size: int
    label: tuple[str, tuple[int, ...]] | None

    @classmethod
    def of(cls, slots: int, rows: int, size: int, blank_label: np.ndarray | None) -> Self:
        """Return the layout of batches whose labels are like a blank one."""
        label = None if blank_label is None else (blank_label.dtype.str, blank_label.shape)
        return cls(slots, rows, size, label)

    @property
    def slot_bytes(self) -> int:
        """Return how much memory a slot takes."""
        return _round_up(self._places()[1], _ALIGNED)

    @property
    def bytes(self) -> int:
        """Return how much memory they take together with the number of the epoch's iteration."""
        return _ALIGNED + self.slots * self.slot_bytes

    def iteration(self, memory: mmap.mmap) -> np.ndarray:
        """Return the number that stands before all slots, whose change tells who reads to leave off."""
        return np.frombuffer(memoryview(memory)[:8], np.uint64)

    def slot(self, memory: mmap.mmap, number: int) -> tuple[Slot, np.ndarray]:
        """Return the arrays of a slot, and a new one which they, and all views of them, keep alive."""
        start = _ALIGNED + number * self.slot_bytes
        # Of a buffer that is no array: NumPy would let views of an array's view refer to the array itself.
        whole = np.frombuffer(memoryview(memory)[start : start + self.slot_bytes], np.uint8)
        arrays: dict[str, Any] = {"label": None}
        arrays |= {
            name: whole[first : first + length].view(dtype).reshape(shape)
            for name, (first, length, dtype, shape) in self._places()[0].items()
        }
        return Slot(**arrays), whole

    def _places(self) -> tuple[dict[str, tuple[int, int, np.dtype, tuple[int, ...]]], int]:
        """Return the first byte, the length, the type and the shape of each array, and the length of all."""
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {"image": ("u1", (self.size, self.size, 3))}
        if self.label is not None:
            kinds["label"] = self.label
        kinds |= {"where": ("?", ()), "indices": ("i8", ())}
        places, end = {}, 0
        for name, (kind, shape) in kinds.items():
            dtype, shape = np.dtype(kind), (self.rows, *shape)
            length = dtype.itemsize * int(np.prod(shape))
            places[name] = (end, length, dtype, shape)
            end = _round_up(end + length, _WITHIN)
        return places, end


def allocate(size: int) -> int:
    """Return a file of so many bytes in memory, which has no name and ends with the last who has it open.

    Raises:
        MemoryError: there is not as much.
    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("tat_jax")
    else:  # on a disk, by name, for a moment
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    try:
        os.ftruncate(file, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        os.close(file)
        raise MemoryError(f"{size:,} bytes to be shared by the processes that read") from error
    return file


def freeze(value: Any) -> int:
    """Return a file in memory that holds a value for other processes, which share its arrays."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(pickled), *(buffer.raw() for buffer in buffers)]
    sizes = np.array([len(parts), *map(len, parts)], np.int64)
    starts = _starts(sizes)
    file = allocate(int(starts[-1]))
    with mmap.mmap(file, 0) as memory:
        memory[: sizes.nbytes] = sizes.tobytes()
        for start, part in zip(starts, parts, strict=False):
            memory[start : start + len(part)] = part
    return file


def thaw(file: int) -> Any:
    """Return the value that a file of `freeze` holds; its arrays cannot be written."""
    memory = memoryview(mmap.mmap(file, 0, prot=mmap.PROT_READ))
    count = int(np.frombuffer(memory[:8], np.int64)[0])
    sizes = np.frombuffer(memory[: 8 * (1 + count)], np.int64)
    pickled, *buffers = (
        memory[start : start + size] for start, size in zip(_starts(sizes).tolist(), sizes[1:], strict=False)
    )
    return pickle.loads(pickled, buffers=buffers)


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Return where parts begin that follow their number and their sizes, and where the last one ends."""
    lengths = -(-sizes[1:] // _WITHIN) * _WITHIN
    return _round_up(sizes.nbytes, _WITHIN) + np.concatenate([[0], np.cumsum(lengths)])


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
