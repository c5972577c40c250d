"""How predictions are written: for each task a table or pictures, computed from logits on the devices."""

import csv
import functools
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer, UInt8
from PIL import Image

from tat_jax import overlays, paths, sharding
from tat_jax.batch import Batch
from tat_jax.data.unlabelled import UnlabelledFolder
from tat_jax.networks import Network
from tat_jax.tasks import original_size

LABELS, OVERLAYS = "labels", "overlays"  # folders
_MOST = 5  # classes of a line
_JPEG_SIDE = 65_500  # pixels, the most that a JPEG has


class Writer(ABC):
    """Writes the predictions of a folder of images.

    Args:
        out: the folder where they go.
        source: the images.
        network: knows what its classes are called.
        decode: an image from its file and the name that errors call it.
        mesh: the devices.

    Raises:
        OSError: `out` cannot be written.
    """

    def __init__(
        self,
        out: Path,
        source: UnlabelledFolder,
        network: Network,
        decode: Callable[[bytes, str], np.ndarray],
        mesh: Mesh,
    ):
        self._out, self._source, self._decode, self._mesh = out, source, decode, mesh
        self._usage = network.usage
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write in {out}: {error.strerror}") from None
        if not os.access(out, os.W_OK):
            raise OSError(f"cannot write in {out}: let this user write there, or choose another --out")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    @abstractmethod
    def compute(self, logits: Array, on_devices: Batch, batch: Batch) -> Any:
        """Start on the devices what is to be written of a batch, and return it.

        Args:
            logits: of the batch, split over the devices.
            on_devices: the batch likewise; its labels are the images' heights and widths.
            batch: this process's rows of it.
        """

    @abstractmethod
    def write(self, first: int, rows: Integer[np.ndarray, " rows"], found: Any) -> None:
        """Write what was computed of a batch.

        Args:
            first: the index of the image in its first row.
            rows: of the whole batch that are images.
            found: by `compute`.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def finish(self) -> str:
        """Write what is left, and say what lies where."""


class Table(Writer):
    """Write `predictions.csv`: of each image the five classes of the highest logits, with probabilities."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._lines: list[list[str]] = []

    def compute(self, logits: Array, on_devices: Batch, batch: Batch) -> Any:
        """Return the most likely classes, and how likely the network takes them to be.

        Raises:
            ValueError: the network gives something else than a logit for each class.
        """
        if logits.ndim != 2:
            raise ValueError(f"logits of an image are {list(logits.shape[1:])}, not one for each class")
        return _jit_most_likely(self._mesh)(logits)

    def write(self, first: int, rows: Integer[np.ndarray, " rows"], found: Any) -> None:
        """Keep a line for each image."""
        if jax.process_index() > 0:
            return
        names = self._usage.get("classes")
        classes, probabilities = (np.asarray(of_all) for of_all in found)
        for row in rows.tolist():
            line = [self._source.path(first + row)]
            for value, probability in zip(classes[row].tolist(), probabilities[row].tolist(), strict=True):
                line += [names[value] if names else str(value), f"{probability:.6f}"]
            self._lines.append(line)

    def finish(self) -> str:
        """Write the table, whole or not at all."""
        path = self._out / "predictions.csv"
        if jax.process_index() == 0:
            most = len(self._lines[0]) // 2
            header = [f"{what}_{i}" for i in range(1, most + 1) for what in ("class", "probability")]
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows([["path", *header], *self._lines])
            paths.write(path, text.getvalue().encode("utf-8", "surrogateescape"))  # as files are named
        return f"the most likely classes are in {path}"


@functools.cache
def _jit_most_likely(mesh: Mesh) -> jax.stages.Wrapped:
    def most_likely(
        logits: Float[Array, "batch classes"],
    ) -> tuple[Int[Array, "batch most"], Float[Array, "batch most"]]:
        # Of equal logits the lower class comes first, as in the measures; of probabilities more are equal.
        _, classes = jax.lax.top_k(logits, min(_MOST, logits.shape[1]))
        probabilities = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        return classes, jnp.take_along_axis(probabilities, classes, axis=1)

    return jax.jit(most_likely, out_shardings=sharding.replicated(mesh))


