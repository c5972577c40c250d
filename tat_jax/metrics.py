"""Measurements on their way out: a JSON line and TensorBoard events per row, and the progress bar."""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from tqdm.auto import tqdm

Row = dict[str, float]
_UNSEEN = contextlib.suppress(OSError, ValueError)  # of streams: gone, closed, or without a character


class MetricWriter:
    """Append rows to `folder/metrics.jsonl` and TensorBoard events beside it.

    Rows later than `step`, which a run that was cut off left behind, are removed first.

    Args:
        folder: the run's folder.
        step: the step from which the run continues.
        evaluated: keep the evaluation of that step, too, which else is done again.
        active: write at all; of several processes only one does.
    """

    def __init__(self, folder: Path, step: int, *, evaluated: bool = True, active: bool = True):
        self._folder, self._step, self._active = folder, step, active
        if not active:
            return
        path = folder / "metrics.jsonl"
        kept = [row for row in read_rows(folder) if row["step"] <= step]
        if not evaluated:
            kept = [row for row in kept if row["step"] < step or not is_evaluation(row)]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._lines = path.open("ab", buffering=0)  # nothing stays behind that a full disk would refuse again

    @functools.cached_property
    def _events(self) -> Any:
        # Imported with the first row, when devices are at work: it imports PyTorch where that is installed.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        # Not SummaryWriter, whose thread would meet a full disk alone.
        events = EventsWriter(str(self._folder / "events"))
        if self._step:  # what was logged after it is void
            start = SessionLog(status=SessionLog.START)
            events.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=start))
        return events

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            self._lines.close()
        if "_events" in self.__dict__:  # something was written
            with contextlib.suppress(OSError):  # of a full disk, which `write` has told
                self._events.close()

    def sync(self) -> None:
        """Wait until what was written lies on the disk, so that no checkpoint has more steps than its log."""
        if self._active:
            os.fsync(self._lines.fileno())

    def write(self, step: int, row: Row) -> None:
        """Write one row, as in `{"train/loss": 1.5}`."""
        if not self._active:
            return
        self._lines.write(json.dumps({"step": step, **row}).encode() + b"\n")
        self._write_event(step, row)

    def _write_event(self, step: int, row: Row) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._events.flush()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run so far, without one that was cut off while it was written.

    Raises:
        ValueError: a line is no row; it is named.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number} is damaged: mend or remove it; {line[:60]!r}") from None
    return rows


def is_evaluation(row: Mapping[str, Any]) -> bool:
    """Return whether a row holds what an evaluation measured."""
    return any(name.startswith("eval/") for name in row)


def last_and_best(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Any]:
    """Return the rows of the `last` evaluation and of the `best` by a measure: of equal ones, the later."""
    evaluated = [row for row in rows if measure in row]
    return {"last": evaluated[-1], "best": max(evaluated, key=lambda row: (row[measure], row["step"]))}


def progress(
    total: int, *, initial: int = 0, description: str, leave: bool = True, show: bool = True
) -> tqdm:
    """Return a bar that counts images: done, images/s and the time left.

    Where nobody watches, as in a log file, it writes a line a minute instead of ten a second.
    """
    return _Bar(
        total=total,
        initial=initial,
        desc=description,
        unit=" images",
        leave=leave,
        disable=not show or sys.stderr is None,
        smoothing=0.05,
        **_pace(),
    )


def progress_of_bytes(total: int, *, description: str) -> tqdm:
    """Return a bar that counts bytes."""
    return _Bar(total=total or None, desc=description, unit="B", unit_scale=True, **_pace())


def _pace() -> dict[str, Any]:
    seconds = 0.1 if sys.stderr and sys.stderr.isatty() else 60
    return {"mininterval": seconds, "maxinterval": max(10, seconds), "dynamic_ncols": True}


class _Bar(tqdm):
    """A bar that may lose whoever watches it: the work that it counts goes on."""

    def display(self, *arguments: Any, **options: Any) -> Any:
        with _UNSEEN:
            return super().display(*arguments, **options)

    def close(self) -> None:
        with _UNSEEN:
            super().close()

    @classmethod
    def write(cls, *arguments: Any, **options: Any) -> None:
        with _UNSEEN:
            super().write(*arguments, **options)


class StepLog:
    """Log each step's measurements one step late, so that the host never waits for the device.

    Args:
        writer: takes the mean of `every` steps as a row.
        bar: shows each step.
        every: steps a row.
        terms: the names of the terms of the loss, which the bar shows and which must be finite.
        describe: says what went into a step, for errors.
        leave_out: how many steps may be not finite.
        position: of a log that is to be continued.
    """

    def __init__(
        self,
        writer: MetricWriter,
        bar: tqdm,
        every: int,
        *,
        terms: Sequence[str],
        describe: Callable[[int], str],
        leave_out: int = 0,
        position: Mapping[str, Any] | None = None,
    ):
        self._writer, self._bar, self._every = writer, bar, every
        self._losses = (*terms, "loss")
        self._describe, self._leave_out = describe, leave_out
        self._pending: tuple[int, Mapping[str, Any], int] | None = None
        position = position or {"left_out": 0, "rows": []}
        self._left_out, self._rows = position["left_out"], list(position["rows"])
        self._images, self._since = 0, time.monotonic()

    @property
    def position(self) -> dict[str, Any]:
        """Return what continues the log: how many steps were left out, and those since the last row."""
        return {"left_out": self._left_out, "rows": list(self._rows)}  # a save writes it while steps go on

    def add(self, metrics: Mapping[str, Any], step: int, *, images: int) -> None:
        """Take the measurements of the step that led from `step` to `step` + 1 over so many images.

        Raises:
            FloatingPointError: a loss term or the gradient of the step before is not finite.
        """
        for value in metrics.values():
            value.copy_to_host_async()  # as soon as it is there, and not when it is read
        self._read()
        self._pending = step, metrics, images

    def flush(self) -> None:
        """Read the step that is still pending.

        Raises:
            FloatingPointError: as `add` does.
        """
        self._read()
        self._since, self._images = time.monotonic(), 0

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics, images), self._pending = self._pending, None
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._images += images
        self._bar.update(images)
        if wrong := self._not_finite(row):
            self._left_out += 1
            if self._left_out > self._leave_out:
                raise FloatingPointError(f"{wrong} of step {step}; {self._describe(step)}")
            self._bar.write(f"left out step {step} ({self._left_out} of {self._leave_out}): {wrong}")
        else:
            self._rows.append(row)
            shown = {name: f"{row[name]:.3g}" for name in self._losses}
            self._bar.set_postfix(shown, refresh=False)
        if (step + 1) % self._every == 0:
            means = self._means()
            means["images_per_second"] = self._images / (time.monotonic() - self._since)
            if self._leave_out:
                means["steps_left_out"] = self._left_out
            self._writer.write(step + 1, {f"train/{name}": value for name, value in means.items()})
            self._rows, self._images, self._since = [], 0, time.monotonic()

    def _means(self) -> Row:
        """Return the means since the last row; a step before a run went on with other terms lacks some."""
        names = self._rows[-1] if self._rows else {}
        values = {name: [row[name] for row in self._rows if name in row] for name in names}
        return {name: math.fsum(of_steps) / len(of_steps) for name, of_steps in values.items()}

    def _not_finite(self, row: Row) -> str:
        """Return the loss, its terms and the gradient's norm that are not finite; empty if all are."""
        names = [name for name in row if name in self._losses or name == "gradient_norm"]
        return ", ".join(f"{name} is {row[name]}" for name in names if not math.isfinite(row[name]))
