"""Several seeds of a CIFAR-100 training at once on one device, beside the same seeds one after the other.

`python -m proofs.bench.together [--json FILE]`. Steps of KD by the common protocol, batch 64, float32, random
weights, without their input; on a GPU twenty for each seed at a time, on a CPU one.
"""

import jax

from proofs.bench.cifar import config_of, draw_batch
from proofs.bench.sidebyside import GPU_STEPS, Row, compare_times, main
from proofs.compiled_step import compile_step
from proofs.report import announce
from proofs.torch_cifar import CLASSES

PAIRS = ("resnet56-resnet20", "resnet32x4-resnet8x4")
SEEDS = (3, 6, 12)


def measure() -> list[Row]:
    """Compare pairs of networks and numbers of seeds."""
    return [row for pair in PAIRS for row in measure_pair(pair)]


def measure_pair(pair: str) -> list[Row]:
    """Compare numbers of seeds."""
    device = jax.default_backend()
    config = config_of(pair, "kd")
    batch = draw_batch(config)
    alone = compile_step(config, batch, num_classes=CLASSES)
    steps = GPU_STEPS if device == "gpu" else 1
    rows = []
    for seeds in SEEDS:
        name = f"{pair}, kd, batch {config.batch_size}, {device}: {seeds} seeds at once, beside one by one"
        announce(name)
        together = compile_step(config, batch, num_classes=CLASSES, seeds=seeds)
        rows.append(
            compare_times(
                name,
                together.repeated(steps),
                alone.repeated(steps * seeds),
                bound=None,
                images=steps * seeds * config.batch_size,
            )
        )
    return rows


if __name__ == "__main__":
    main(__doc__, measure)
