"""The training step: ours beside PyTorch's, eager and compiled.

`python -m proofs.bench.step [PART …] [--json FILE]`, of `classification`, ResNet-34 → 18 with TaT at 224²,
`segmentation` and `cifar`, see the modules of these names; else all. On a CPU batch 16 in float32; on a GPU
batch 256 in bfloat16, which is AMP in PyTorch, twenty steps at a time, and ours is compared with the
roofline, too: the images/s at which the step's operations, or the bytes that the compiled program moves,
would take all of what the maker promises. PyTorch works channels-last, and its cuDNN looks for the fastest
algorithms, as XLA does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from einops import rearrange
from ml_collections import ConfigDict
from torch.utils.flop_counter import FlopCounterMode

from proofs import torch_step
from proofs.bench import cifar, segmentation
from proofs.bench.full_size import full_size
from proofs.bench.sidebyside import GPU_STEPS, Row, compare_times, main, shared_device
from proofs.command import add_parts
from proofs.compiled_step import compile_step
from proofs.report import announce
from proofs.torch_resnet import random_torch_resnet
from proofs.torch_step import TorchStudent
from tat_jax.batch import Batch

SIZE, CLASSES = 224, 1000
# Operations a second in dense bfloat16 and bytes a second to memory, as NVIDIA states them for SXM cards.
PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}


def measure(parts: Sequence[str]) -> list[Row]:
    """Compare what the command line names, else all."""
    return [row for name in parts or PARTS for row in PARTS[name]()]


def classification() -> list[Row]:
    """Compare with PyTorch eager and with `torch.compile`."""
    device = shared_device()
    on_gpu = device == "cuda"
    config = full_size(on_gpu=on_gpu)
    batch_size = config.batch_size
    steps = GPU_STEPS if on_gpu else 1
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, SIZE, SIZE, 3)).astype(np.float32)
    labels = rng.integers(0, CLASSES, batch_size).astype(np.int32)
    batch = Batch(image=images, label=labels, where=np.ones(batch_size, bool))
    step = compile_step(config, batch, num_classes=CLASSES)
    ours, moved = step.repeated(steps), step.program.cost_analysis()["bytes accessed"]
    what = f"step, batch {batch_size}, {config.dtype}, {device}"
    rows = []
    for name, compiled, bound in (
        ("PyTorch eager", False, 1.3 if on_gpu else 1.0),
        ("torch.compile", True, 1.0 if on_gpu else None),
    ):
        announce(f"{what} beside {name}")
        rival = pytorch_step(config, images, labels, device, compiled=compiled, steps=steps)
        rows.append(
            compare_times(
                f"{what}, beside {name}",
                ours,
                rival,
                bound=bound,
                images=steps * batch_size,
                rounds=5 if on_gpu else 9,
            )
        )
    kind = jax.devices()[0].device_kind
    for name, peaks in PEAKS.items():
        if name in kind:
            # XLA does not count those of cuDNN.
            cost = operations(pytorch_step(config, images, labels, device, compiled=False, steps=1)), moved
            rows.append(
                roofline(f"{what}, beside the roofline of {name}", rows[0].ours, batch_size, cost, peaks)
            )
    return rows


def operations(call: Callable[[], None]) -> float:
    """Return how many operations PyTorch counts in a call, of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def roofline(
    name: str, rate: float, batch_size: int, cost: tuple[float, float], peaks: tuple[float, float]
) -> Row:
    """Compare images/s with what operations and bytes of a step allow; the ratio is the share reached."""
    flops, moved = cost
    seconds = max(flops / peaks[0], moved / peaks[1])
    binds = "operations" if seconds == flops / peaks[0] else "memory"
    share = rate * seconds / batch_size
    name = f"{name}: {flops / 1e12:.2f} TFLOP, {moved / 1e9:.1f} GB a step, {binds} bind"
    return Row(name, rate, batch_size / seconds, share, None, "images/s", (share, share))


def pytorch_step(
    config: ConfigDict, images: np.ndarray, labels: np.ndarray, device: str, *, compiled: bool, steps: int
) -> Callable[[], None]:
    """Return a function that takes so many of the same steps in PyTorch, and waits for the last."""
    torch.backends.cudnn.benchmark = True
    x = torch.from_numpy(rearrange(images, "b h w c -> b c h w")).to(
        device, memory_format=torch.channels_last
    )
    y = torch.from_numpy(labels).long().to(device)
    teacher = random_torch_resnet("resnet34").eval().to(device, memory_format=torch.channels_last)
    model: Any = TorchStudent(random_torch_resnet("resnet18"), teacher_features=512)
    model = model.train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay
    )
    losses = torch.compile(torch_step.losses) if compiled else torch_step.losses
    terms = torch_step.terms_of(config)

    def call() -> None:
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss, *_ = losses(model, teacher, x, y, **terms)
            torch_step.take_step(optimizer, loss)
        loss.item()

    return call


PARTS: Mapping[str, Callable[[], list[Row]]] = {
    "classification": classification,
    "segmentation": segmentation.measure,
    "cifar": cifar.measure,
}


if __name__ == "__main__":
    main(__doc__, measure, add_options=lambda parser: add_parts(parser, PARTS))
