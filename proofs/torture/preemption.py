"""SIGTERM and Ctrl-C: how soon a run ends, with what code, and that the same command continues it exactly."""

import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from proofs.torture.fault import Fault, judge
from proofs.torture.small_run import CLASSIFICATION, Miniature, Run, differences, finish
from tat_jax.metrics import read_rows

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_GRACE = 30.0  # seconds


def faults(
    signals: Sequence[int] = SIGNALS * 4,
    *,
    epochs: int = 24,
    seed: int = 0,
    miniature: Miniature = CLASSIFICATION,
) -> list[Fault]:
    """Stop a run by each of `signals` at a random moment, once more by two, and finish it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background starts deaf to Ctrl-C
    rng = np.random.default_rng(seed)
    option = f"--config.epochs={epochs}"
    with tempfile.TemporaryDirectory() as temporary:
        whole, stopped = Path(temporary) / "whole", Path(temporary) / "stopped"
        finish(whole, option, miniature=miniature)
        found = []
        for number in dict.fromkeys(signals):
            waits, wrong = [], []
            for _ in range(signals.count(number)):
                run = _at_work(stopped, option, miniature)
                time.sleep(rng.uniform(0, 0.5))
                waits.append(_seconds_to_end(run, number))
                wrong += _said_wrongly(run, number)
            wrong += [f"{wait:.0f} s" for wait in waits if wait > _GRACE]
            ended = f"ended within {max(waits):.1f} s"
            found.append((f"{signal.Signals(number).name}, run again", len(waits), ended, wrong))
        run = _at_work(stopped, option, miniature)
        run.process.send_signal(signal.SIGINT)
        run.wait_until(lambda: "once more stops at once" in run.output, "it says how to stop at once")
        seconds = _seconds_to_end(run, signal.SIGINT)
        wrong = [] if run.process.returncode == -signal.SIGINT and seconds < 1 else [f"{seconds:.1f} s"]
        found.append(("Ctrl-C twice, run again", 1, f"ended within {seconds:.2f} s of the second", wrong))
        finish(stopped, option, miniature=miniature)
        different = differences(stopped, whole)
    return [
        judge(f"{name}{miniature.name}", tried, [*different, *wrong], f"nothing; {how}")
        for name, tried, how, wrong in found
    ]


def _at_work(folder: Path, option: str, miniature: Miniature) -> Run:
    """Start a run, and return it when it has taken a step."""
    before = read_rows(folder)
    run = Run(folder, option, miniature=miniature)
    run.wait_until(
        lambda: " devices " in run.output and len(read_rows(folder)) > len(before), "its first step"
    )
    return run


def _seconds_to_end(run: Run, number: int) -> float:
    began = time.monotonic()
    run.process.send_signal(number)
    run.wait()
    return time.monotonic() - began


def _said_wrongly(run: Run, number: int) -> list[str]:
    wrong = []
    if run.process.returncode != 128 + number:
        wrong.append(f"code {run.process.returncode}")
    if "the same command continues from there" not in run.output:
        wrong.append("no line says how to continue")
    return wrong
