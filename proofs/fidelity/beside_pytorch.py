"""Fifty steps on photographs at 224², ours beside an independent step in PyTorch.

Training amplifies rounding: two float32 runs of one program part ways once they add in different orders. So
how far PyTorch's float32 run lies from PyTorch's own float64 run is the measure of how near ours may lie.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from proofs import torch_step
from proofs.fidelity import our_step
from proofs.fidelity.claim import Claim
from proofs.fidelity.weights import torch_network
from proofs.photographs import Photograph
from proofs.rounding import relative_error
from proofs.torch_step import TorchStudent
from proofs.torch_transforms import to_tensors
from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.build import build
from tat_jax.configs import r18_r34
from tat_jax.data.transforms import decode, train_transform
from tat_jax.metrics import progress

BATCH, CLASSES = 8, 1000
# The published rate is for 2,048 images; with it, eight teach nothing but noise.
LEARNING_RATE = 1e-4
TERMS = ("loss", "kd", "tat_layer4")

Curves = Float[np.ndarray, "steps terms"]


def batches(photos: list[Photograph], steps: int) -> Iterator[Batch]:
    """Yield random crops of the photographs, in order, with a label of its own for each."""
    decoded = [decode(photo.jpeg, photo.name) for photo in photos]
    for step in range(steps):
        rows = [(step * BATCH + i) % len(photos) for i in range(BATCH)]
        images = [
            train_transform(
                decoded[row],
                np.random.default_rng((step, row)),
                size=224,
                scale=(0.08, 1.0),
                ratio=(3 / 4, 4 / 3),
                flip=True,
            )
            for row in rows
        ]
        labels = np.array(rows, np.int32) % CLASSES
        yield Batch(image=np.stack(images), label=labels, where=np.ones(BATCH, bool))


def claims(photos: list[Photograph], weights: Path | None, picture: Path, *, steps: int = 50) -> list[Claim]:
    """Train thrice from the same weights on the same batches, draw the losses, and compare them."""
    curves = {
        "PyTorch, float64": pytorch(photos, weights, steps, torch.float64),
        "PyTorch, float32": pytorch(photos, weights, steps, torch.float32),
        "ours, float32": ours(photos, weights, steps),
    }
    plot(curves, picture)
    exact, single, our = curves.values()
    what = f"{steps} steps, 224², batch {BATCH}, {'pretrained' if weights else 'random'} weights"
    found = []
    for i, term in enumerate(TERMS):
        rounding = relative_error(single[:, i], exact[:, i])
        found += [
            Claim(
                f"{term}: first step",
                f"PyTorch in float64; {what}",
                relative_error(our[0, i], exact[0, i]),
                1e-5,
            ),
            Claim(
                f"{term}: whole curve",
                f"PyTorch in float64; {what}",
                relative_error(our[:, i], exact[:, i]),
                0.02,
            ),
            Claim(f"  PyTorch's own rounding, {term}", f"PyTorch in float64; {what}", rounding, None),
        ]
    return found


def pytorch(
    photos: list[Photograph],
    weights: Path | None,
    steps: int,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    mixed: bool = False,
) -> Curves:
    """Train with the independent step, for `mixed` in bfloat16 where PyTorch's autocast has it so."""
    model, teacher = (network.to(device, dtype) for network in _torch_models(weights))
    tensors = (
        (
            to_tensors(np.asarray(batch.image), dtype).to(device),
            torch.from_numpy(batch.label).long().to(device),
        )
        for batch in _shown(batches(photos, steps), steps, f"PyTorch, {dtype}{', mixed' if mixed else ''}")
    )
    with torch.autocast(device, torch.bfloat16, enabled=mixed):
        return np.array(list(torch_step.train(model, teacher, tensors, **_settings())))


def ours(photos: list[Photograph], weights: Path | None, steps: int, *, dtype: str = "float32") -> Curves:
    """Train with our step."""
    model, teacher = _torch_models(weights)
    config = r18_r34.get_config()
    config.batch_size = BATCH
    config.bn_group = None
    config.optimizer.learning_rate = LEARNING_RATE
    config.dtype = dtype
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = build(
        config,
        mesh,
        num_classes=CLASSES,
        steps_per_epoch=steps,
        student=our_step.network(our_step.entries_of(model.student), "resnet18", dtype=dtype),
        teacher=our_step.network(our_step.entries_of(teacher), "resnet34", dtype=dtype),
    )
    entries = our_step.entries_of(model)
    built = our_step.with_embeddings(built, lambda module, key, shape: entries[f"{module}.{key}"])
    _, measured = our_step.train(built, _shown(batches(photos, steps), steps, f"ours, {dtype}"), mesh)
    return np.array([[m["loss"], our_step.kd_loss(built, m), m["tat_layer4"]] for m in measured])


def plot(curves: dict[str, Curves], picture: Path) -> None:
    """Draw the curves over each other, and below them how far each lies from the first."""
    reference = next(iter(curves.values()))
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, len(TERMS), sharex=True)
    looks: list[dict[str, Any]] = [{"lw": 5, "alpha": 0.3}, {"lw": 1.5}, {"lw": 1.5, "ls": "--"}]
    styles = dict(zip(curves, looks, strict=True))
    for i, term in enumerate(TERMS):
        for name, curve in curves.items():
            steps = np.arange(1, len(curve) + 1)
            axes[0, i].plot(steps, curve[:, i], label=name, **styles[name])
            if curve is not reference:
                distance = np.abs(curve[:, i] / reference[:, i] - 1)
                axes[1, i].semilogy(steps, distance, label=name, color=f"C{list(curves).index(name)}")
        axes[0, i].set_title(term)
        axes[1, i].set_xlabel("step")
    axes[0, 0].set_ylabel("value")
    axes[1, 0].set_ylabel(f"relative distance to {next(iter(curves))}")
    axes[0, 0].legend()
    figure.savefig(picture, dpi=100)


def _torch_models(weights: Path | None):
    """Return what is trained and the teacher; the same at every call."""
    student, teacher = torch_network("resnet18", weights), torch_network("resnet34", weights)
    torch.manual_seed(0)
    return TorchStudent(student, teacher_features=512), teacher


def _settings() -> dict:
    config = r18_r34.get_config()
    return {
        "learning_rate": LEARNING_RATE,
        "weight_decay": config.optimizer.weight_decay,
        **torch_step.terms_of(config),
    }


def _shown(rows: Iterator[Batch], steps: int, description: str) -> Iterator[Batch]:
    with progress(steps * BATCH, description=description, leave=False) as bar:
        for row in rows:
            yield row
            bar.update(BATCH)
