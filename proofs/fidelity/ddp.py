"""One step on eight simulated devices with BatchNorm in groups, beside eight PyTorch processes under DDP."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from einops import rearrange
from ml_collections import ConfigDict
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from proofs import torch_step
from proofs.fidelity import our_step
from proofs.fidelity.claim import Claim
from proofs.program import Layout, free_port, run_everywhere
from proofs.rounding import relative_error
from proofs.torch_resnet import TorchResNet, random_torch_resnet
from proofs.torch_step import TorchStudent
from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.build import build
from tat_jax.configs import r18_r34

PROCESSES, EACH, SIZE, WIDTH, CLASSES = 8, 2, 64, 8, 10


def claims() -> list[Claim]:
    """Compare loss, gradients and running statistics in float64."""
    ranks = _torch_ranks()
    model, _ = _models()
    before = our_step.entries_of(model)
    with jax.enable_x64(True):
        loss, after = _ours()
    reference = f"{PROCESSES} processes under DDP, {EACH} images each, float64"
    trained = dict(model.named_parameters())
    running = [name for name in before if "running" in name]
    first, *others = ranks
    # Plain gradient descent at rate 1: the update is the gradient.
    gradients = {name: before[name] - after[name] for name in trained}
    return [
        Claim("loss", reference, relative_error(loss, np.mean([r["loss"] for r in ranks])), 1e-10),
        Claim(
            "gradient of the worst tensor",
            reference,
            max(relative_error(gradients[name], first[f"gradient/{name}"]) for name in trained),
            1e-10,
        ),
        Claim(
            "running statistics of the first process, worst tensor",
            reference,
            max(relative_error(after[name], first[name]) for name in running),
            1e-10,
        ),
        Claim(
            "  those of the other processes, which DDP overwrites at the next step",
            reference,
            max(relative_error(after[name], other[name]) for name in running for other in others),
            None,
        ),
    ]


def _models() -> tuple[TorchStudent, TorchResNet]:
    """Return what is trained and the teacher, the same ones in every process."""
    student = random_torch_resnet("resnet18", width=WIDTH, num_classes=CLASSES)
    teacher = random_torch_resnet("resnet34", width=WIDTH, num_classes=CLASSES, seed=1)
    return TorchStudent(student, teacher_features=8 * WIDTH).double(), teacher.double().eval()


def _data() -> tuple[np.ndarray, np.ndarray]:
    """Return the images and the labels of all processes."""
    rng = np.random.default_rng(0)
    count = PROCESSES * EACH
    images = rng.standard_normal((count, SIZE, SIZE, 3))
    return images, rng.integers(0, CLASSES, count).astype(np.int32)


def _config() -> ConfigDict:
    config = r18_r34.get_config()
    config.losses.cross_entropy.weight = 0.5
    config.losses.kd.update({"weight": 0.5, "temperature": 2.0})
    return config


def _ours() -> tuple[float, dict[str, np.ndarray]]:
    """Take the step on as many devices; return the loss and the tensors after it."""
    model, teacher = _models()
    config = _config()
    config.update({"dtype": "float64", "batch_size": PROCESSES * EACH, "bn_group": EACH})
    config.data.image_size = SIZE
    config.optimizer.update({"name": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "momentum": 0.0})
    mesh = sharding.make_mesh(jax.devices()[:PROCESSES])
    entries = our_step.entries_of
    built = build(
        config,
        mesh,
        num_classes=CLASSES,
        steps_per_epoch=1,
        student=our_step.network(entries(model.student), "resnet18", dtype="float64", bn_group=EACH),
        teacher=our_step.network(entries(teacher), "resnet34", dtype="float64"),
    )
    trained = entries(model)
    built = our_step.with_embeddings(built, lambda module, key, shape: trained[f"{module}.{key}"])
    images, labels = _data()
    batch = Batch(images, labels, where=np.ones(len(labels), bool))
    after, (measured,) = our_step.train(built, [batch], mesh)
    return measured["loss"], our_step.published_tensors(after)


def _torch_ranks() -> list[dict[str, np.ndarray]]:
    """Take the step in PyTorch's processes; return what each one holds after it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "proofs.fidelity.ddp", str(free_port()), folder]
        run_everywhere(Layout(PROCESSES, 1), command)
        return [dict(np.load(Path(folder) / f"{rank}.npz")) for rank in range(PROCESSES)]


def main(port: str, folder: str) -> None:
    """Take the step as one of the processes, and write what it holds after it."""
    rank = int(os.environ["JAX_PROCESS_ID"])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES
    )
    model, teacher = _models()
    rows = slice(rank * EACH, (rank + 1) * EACH)
    images, labels = _data()
    parallel = DistributedDataParallel(model)  # without this name it would be gone before the backward pass
    loss, *_ = torch_step.losses(
        parallel,
        teacher,
        torch.from_numpy(rearrange(images[rows], "b h w c -> b c h w")),
        torch.from_numpy(labels[rows]).long(),
        **torch_step.terms_of(_config()),
    )
    loss.backward()
    held: dict[str, Any] = our_step.entries_of(model) | {"loss": loss.item()}
    held |= {f"gradient/{name}": p.grad for name, p in model.named_parameters()}
    np.savez(Path(folder) / f"{rank}.npz", **held)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
