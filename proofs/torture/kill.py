"""SIGKILL at random moments of a run that the same command starts again each time."""

import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from proofs.program import Environment
from proofs.torture.fault import Fault, judge
from proofs.torture.small_run import CLASSIFICATION, STEPS, Miniature, Run, differences, finish
from tat_jax.metrics import is_evaluation, read_rows
from tat_jax.weights import folders

# At each a random delay, in seconds, up to about as long as the phase lasts.
_PHASES = {"start-up": 4.0, "a step": 0.3, "a save": 0.05, "an evaluation": 0.3}
PHASES = tuple(_PHASES)


def faults(
    phases: Sequence[str] = PHASES * 5,
    *,
    epochs: int = 40,
    seed: int = 0,
    miniature: Miniature = CLASSIFICATION,
    environment: Environment | None = None,
) -> list[Fault]:
    """Kill a run once in each of `phases`, finish it, and compare it with one that nothing interrupted.

    All kills are of one run, so that each is survived only if all are.
    """
    rng = np.random.default_rng(seed)
    option = f"--config.epochs={epochs}"
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        finish(whole, option, miniature=miniature, environment=environment)
        repeated = 0
        for phase in phases:
            run = Run(killed, option, miniature=miniature, environment=environment)
            run.wait_until(_begins(phase, run), phase)
            time.sleep(rng.uniform(0, _PHASES[phase]))
            run.process.send_signal(signal.SIGKILL)
            run.wait()
            repeated = max(repeated, _last_step(killed) - _saved_step(killed))
        finish(killed, option, miniature=miniature, environment=environment)
        different = differences(killed, whole)
        evaluated = [row["epoch"] for row in read_rows(killed) if is_evaluation(row)]
        steps = [row["step"] for row in read_rows(killed) if "train/loss" in row]
        if evaluated != list(range(1, epochs + 1)):
            different.append(f"epochs evaluated: {evaluated}")
        if steps != list(range(1, epochs * STEPS + 1)):
            different.append(f"steps logged: {steps}")
    lost = f"nothing; at most {repeated} steps computed anew"
    return [
        judge(f"SIGKILL in {phase}, run again{miniature.name}", phases.count(phase), different, lost)
        for phase in dict.fromkeys(phases)
    ]


def _begins(phase: str, run: Run) -> Callable[[], object]:
    """Return what tells that a phase of a run that was just started has begun."""
    folder = run.folder
    saved = _saved_step(folder)

    def at_work() -> bool:
        return " devices " in run.output and _last_step(folder) > saved

    match phase:
        case "start-up":
            return lambda: True
        case "a step":
            return at_work
        case "a save":
            return lambda: at_work() and any((folder / "checkpoints").glob("*tmp*"))
        case _:
            return lambda: at_work() and _last_step(folder) % STEPS == 0 and "epoch" not in _last_row(folder)


def _last_row(folder: Path) -> dict[str, float]:
    rows = read_rows(folder)
    return rows[-1] if rows else {}


def _last_step(folder: Path) -> int:
    return int(_last_row(folder).get("step", 0))


def _saved_step(folder: Path) -> int:
    return max(folders.steps(folder), default=0)
