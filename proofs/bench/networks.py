"""Forward passes: ours beside timm's, eager and compiled, on a CPU in float32 at 224².

`python -m proofs.bench.networks [NETWORK …] [--json FILE]`; else all. Random weights, in evaluation mode.
Ours is compiled as the training step is, PyTorch works channels-last.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from einops import rearrange
from flax import nnx

from proofs.bench.sidebyside import Row, compare_times, main
from proofs.command import add_parts
from proofs.others import timm
from proofs.report import announce
from tat_jax import networks
from tat_jax.networks.view import View
from tat_jax.step import CPU_OPTIONS

SIZE, CLASSES = 224, 1000
# By the names that they have here and in timm.
BATCHES: Mapping[str, int] = {"vit_small_patch16_224": 16, "convnext_tiny": 8, "resnet18": 16}


def measure(parts: Sequence[str]) -> list[Row]:
    """Compare the named networks, else all."""
    jax.config.update("jax_platforms", "cpu")
    return [row for name in parts or BATCHES for row in measure_one(name, batch=BATCHES[name], size=SIZE)]


def measure_one(name: str, *, batch: int, size: int) -> list[Row]:
    """Compare a network with timm's of the same name, eager and by `torch.compile`."""
    images = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)
    ours, rows = _ours(name, images), []
    for rival, compiled, bound in (("timm eager", False, 1.0), ("timm, torch.compile", True, None)):
        what = f"{name}, batch {batch}, beside {rival}"
        announce(what)
        theirs = _timm(name, images, compiled=compiled)
        rows.append(compare_times(what, ours, theirs, bound=bound, images=batch, rounds=9, seconds=60))
    return rows


def _ours(name: str, images: np.ndarray) -> Callable[[], object]:
    arguments = {"architecture": name, "num_classes": CLASSES}
    graph, state = nnx.split(View(networks.construct(arguments, rngs=nnx.Rngs(0))))
    forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images).logits)
    pixels = jax.device_put(images)
    program = forward.lower(state, pixels).compile(compiler_options=CPU_OPTIONS)
    return lambda: program(state, pixels).block_until_ready()


def _timm(name: str, images: np.ndarray, *, compiled: bool) -> Callable[[], object]:
    model: Any = timm.create_model(name, num_classes=CLASSES).eval()
    model = model.to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(rearrange(images, "b h w c -> b c h w")).contiguous(
        memory_format=torch.channels_last
    )
    forward = torch.compile(model) if compiled else model
    return torch.no_grad()(lambda: forward(pixels))


if __name__ == "__main__":
    main(__doc__, measure, add_options=lambda parser: add_parts(parser, BATCHES, metavar="NETWORK"))