class LabelMaps(Writer):
    """Write the class of each pixel as the images have their sizes: `labels/….png` and `overlays/….jpg`.

    A label map is a PNG of 8 bits whose values are the classes, and whose palette their colours: those of the
    data, or VOC's. Files are called like the images but for the ending; where two images differ in that
    alone, all keep theirs before the new one.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        colours = self._usage.get("colours")
        self._palette = overlays.palette(len(colours or ()), colours and np.array(colours, np.uint8))
        names = [self._source.path(index) for index in range(len(self._source))]
        stems = [os.path.splitext(name)[0] for name in names]
        self._names = stems if len(set(stems)) == len(stems) else names
        self._pool = ThreadPoolExecutor()
        self._pending: list[Future[None]] = []

    def __exit__(self, *error: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def compute(self, logits: Array, on_devices: Batch, batch: Batch) -> Any:
        """Return the label maps, the images' sizes and the first row of this process.

        Raises:
            ValueError: the network gives something else than a logit for each pixel and class.
        """
        if logits.ndim != 4:
            raise ValueError(
                f"logits of an image are {list(logits.shape[1:])}, not height, width and classes"
            )
        sizes = np.array(batch.label)[:, 0]
        largest = sizes.max(0)
        if jax.process_count() > 1:
            largest = multihost_utils.process_allgather(largest).max(0)
        # A power of two, so that images of any sizes have a few programs.
        rows, columns = (1 << max(int(side) - 1, 0).bit_length() for side in largest)
        maps = _jit_class_maps(self._mesh)(logits, on_devices.label, (rows, columns))
        return maps, sizes, jax.process_index() * len(sizes)

    def write(self, first: int, rows: Integer[np.ndarray, " rows"], found: Any) -> None:
        """Begin to write this process's label maps of a batch, when those of the batch before are written."""
        self._wait()
        maps, sizes, first_row = found
        wanted = set(rows.tolist())
        for shard in maps.addressable_shards:
            start = shard.index[0].start or 0
            for row, label in enumerate(np.asarray(shard.data), start):
                if row in wanted:
                    height, width = sizes[row - first_row]
                    self._pending.append(
                        self._pool.submit(self._write_one, first + row, label[:height, :width])
                    )

    def finish(self) -> str:
        """Wait until all is written."""
        self._wait()
        return f"label maps are in {self._out / LABELS}, over their images in {self._out / OVERLAYS}"

    def _wait(self) -> None:
        pending, self._pending = self._pending, []
        for written in pending:
            written.result()

    def _write_one(self, index: int, label: UInt8[np.ndarray, "height width"]) -> None:
        name = self._names[index]
        indexed = Image.fromarray(label)
        indexed.putpalette(self._palette.tobytes())
        paths.write(self._out / LABELS / f"{name}.png", _encoded(indexed, "PNG"))
        image = self._decode(*self._source.file(index))
        over = Image.fromarray(overlays.overlay(image, label, self._palette))
        over.thumbnail((_JPEG_SIDE, _JPEG_SIDE))
        paths.write(self._out / OVERLAYS / f"{name}.jpg", _encoded(over, "JPEG", quality=90))


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def _jit_class_maps(mesh: Mesh) -> jax.stages.Wrapped:
    def class_maps(logits: Array, sizes: Int[Array, "batch 1 2"], canvas: tuple[int, int]) -> Array:
        return original_size.class_maps(logits, (sizes[:, 0, 0], sizes[:, 0, 1]), canvas)

    return jax.jit(class_maps, static_argnums=2, out_shardings=sharding.batched(mesh))


# By the names of the tasks.
WRITERS: dict[str, type[Writer]] = {"classification": Table, "segmentation": LabelMaps}
