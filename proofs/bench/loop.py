"""Real training beside its bare step: what input, metrics, progress and checkpoints cost.

`python -m proofs.bench.loop [PART …] [--json FILE]`. ResNet-34 → 18 at 224² and the miniature, on embedded
digits, and CIFAR-100's ResNet-32×4 → 8×4 by KD, on noise that is read and cropped as its images are. Weights
are random. The bare step's batch is on the device, and its metrics are read one step late, as in training,
which saves a checkpoint every 45 seconds: 20 times as often as by default.
"""

import contextlib
import io
import pickle
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from proofs.bench import cifar
from proofs.bench.full_size import full_size
from proofs.bench.sidebyside import Row, compare, main
from proofs.command import add_parts
from proofs.compiled_step import compile_step
from proofs.report import announce
from proofs.torch_cifar import CLASSES
from tat_jax import train
from tat_jax.configs import r18_r34
from tat_jax.data.pipeline import open_pipeline

WARM_UP = 8  # steps that do not count: the first compiles, the first row opens its files


def measure(parts: Sequence[str]) -> list[Row]:
    """Compare what the command line names, else all."""
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        return [PARTS[name]() for name in parts or PARTS]


def _imagenet() -> Row:
    config = full_size(on_gpu=jax.default_backend() == "gpu")
    config.data.source = "digits"
    return measure_one("224²", config, steps=56, bound=0.97)


def _miniature() -> Row:
    return measure_one("miniature", r18_r34.get_config("smoke"), steps=120, bound=None)


def _cifar() -> Row:
    steps, images = (600, 50_000) if jax.default_backend() == "gpu" else (24, 2048)
    config = cifar.config_of(cifar.PAIR, "kd")
    with tempfile.TemporaryDirectory() as folder:
        config.data.root = str(write_noise(Path(folder), images))
        return measure_one(f"CIFAR-100, {cifar.PAIR}, kd", config, steps=steps, bound=0.95, epoch=images)


def write_noise(folder: Path, images: int) -> Path:
    """Write so many images of noise, and a hundred to evaluate, as CIFAR-100's archive has them."""
    rng = np.random.default_rng(0)
    root = folder / "cifar-100-python"
    root.mkdir()
    for name, count in (("train", images), ("test", 100)):
        planes = rng.integers(0, 256, (count, 3 * 32 * 32), np.uint8)
        labels = [i % CLASSES for i in range(count)]
        found = {b"data": planes, b"fine_labels": labels, b"filenames": [b"%d.png" % i for i in range(count)]}
        (root / name).write_bytes(pickle.dumps(found, protocol=3))
    names = [b"%d" % i for i in range(CLASSES)]
    (root / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=3))
    return root


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
        name: what is trained.
        config: of the training.
        steps: that count.
        bound: the aim.
        rounds: how often.
        epoch: the images that the config trains on; None: as many digits as the steps take, 1,000 at most,
            and a row every four steps.
    """
    name = f"training, {name}, batch {config.batch_size}, beside its bare step"
    announce(name)
    config.bn_group = None
    config.checkpoint_minutes = 0.75
    images = (WARM_UP + steps) * config.batch_size
    if epoch is None:
        config.log_every = 4
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


PARTS: Mapping[str, Callable[[], Row]] = {"imagenet": _imagenet, "miniature": _miniature, "cifar": _cifar}


if __name__ == "__main__":
    main(__doc__, measure, add_options=lambda parser: add_parts(parser, PARTS))
