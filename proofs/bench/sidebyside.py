"""Ours and a rival, measured in turns."""

import time
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from proofs.command import add_json, make_parser, publish
from proofs.report import table

# Seconds before each call that is timed: PyTorch's threads go on spinning for a while after its own.
_PAUSE = 0.4
# At a time: waiting for each step would let a GPU idle, which works while the next steps are called.
GPU_STEPS = 20


def shared_device() -> str:
    """Return where both sides compute, as PyTorch calls it: a GPU if both have one."""
    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


class Row(NamedTuple):
    """One comparison.

    Attributes:
        name: what was measured.
        ours: the median of ours.
        rival: the median of the rival's.
        ratio: by how much ours is better; above 1 it is.
        bound: the aim: of times the least ratio, of memory the most of ours; None is no aim.
        unit: of `ours` and `rival`.
        spread: the quartiles of the ratios of the rounds; both are the ratio where there is nothing random.
    """

    name: str
    ours: float
    rival: float
    ratio: float
    bound: float | None
    unit: str
    spread: tuple[float, float]

    @property
    def holds(self) -> bool:
        """Return whether the bound is reached, or there is none."""
        if self.bound is None:
            return True
        return self.ours <= self.bound if self.unit == "MiB" else self.ratio >= self.bound

    def cells(self) -> dict[str, str]:
        """Return what stands in the line, by heading."""
        aim, mark = "", ""
        if self.bound is not None:
            aim = f"{'≤' if self.unit == 'MiB' else '≥'} {self.bound:g}"
            mark = "reached" if self.holds else "MISSED"
        return {
            "measured": self.name,
            "ours": f"{self.ours:.3g}",
            "rival": f"{self.rival:.3g}",
            "unit": self.unit,
            "ratio": f"{self.ratio:.2f}",
            "quartiles": f"{self.spread[0]:.2f}–{self.spread[1]:.2f}",
            "aim": aim,
            "": mark,
        }


def compare_times(
    name: str, ours: Callable[[], object], rival: Callable[[], object], *, bound: float | None, **kwargs: Any
) -> Row:
    """Compare how long calls of ours and the rival's take; see `compare`."""
    return compare(name, timed(ours), timed(rival), bound=bound, **kwargs)


def compare(
    name: str,
    ours: Callable[[], float],
    rival: Callable[[], float],
    *,
    bound: float | None,
    images: int | None = None,
    warm_up: bool = True,
    rounds: int = 5,
    seconds: float = 20,
) -> Row:
    """Call ours and the rival in turns, each of which returns its seconds.

    The order changes from round to round. There are `rounds` of them, or as many as `seconds` allow, at
    least three; for `warm_up`, one call of each before does not count. The row is in ms a call, or in
    images/s if a call does so many `images`.
    """
    if warm_up:
        ours()
        rival()
    times: dict[Callable[[], float], list[float]] = {ours: [], rival: []}
    began = time.monotonic()
    for i in range(rounds):
        for call in (ours, rival) if i % 2 else (rival, ours):
            time.sleep(_PAUSE)
            times[call].append(call())
        if i >= 2 and time.monotonic() - began > seconds:
            break
    ratios = np.array(times[rival]) / np.array(times[ours])
    low, high = np.quantile(ratios, (0.25, 0.75))
    our, their = float(np.median(times[ours])), float(np.median(times[rival]))
    spread = (float(low), float(high))
    if images is None:
        return Row(name, 1000 * our, 1000 * their, their / our, bound, "ms", spread)
    return Row(name, images / our, images / their, their / our, bound, "images/s", spread)


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that calls, and returns the seconds that it took."""

    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def compare_bytes(name: str, ours: int, rival: int, *, bound: float | None) -> Row:
    """Compare two amounts of memory, in MiB."""
    ratio = rival / ours
    return Row(name, ours / 2**20, rival / 2**20, ratio, bound, "MiB", (ratio, ratio))


def main(
    description: str | None,
    measure: Callable[..., list[Row]],
    *,
    add_options: Callable[[ArgumentParser], None] | None = None,
) -> None:
    """Measure, print the table and, for `--json FILE`, write the rows there.

    The options that `add_options` adds are `measure`'s arguments.
    """
    parser = make_parser(description)
    if add_options:
        add_options(parser)
    add_json(parser)
    options = vars(parser.parse_args())
    to = options.pop("json")
    rows = measure(**options)
    publish([table(rows)], [row._asdict() for row in rows], to)
