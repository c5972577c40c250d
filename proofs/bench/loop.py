"""Real training beside its bare step: what input, metrics, progress and checkpoints cost.

`python -m proofs.bench.loop [--json FILE]`. ResNet-34 → 18 at 224² and the miniature, and CIFAR-100's
ResNet-32×4 → 8×4 by KD, with random weights, on embedded digits. The bare step's batch is on the device, and
its metrics are read one step late, as in training, which saves a checkpoint every 45 seconds: 20 times as
often as by default.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
from ml_collections import ConfigDict

from proofs.bench.full_size import full_size
from proofs.bench.sidebyside import Row, compare, main
from proofs.compiled_step import compile_step
from proofs.report import announce
from tat_jax import train
from tat_jax.configs import cifar100, r18_r34
from tat_jax.data.pipeline import open_pipeline

WARM_UP = 8  # steps that do not count: the first compiles, the first row opens its files


def measure() -> list[Row]:
    """Compare at full size and in miniature."""
    whole = full_size(on_gpu=jax.default_backend() == "gpu")
    whole.data.source = "digits"
    small = r18_r34.get_config("smoke")
    trainings = [
        ("224²", whole, 56, 0.97),
        ("miniature", small, 120, None),
        ("CIFAR-100, resnet32x4-resnet8x4, kd", _cifar(), 24, 0.95),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        for name, config, steps, bound in trainings:
            what = f"training, {name}, batch {config.batch_size}, beside its bare step"
            announce(what)
            rows.append(measure_one(what, config, steps=steps, bound=bound))
    return rows


def _cifar() -> ConfigDict:
    config = cifar100.get_config("resnet32x4-resnet8x4,kd")
    config.teacher.weights = "random"
    config.data.update({"source": "digits", "crop_padding": None})  # digits are smaller than such crops
    return config


def measure_one(
    name: str,
    config: ConfigDict,
    *,
    steps: int,
    bound: float | None,
    rounds: int = 3,
    epoch: int | None = None,
) -> Row:
    """Compare over so many steps after the warm-up.

    Args:
        name: what is measured.
        config: of the training.
        steps: that count.
        bound: the aim.
        rounds: how often.
        epoch: the images that the config trains on; None: as many digits as the steps take, 1,000 at most.
    """
    config.bn_group = None
    config.checkpoint_minutes = 0.75
    config.log_every = 4
    images = (WARM_UP + steps) * config.batch_size
    if epoch is None:
        config.data.labels_per_class = min(-(-images // 10), 100)
        epoch = 10 * config.data.labels_per_class
    config.epochs = config.eval_every = -(-images // epoch)
    return compare(
        name,
        lambda: _training(config, steps),
        _bare(config, steps),
        bound=bound,
        images=steps * config.batch_size,
        warm_up=False,
        rounds=rounds,
    )


def _training(config: ConfigDict, steps: int) -> float:
    """Train, and return the seconds between the calls of two steps so far apart."""
    calls: list[float] = []

    class Timed(train.TrainStep):
        def __call__(self, *arguments: Any) -> Any:
            calls.append(time.perf_counter())
            return super().__call__(*arguments)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(train, "TrainStep", Timed),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        train.run(config, folder)
    return _seconds(calls, steps)


def _bare(config: ConfigDict, steps: int) -> Callable[[], float]:
    """Return a function that takes so many steps on one batch, and returns their seconds."""
    data = open_pipeline(config, "train")
    program, state, others = compile_step(
        config, next(data.epoch(0)), devices=jax.device_count(), num_classes=data.source.num_classes
    )

    def call() -> float:
        nonlocal state
        calls: list[float] = []
        before = None
        for _ in range(WARM_UP + steps):
            calls.append(time.perf_counter())
            state, metrics = program(state, *others)
            jax.device_get(before)
            before = metrics
        return _seconds(calls, steps)

    return call


def _seconds(calls: list[float], steps: int) -> float:
    return calls[WARM_UP + steps - 1] - calls[WARM_UP - 1]


if __name__ == "__main__":
    main(__doc__, measure)
