"""What the training step and the TaT loss take, by the size of what they are given: for `bench.growth`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from proofs.bench.full_size import full_size
from proofs.bench.loss import compile_loss
from proofs.bench.sidebyside import timed
from proofs.compiled_step import CompiledStep, blank_rows, compile_step
from proofs.report import announce
from tat_jax.losses import tat_loss

BATCHES = (4, 8, 16, 32)
CROPS = (64, 128, 224, 320)
CLASSES = (10, 1_000, 10_000, 21_841)
SIDES = (7, 14, 28, 56, 64, 96, 129)
_BATCH = 8  # where it is not the batch that grows

Figures = dict[str, float]


def by_batch() -> list[Figures]:
    """Measure the step on one device: memory besides arguments, time, operations and bytes an image."""
    rows = []
    for batch in BATCHES:
        announce(f"batch {batch}")
        step = _compile(_config(batch))
        cost = step.program.cost_analysis()
        rows.append(
            {
                "batch": batch,
                "MiB": _temporaries(step.program),
                "ms": _milliseconds(step.repeated()),
                "GFLOP an image": cost["flops"] / batch / 1e9,
                "MB moved an image": cost["bytes accessed"] / batch / 1e6,
            }
        )
    return rows


def by_crop() -> list[Figures]:
    """Read the same from the program of other image sizes, without its time."""
    rows = []
    for side in CROPS:
        announce(f"crops of {side}²")
        config = _config(_BATCH)
        config.data.image_size = side
        program = _compile(config).program
        rows.append(
            {
                "crop": side,
                "pixels": side**2,
                "MiB": _temporaries(program),
                "GFLOP an image": program.cost_analysis()["flops"] / _BATCH / 1e9,
            }
        )
    return rows


def by_classes() -> list[Figures]:
    """Read from the program of other numbers of classes what it takes, and what it is called with."""
    rows = []
    for classes in CLASSES:
        announce(f"{classes:,} classes")
        program = _compile(_config(_BATCH), classes).program
        arguments = program.memory_analysis().argument_size_in_bytes
        rows.append({"classes": classes, "MiB": _temporaries(program), "arguments, MiB": arguments / 2**20})
    return rows


def by_positions() -> list[Figures]:
    """Measure the TaT loss with its gradients, one image of 256 channels, one head, float32."""
    rows = []
    rng = np.random.default_rng(0)
    for side in SIDES:
        announce(f"{side**2:,} positions")
        arrays = [jnp.asarray(rng.normal(0, 0.3, (1, side, side, 256)), jnp.float32) for _ in range(4)]
        program = compile_loss(tat_loss, arrays, heads=1)
        ms = _milliseconds(program, *arrays)
        rows.append({"positions": side**2, "MiB": _temporaries(program), "ms": ms})
    return rows


def _config(batch: int) -> ConfigDict:
    config = full_size(on_gpu=False)
    config.batch_size = batch
    return config


def _compile(config: ConfigDict, classes: int = 1000) -> CompiledStep:
    return compile_step(config, blank_rows(config), num_classes=classes)


def _temporaries(program: Any) -> float:
    return program.memory_analysis().temp_size_in_bytes / 2**20


def _milliseconds(call: Callable[..., object], *arguments: jax.Array) -> float:
    """Return the median of three calls, after one that does not count."""
    run = timed(lambda: jax.block_until_ready(call(*arguments)))
    run()
    return 1000 * float(np.median([run() for _ in range(3)]))
