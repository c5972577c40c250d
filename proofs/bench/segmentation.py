"""The training step of semantic segmentation, ours beside PyTorch's: for `bench.step` and `bench.growth`.

DeepLabV3+ over a ResNet-101 teaches one over a ResNet-18 as published for VOC, by patch groups and anchors,
both networks in training mode. Random weights, float32, on a CPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from einops import rearrange
from ml_collections import ConfigDict

from proofs import torch_segmentation, torch_step
from proofs.bench.memory import Figures
from proofs.bench.sidebyside import Row, compare_times
from proofs.compiled_step import blank_rows, compile_step
from proofs.report import announce
from proofs.torch_deeplab import TorchDeepLab
from proofs.torch_segmentation import DROPOUTS, TorchSegmentation
from tat_jax.batch import Batch
from tat_jax.configs import base, seg_voc_r18

CLASSES = 21
SIZES = ((513, 2), (257, 4))  # of crops and of batches, whose steps are timed
CROPS = (257, 385, 513)
_STEPS = 100  # of PyTorch's schedule, on which its time does not depend
# LLVM need not optimise a program that is not run; which arrays there are, XLA has decided before.
_NOT_RUN = {"xla_backend_optimization_level": 0}


def full_size(size: int, batch_size: int) -> ConfigDict:
    """Return the published experiment on VOC with random weights, at another size."""
    config = seg_voc_r18.get_config()
    config.student.weights = config.teacher.weights = "random"
    config.batch_size, config.data.image_size = batch_size, size
    return config


def measure() -> list[Row]:
    """Compare with PyTorch eager."""
    rows = []
    for size, batch_size in SIZES:
        name = f"segmentation, R101 → R18, {size}², batch {batch_size}, float32, cpu, beside PyTorch eager"
        announce(name)
        config = full_size(size, batch_size)
        rng = np.random.default_rng(0)
        images = rng.normal(size=(batch_size, size, size, 3)).astype(np.float32)
        labels = rng.integers(0, CLASSES, (batch_size, size, size)).astype(np.uint8)
        batch = Batch(image=images, label=labels, where=np.ones(batch_size, bool))
        ours = compile_step(config, batch, num_classes=CLASSES).repeated()
        rival = _pytorch_step(config, images, labels)
        rows.append(compare_times(name, ours, rival, bound=1.0, images=batch_size))
    return rows


def temporaries() -> list[Figures]:
    """Read of the step's program what it takes besides its arguments, by crop and by loss, for two images."""
    rows = []
    for size in CROPS:
        row: Figures = {"crop": size, "positions": (-(-size // 4)) ** 2}
        for name, config in _by_loss(size).items():
            announce(f"crops of {size}²: {name}")
            rows_of_batch = blank_rows(config)
            program = compile_step(config, rows_of_batch, num_classes=CLASSES, options=_NOT_RUN).program
            row[f"{name}, MiB"] = program.memory_analysis().temp_size_in_bytes / 2**20
        rows.append(row)
    return rows


def _by_loss(size: int) -> dict[str, ConfigDict]:
    """Return the step without a teacher, with one but no attention, and with each kind of attention."""
    alone, subtracted, published, whole = (full_size(size, 2) for _ in range(4))
    for config in (alone, subtracted, whole):
        config.losses.patch_anchor[base.DECODER].weight = 0.0
    subtracted.losses.fitnet = {base.DECODER: base.loss("fitnet", weight=0.1)}
    whole.losses.tat[base.DECODER].weight = 0.1
    return {
        "cross-entropy alone": alone,
        "maps subtracted": subtracted,
        "patch groups and anchors": published,
        "whole map": whole,
    }


def _pytorch_step(config: ConfigDict, images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    """Return a function that takes the same step in PyTorch."""
    x = torch.from_numpy(rearrange(images, "b h w c -> b c h w"))
    x, y = x.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels).long()
    student, teacher = (
        TorchDeepLab(name, num_classes=CLASSES, dropouts=DROPOUTS) for name in ("resnet18", "resnet101")
    )
    model = TorchSegmentation(student)
    modules: list[Any] = [model, teacher]
    for module in modules:
        module.train().to(memory_format=torch.channels_last)
    optimizer, schedule = torch_segmentation.make_optimizer(
        model,
        learning_rate=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        steps=_STEPS,
    )
    terms = torch_segmentation.terms_of(config)

    def call() -> None:
        loss, *_ = torch_segmentation.losses(model, teacher, x, y, **terms)
        torch_step.take_step(optimizer, loss)
        schedule.step()
        loss.item()

    return call
