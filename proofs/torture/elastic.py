"""A run that goes on with other devices, other threads, another config."""

import json
import signal
import tempfile
from pathlib import Path

from proofs import rounding
from proofs.program import logged
from proofs.torture.fault import Fault, judge
from proofs.torture.small_run import CLASSIFICATION, Miniature, Run, contents, finish, rows

_TAKEN = {
    "--config.epochs=3": "epochs: 2 there, 3 now",
    "--config.losses.cross_entropy.weight=0.2": "losses.cross_entropy.weight: 0.1 there, 0.2 now",
}
_REFUSED = {
    "--config.batch_size=8": "batch_size: 16 there, 8 now",
    "--config.student.width=8": "student.width: 4 there, 8 now",
    "--config.seed=1": "seed: 0 there, 1 now",
}


def faults() -> list[Fault]:
    """Move a run from 8 devices to 2 and to 1, and change its config."""
    with tempfile.TemporaryDirectory() as temporary:
        return [device_fault(Path(temporary)), *_configs(Path(temporary))]


def device_fault(folder: Path, miniature: Miniature = CLASSIFICATION) -> Fault:
    """Move a run from 8 devices to 2 and to 1, in a folder."""
    whole, moved = folder / "whole", folder / "moved"
    group = f"--config.bn_group={miniature.batch_size // 8}"
    options = (rounding.RATE, "--config.epochs=4", group)
    finish(whole, *options, miniature=miniature, devices=8)
    for devices, threads, until in ((8, 2, 4), (2, 0, 11)):
        threads_of_it = f"--config.data.threads={threads}"
        run = Run(moved, *options, threads_of_it, miniature=miniature, devices=devices)
        _stop_after(run, until)
    finish(moved, *options, "--config.data.threads=3", miniature=miniature, devices=1)
    error = rounding.largest_relative_error(logged(moved), logged(whole))
    differ = f"losses differ by {error:.1e} at most"
    wrong = [differ] if error > rounding.SINGLE else []
    name = f"8 devices, then 2, then 1; 2 threads, 0, 3{miniature.name}"
    return judge(name, 2, wrong, f"nothing; {differ}")


def _stop_after(run: Run, steps: int) -> None:
    run.wait_until(lambda: " devices " in run.output and len(logged(run.folder)) >= steps, f"step {steps}")
    run.process.send_signal(signal.SIGTERM)
    run.wait()


def _configs(folder: Path) -> list[Fault]:
    run = folder / "configs"
    finish(run, "--config.epochs=2")
    before = contents(run)
    wrong = []
    for option, difference in _REFUSED.items():
        refused = Run(run, "--config.epochs=2", option)
        if refused.wait() != 1 or difference not in refused.output or "Traceback" in refused.output:
            wrong.append(f"{option}: {refused.output[-300:]}")
    if contents(run) != before:
        wrong.append("something was written")
    taken = finish(run, *_TAKEN)
    missing = [difference for difference in _TAKEN.values() if difference not in taken]
    kept = json.loads((run / "config_until_step10.json").read_text())["epochs"] == 2
    if not kept or rows(run)[-1]["epoch"] != 3:
        missing.append("the config before, or the third epoch")
    return [
        judge("another batch size, network, seed", len(_REFUSED), wrong, "nothing; refused"),
        judge("more epochs and another weight", 1, missing, "nothing; shown and taken"),
    ]
