"""One host of a pod is lost, hangs or is told to leave: when the others end, and what that costs.

The hosts are processes of this machine. All are started again each time, and continue from the last
checkpoint.
"""

import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proofs.crowd import Crowd, Ended
from proofs.program import logged
from proofs.report import announce
from proofs.torture import hosts
from proofs.torture.fault import Fault, judge
from proofs.torture.small_run import differences
from tat_jax.metrics import read_rows
from tat_jax.weights import folders

_LATE = 90.0  # seconds after which the others must have ended: 40 until one counts as lost, and some
_MINUTES = (0.02, 0.05, 0.1)  # from one checkpoint to the next
_ENDLESS = 10_000  # epochs
_TOLD = "SIGTERM to one of {} alone, all run again"
_CONTINUES = ("the same command continues from there",)
# This code's where the connection breaks, JAX's where nothing is heard any more, and that of Gloo, by which
# CPUs alone send, where it breaks in the middle of an array.
_REASONS = ("lost one of the", "the JAX distributed service detected fatal errors", "gloo::EnforceNotMet")


class Hit(NamedTuple):
    """What a signal to one process did.

    Attributes:
        lost: steps that had been logged after the last checkpoint.
        seconds: until the others had ended.
        wrong: what must not be.
    """

    lost: int
    seconds: float
    wrong: list[str]


class Pod:
    """A run of so many processes in a folder, to be hit again and again.

    Args:
        folder: of the run, its images and what processes leave.
        count: of processes.
        minutes: from one checkpoint to the next.
        seed: of the moments at which it is hit.
    """

    def __init__(self, folder: Path, count: int, minutes: float, *, seed: int = 0):
        self._folder, self._count, self.run = folder, count, folder / "run"
        self._minutes, self._starts = minutes, 0
        self._rng = np.random.default_rng(seed)
        hosts.make_images(folder / "images")

    def start(self, epochs: int = _ENDLESS) -> Crowd:
        """Start all processes."""
        self._starts += 1
        # A rate that is the same at every step, whatever the epochs, and an evaluation after the last.
        fields = {"epochs": epochs, "eval_every": _ENDLESS, "optimizer.milestones": "()"}
        minutes = {"checkpoint_minutes": self._minutes}
        run = hosts.arguments(self._folder / "images", self.run, **fields, **minutes)
        return Crowd(self._folder / f"start{self._starts}", self._count, *run)

    def finish(self, epochs: int) -> list[str]:
        """Run to the end of an epoch, and return what went wrong."""
        crowd = self.start(epochs)
        return [f"process {i}: {crowd.said(i)[-300:]}" for i, of in enumerate(crowd.ended()) if of.code]

    def epoch(self) -> int:
        """Return the epoch after the one that it is in."""
        return self._last_row() // hosts.STEPS + 1

    def hit(self, victim: int, number: int) -> Hit:
        """Start, send one process a signal when a checkpoint and some steps have been made, and wait."""
        announce(f"{signal.Signals(number).name} to process {victim} of {self._count}")
        row, saved = self._last_row(), self._saved()
        crowd = self.start()
        try:
            crowd.wait_until(lambda: self._last_row() != row and self._saved() > saved, "a checkpoint")
            time.sleep(60 * self._minutes * self._rng.uniform(0.5, 1.5))
            crowd.signal(victim, number)
            sent = time.monotonic()
            others = [i for i in range(self._count) if i != victim]
            awaited = others if number == signal.SIGSTOP else range(self._count)
            while any(map(crowd.is_alive, awaited)) and time.monotonic() - sent < _LATE:
                time.sleep(0.1)
            for index in filter(crowd.is_alive, range(self._count)):
                crowd.signal(index, signal.SIGKILL)
            ended = crowd.ended()
        finally:
            crowd.kill()
        seconds = max(ended[i].at for i in others) - sent
        lost = self._last_row() - self._saved()
        return Hit(lost, seconds, _wrong(crowd, ended, others, number, seconds))

    def speed(self) -> float:
        """Return the median of its steps a second."""
        return float(np.median(logged(self.run, "train/images_per_second"))) / hosts.BATCH

    def _saved(self) -> int:
        return max(folders.steps(self.run), default=0)

    def _last_row(self) -> int:
        rows = read_rows(self.run)
        return int(rows[-1]["step"]) if rows else 0


def signal_faults(count: int = 4) -> list[Fault]:
    """Kill, stop and terminate one of so many processes, and compare the run with one that met nothing."""
    hits = {
        f"SIGKILL to one of {count}, all run again": [(count - 3, signal.SIGKILL), (0, signal.SIGKILL)],
        f"one of {count} hangs (SIGSTOP), all run again": [(1, signal.SIGSTOP), (0, signal.SIGSTOP)],
        _TOLD.format(count): [(count - 1, signal.SIGTERM), (0, signal.SIGTERM)],
    }
    with tempfile.TemporaryDirectory() as temporary:
        whole, hit = (Pod(Path(temporary) / name, count, _MINUTES[1]) for name in ("whole", "hit"))
        found = {name: [hit.hit(*victim) for victim in victims] for name, victims in hits.items()}
        epochs, speed = hit.epoch(), hit.speed()
        wrong = [*hit.finish(epochs), *whole.finish(epochs)] or differences(hit.run, whole.run)
    for of in found[_TOLD.format(count)]:
        wrong += [f"{of.lost} steps lost"] * (of.lost > 0)
    return [_judge(name, of, speed, wrong) for name, of in found.items()]


def interval_faults(minutes: Sequence[float] = _MINUTES, *, count: int = 4, times: int = 3) -> list[Fault]:
    """Kill one of so many processes again and again, with a checkpoint every so many minutes."""
    found = []
    for interval in minutes:
        with tempfile.TemporaryDirectory() as temporary:
            pod = Pod(Path(temporary), count, interval)
            hits = [pod.hit(1 + i % (count - 1), signal.SIGKILL) for i in range(times)]
            speed = pod.speed()
        name = f"SIGKILL to one of {count}, a checkpoint every {60 * interval:.2g} s"
        found.append(_judge(name, hits, speed))
    return found


def _judge(name: str, hits: Sequence[Hit], speed: float, wrong: Sequence[str] = ()) -> Fault:
    """Return the line of hits of a kind, to a run of so many steps a second."""
    wrong = [*wrong, *(line for hit in hits for line in hit.wrong)]
    lost = [hit.lost for hit in hits]
    least = f"{min(lost)} to " if min(lost) < max(lost) else ""
    anew = f"{least}{max(lost)} steps computed anew, of {speed:.1f} a second"
    ended = f"the others ended within {max(hit.seconds for hit in hits):.0f} s"
    return judge(name, len(hits), wrong, f"nothing; {anew if max(lost) else 'no step'}; {ended}")


def _wrong(
    crowd: Crowd, ended: Sequence[Ended], others: Sequence[int], number: int, seconds: float
) -> list[str]:
    """Return what must not be: processes that go on, end as if nothing were, or give no reason."""
    wrong = [f"others ended after {seconds:.0f} s"] if seconds > _LATE else []
    told = number == signal.SIGTERM
    for i in others:
        code, said = ended[i].code, crowd.said(i)
        if code != 128 + number if told else code == 0:
            wrong.append(f"process {i}: code {code}")
        if "Traceback" in said:
            wrong.append(f"process {i}: a stack trace")
        if not any(reason in said for reason in (_CONTINUES if told else _REASONS)):
            wrong.append(f"process {i} gives no reason: {said[-200:].strip()!r}")
    return wrong
