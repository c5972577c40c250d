"""How predictions are written: for each task a table or pictures, computed from logits on the devices."""

import csv
import functools
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer

from tat_jax import paths, sharding
from tat_jax.batch import Batch
from tat_jax.data.unlabelled import UnlabelledFolder
from tat_jax.networks import Network

_MOST = 5  # classes of a line


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
        self._classes: list[str] | None = network.usage.get("classes")
        self._colours = network.usage.get("colours")
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

    def _name(self, value: int) -> str:
        return self._classes[value] if self._classes else str(value)


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
        classes, probabilities = (np.asarray(of_all) for of_all in found)
        for row in rows.tolist():
            line = [self._source.path(first + row)]
            for value, probability in zip(classes[row].tolist(), probabilities[row].tolist(), strict=True):
                line += [self._name(value), f"{probability:.6f}"]
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


# By the names of the tasks.
WRITERS: dict[str, type[Writer]] = {"classification": Table}
