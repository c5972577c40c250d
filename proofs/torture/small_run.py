"""A run of `main.py` small enough to be interrupted often, started as users start it; what it leaves."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from proofs.program import Environment, Program, main_command, simulated
from tat_jax.configs import r18_r34
from tat_jax.metrics import read_rows
from tat_jax.weights import folders, store

STEPS = 5  # an epoch


class Miniature(NamedTuple):
    """One of `configs/` in small, with a log row for each step and a checkpoint within nearly every epoch.

    Attributes:
        config: its file and argument.
        batch_size: of an epoch of `STEPS` steps.
        changes: fields besides.
        name: in tables, after what was done to it; empty of the classification.
    """

    config: str
    batch_size: int
    changes: Mapping[str, Any]
    name: str = ""

    @property
    def options(self) -> list[str]:
        """Return the changes as a command line has them."""
        changes = {"batch_size": self.batch_size, **self.changes}
        return [f"--config.{name}={value}" for name, value in changes.items()]


CLASSIFICATION = Miniature(
    "r18_r34.py:smoke",
    16,
    {
        "data.labels_per_class": 8,
        "data.image_size": 16,
        "data.eval_resize": 16,
        "student.small_images": True,
        "teacher.small_images": True,
        "student.width": 4,
        "teacher.width": 4,
        "checkpoint_minutes": 0.01,
    },
)
# With a teacher in training mode, dropout in both networks and a loss that trains.
SEGMENTATION = Miniature(
    "seg_voc_r18.py:smoke",
    32,
    {
        "data.image_size": 33,
        "teacher.architecture": "deeplab_resnet18",
        "student.width": 2,
        "teacher.width": 2,
        "losses.patch_anchor.decoder.patches": "(3,3)",
        "losses.patch_anchor.decoder.groups": 3,
        "losses.patch_anchor.decoder.anchors": "(3,3)",
        "checkpoint_minutes": 0.01,
    },
    ", segmentation",
)


def small_config() -> ConfigDict:
    """Return the config of the classification."""
    config = r18_r34.get_config("smoke")
    config.update_from_flattened_dict(CLASSIFICATION.changes)
    return config


class Run(Program):
    """One process of `main.py`.

    Args:
        folder: the run's.
        options: flags after those of the miniature.
        miniature: what is trained.
        environment: variables besides this process's.
        prefix: a command that starts it.
        devices: how many are simulated.
        log: where its output goes; else beside its folder.
        workdir: the bucket's folder of a run that lies in one; its own is where its log and its cache go.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        miniature: Miniature = CLASSIFICATION,
        environment: Environment | None = None,
        prefix: tuple[str, ...] = (),
        devices: int = 1,
        log: Path | None = None,
        workdir: str | None = None,
    ):
        self.folder = folder
        # Read and written by all, so that only the first of a kind is compiled.
        cache = {"XDG_CACHE_HOME": str(folder.parent / "cache")}
        super().__init__(
            [*prefix, *main_command(miniature.config, workdir or folder, *miniature.options, *options)],
            log or folder.with_name(f"{folder.name}_{time.monotonic_ns()}.log"),
            environment={**simulated(devices), **cache, **(environment or {})},
        )


def finish(
    folder: Path,
    *options: str,
    miniature: Miniature = CLASSIFICATION,
    devices: int = 1,
    environment: Environment | None = None,
) -> str:
    """Run to the end, and return what was printed.

    Raises:
        RuntimeError: the run fails.
    """
    return Run(folder, *options, miniature=miniature, devices=devices, environment=environment).finish()


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
    for which in (folders.last, folders.best):
        ours, theirs = which(folder), which(other)
        if ours.name != theirs.name:
            found.append(f"{which.__name__} checkpoint: step {ours.name}, step {theirs.name}")
            continue
        for item in ("student", "training"):
            trees = [store.load_item(path / item) for path in (ours, theirs)]
            leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
            wrong = [path for (path, a), (_, b) in zip(*leaves, strict=True) if not np.array_equal(a, b)]
            if wrong:
                first = f"{item}{jax.tree_util.keystr(wrong[0])}"
                found.append(f"{which.__name__} checkpoint: {first} and {len(wrong) - 1} more arrays")
    if rows(folder) != rows(other):
        found.append("rows of metrics.jsonl")
    return found
