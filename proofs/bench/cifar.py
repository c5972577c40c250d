"""The training step on CIFAR-100, ours beside PyTorch's: for `bench.step`.

resnet32x4 teaches resnet8x4 by the common protocol, batch 64, by KD, TaT, CRD and ReviewKD. Random weights,
float32; on a GPU twenty steps at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from einops import rearrange
from ml_collections import ConfigDict
from torch import nn

from proofs import torch_step
from proofs.bench.sidebyside import GPU_STEPS, Row, compare_times, shared_device
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
    device = shared_device()
    steps = GPU_STEPS if device == "cuda" else 1
    config = config_of(PAIR, method)
    name = f"CIFAR-100, {PAIR}, {method}, batch {config.batch_size}, float32, {device}, beside PyTorch eager"
    announce(name)
    batch = draw_batch(config)
    ours = compile_step(config, batch, num_classes=CLASSES, images=IMAGES).repeated(steps)
    rival = pytorch_step(METHODS[method], batch, device, steps)
    return compare_times(name, ours, rival, bound=1.0, images=steps * config.batch_size)


def config_of(pair: str, method: str) -> ConfigDict:
    """Return the protocol's config, of a teacher with random weights."""
    config = cifar100.get_config(f"{pair},{method}")
    config.teacher.weights = "random"
    return config


def draw_batch(config: ConfigDict) -> Batch:
    """Return a batch of noise that has passed the input's normalisation, of images that CRD remembers."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(config.batch_size, 32, 32, 3)).astype(np.float32)
    labels = rng.integers(0, CLASSES, len(images)).astype(np.int32)
    indices = rng.permutation(IMAGES)[: len(images)].astype(np.int32)
    return Batch(images, labels, np.ones(len(images), bool), indices)


def pytorch_step(
    make_method: Callable[[], nn.Module], batch: Batch, device: str, steps: int
) -> Callable[[], None]:
    """Return a function that takes so many further steps on one batch in PyTorch, channels-last."""
    torch.backends.cudnn.benchmark = True
    x = torch.from_numpy(rearrange(batch.image, "b h w c -> b c h w").copy())
    x = x.to(device, memory_format=torch.channels_last)
    y = torch.from_numpy(batch.label).long().to(device)
    teacher: Any = TorchCifarResNet(32, _WIDTHS).eval()
    student: Any = TorchCifarResNet(8, _WIDTHS).train()
    teacher, student = (model.to(device, memory_format=torch.channels_last) for model in (teacher, student))
    with torch.device(device):
        method = make_method()
    if isinstance(method, CRD):
        method.index = torch.from_numpy(batch.indices).long().to(device)
    parameters = [*student.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)

    def call() -> None:
        for _ in range(steps):
            with torch.no_grad():
                told = teacher(x)
            loss = method(student(x), told, y)
            torch_step.take_step(optimizer, loss)
        loss.item()

    return call
