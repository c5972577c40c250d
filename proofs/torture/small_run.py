"""A run of `main.py` small enough to be interrupted often, started as users start it; what it leaves."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import r18_r34
from proofs.fidelity.devices import ROOT
from tat_jax import checkpoint
from tat_jax.metrics import read_rows

MAIN = ROOT / "main.py"
STEPS = 5  # an epoch
# A log row for each step, and a checkpoint within nearly every epoch.
_CHANGES = {
    "data.labels_per_class": 8,
    "data.image_size": 16,
    "data.eval_resize": 16,
    "student.small_images": True,
    "teacher.small_images": True,
    "student.width": 4,
    "teacher.width": 4,
    "checkpoint_minutes": 0.01,
}
OPTIONS = (
    f"--config={ROOT}/configs/r18_r34.py:smoke",
    *(f"--config.{name}={value}" for name, value in _CHANGES.items()),
)
_LIMIT = 300  # seconds after which a run counts as hanging


def small_config() -> ConfigDict:
    """Return the run's config."""
    config = r18_r34.get_config("smoke")
    config.update_from_flattened_dict(_CHANGES)
    return config


class Run:
    """One process of `main.py`.

    Args:
        folder: the run's.
        options: flags after those of `OPTIONS`.
        environment: variables besides this process's.
        prefix: a command that starts it.
        devices: how many are simulated.
        log: where its output goes; else beside its folder.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        environment: Mapping[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        devices: int = 1,
        log: Path | None = None,
    ):
        self.folder = folder
        self._log = log or folder.with_name(f"{folder.name}_{time.monotonic_ns()}.log")
        own = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
            # Read and written by all, so that only the first of a kind is compiled.
            "XDG_CACHE_HOME": str(folder.parent / "cache"),
        }
        command = [*prefix, sys.executable, str(MAIN), *OPTIONS, f"--workdir={folder}", *options]
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **own, **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Return what it has printed so far."""
        return self._log.read_text(errors="replace")

    def wait_until(self, holds: Callable[[], object]) -> bool:
        """Wait until something holds; return whether that was before the process ended.

        Raises:
            TimeoutError: neither came.
        """
        end = time.monotonic() + _LIMIT
        while time.monotonic() < end:
            if holds():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        self.process.kill()
        raise TimeoutError(f"{self.folder} hangs:\n{self.output[-3000:]}")

    def wait(self) -> int:
        """Return the code with which the process ends.

        Raises:
            TimeoutError: it does not.
        """
        self.wait_until(lambda: False)
        return self.process.wait()


def finish(folder: Path, *options: str, devices: int = 1) -> str:
    """Run to the end, and return what was printed.

    Raises:
        RuntimeError: the run fails.
    """
    run = Run(folder, *options, devices=devices)
    if code := run.wait():
        raise RuntimeError(f"{folder} ended with {code}:\n{run.output[-3000:]}")
    return run.output


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run but for their speed."""
    return [
        {name: value for name, value in row.items() if name != "train/images_per_second"}
        for row in read_rows(folder)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def differences(folder: Path, other: Path) -> list[str]:
    """Return in what two runs differ: arrays of the last and the best checkpoint bit by bit, and rows."""
    found = []
    for which in (checkpoint.last, checkpoint.best):
        ours, theirs = which(folder), which(other)
        if ours.name != theirs.name:
            found.append(f"{which.__name__} checkpoint: step {ours.name}, step {theirs.name}")
            continue
        for item in ("student", "training"):
            trees = [checkpoint.load_item(path / item) for path in (ours, theirs)]
            leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
            wrong = [path for (path, a), (_, b) in zip(*leaves, strict=True) if not np.array_equal(a, b)]
            if wrong:
                first = f"{item}{jax.tree_util.keystr(wrong[0])}"
                found.append(f"{which.__name__} checkpoint: {first} and {len(wrong) - 1} more arrays")
    if rows(folder) != rows(other):
        found.append("rows of metrics.jsonl")
    return found
