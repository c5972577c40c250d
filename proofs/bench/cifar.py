"""The training step on CIFAR-100, ours beside PyTorch's: for `bench.step`.

resnet32x4 teaches resnet8x4 by the common protocol, batch 64, by KD, TaT, CRD and ReviewKD. Random weights,
float32, on a CPU.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import nn

from proofs import torch_step
from proofs.bench.sidebyside import Row, compare_times
from proofs.compiled_step import compile_step
from proofs.report import announce
from proofs.torch_cifar import CLASSES, CRD, KD, Review, TaT, TorchCifarResNet
from tat_jax.batch import Batch
from tat_jax.configs import cifar100

PAIR = "resnet32x4-resnet8x4"
IMAGES = 50_000  # that CRD remembers
_WIDTHS = (32, 64, 128, 256)
METHODS: Mapping[str, Callable[[], nn.Module]] = {
    "kd": KD,
    "tat": lambda: TaT(_WIDTHS[-1], _WIDTHS[-1]),
    "crd": lambda: CRD(_WIDTHS[-1], _WIDTHS[-1], IMAGES),
    "review": lambda: Review(_WIDTHS[1:], _WIDTHS[1:]),
}


def measure() -> list[Row]:
    """Compare with PyTorch eager, method by method."""
    return [measure_one(method) for method in METHODS]


def measure_one(method: str) -> Row:
    """Compare the step of one method."""
    config = cifar100.get_config(f"{PAIR},{method}")
    config.teacher.weights = "random"
    name = f"CIFAR-100, {PAIR}, {method}, batch {config.batch_size}, float32, cpu, beside PyTorch eager"
    announce(name)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(config.batch_size, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, CLASSES, config.batch_size).astype(np.int32)
    indices = rng.permutation(IMAGES)[: len(labels)].astype(np.int32)
    batch = Batch(images, labels, np.ones(len(labels), bool), indices)
    ours = compile_step(config, batch, num_classes=CLASSES, images=IMAGES).repeated()
    method_in_torch = METHODS[method]()
    if isinstance(method_in_torch, CRD):
        method_in_torch.index = torch.from_numpy(indices).long()
    rival = pytorch_step(method_in_torch, images, labels)
    return compare_times(name, ours, rival, bound=1.0, images=config.batch_size)


def pytorch_step(method: nn.Module, images: np.ndarray, labels: np.ndarray) -> Callable[[], None]:
    """Return a function that takes another step on the same images in PyTorch, channels-last."""
    x = torch.from_numpy(rearrange(images, "b h w c -> b c h w").copy())
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long()
    teacher: Any = TorchCifarResNet(32, _WIDTHS).eval()
    student: Any = TorchCifarResNet(8, _WIDTHS).train()
    teacher, student = (model.to(memory_format=torch.channels_last) for model in (teacher, student))
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)

    def call() -> None:
        with torch.no_grad():
            told = teacher(x)
        loss = method(student(x), told, y)
        torch_step.take_step(optimizer, loss)
        loss.item()

    return call
