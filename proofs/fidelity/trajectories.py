"""Train as the authors' code was recorded training, with our step, converter and schedule, and compare.

A recorded run names the inputs, which are drawn from their names, and holds every loss and rate, and of every
tensor after the last step its norm and its sum. `python -m proofs.fidelity.trajectories FILE` checks the runs
in another file of this kind.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from jax.sharding import Mesh
from ml_collections import ConfigDict

from proofs import torch_resnet, torch_step
from proofs.fidelity import our_step
from proofs.fidelity.claim import Claim, check_files
from proofs.fidelity.recorded_inputs import draw, draw_integers
from proofs.program import ROOT
from proofs.rounding import largest_relative_error, relative_error
from proofs.torch_resnet import TorchResNet
from proofs.torch_step import TorchStudent
from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.build import Built, build
from tat_jax.configs import r18_r34
from tat_jax.losses import kd_weights
from tat_jax.networks import ARCHITECTURES
from tat_jax.networks.resnet import BasicBlock, architecture
from tat_jax.networks.view import View

GOLDEN = ROOT / "tests" / "golden" / "published_code.json"


def recorded(file: Path = GOLDEN) -> list[dict[str, Any]]:
    """Return the runs recorded in `file`."""
    return json.loads(file.read_text())["trajectories"]


def draw_entry(module: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the entry `key` of a state dict, at the scale of its kind."""
    name = f"{module}/{key}"
    if len(shape) == 4:
        out, _, height, width = shape
        return draw(name, shape, (1 / (out * height * width)) ** 0.5)
    if len(shape) == 2:
        return draw(name, shape, shape[1] ** -0.5)
    drawn = draw(name, shape, 0.1)
    if key.endswith("running_var"):
        return 1 + np.abs(drawn)
    if key.endswith("weight"):
        # The published query is drawn small, so that its attention is not saturated.
        return (0.05 if module.endswith("query") else 1) * (1 + drawn)
    return drawn


def reproduce(
    run: dict[str, Any], dtype: str
) -> tuple[list[dict[str, float]], dict[str, np.ndarray], np.ndarray]:
    """Train as `run` did, in `dtype`.

    Returns:
        The measurements of every step, the tensors after the last one under the published names, and the
        logits of the evaluation images.
    """
    built, mesh = _built(run, dtype)
    model, measured = our_step.train(built, _our_batches(run), mesh)
    for metrics in measured:
        metrics["kd_loss"] = our_step.kd_loss(built, metrics)
    images = draw(f"{run['id']}/eval/image", (2, 3, run["image_size"], run["image_size"]))
    outputs = model.student(jnp.asarray(rearrange(images, "b c h w -> b h w c")))
    return measured, our_step.published_tensors(model), np.asarray(outputs.logits, np.float64)


def float32_losses_from_exact_states(run: dict[str, Any]) -> list[float]:
    """Return the loss of every step in float32, each from the state that float64 had before it."""
    with jax.enable_x64(True):
        built, mesh = _built(run, "float64")
        states = [jax.tree.map(np.array, built.state)]
        for state, _ in our_step.steps(built, _our_batches(run), mesh):
            states.append(jax.tree.map(np.array, state))
    built, mesh = _built(run, "float32")
    rounded = (
        jax.tree.map(lambda exact, own: exact.astype(own.dtype), state, built.state) for state in states
    )
    return [m["loss"] for _, m in our_step.steps(built, _our_batches(run), mesh, states=rounded)]


def claims(file: Path = GOLDEN) -> list[Claim]:
    """Compare every run recorded in `file`, in float64, float32 and bfloat16."""
    return [
        claim
        for run in recorded(file)
        for claim in (*claims_in_float64(run), *claims_in_single_and_half(run))
    ]


def claims_in_float64(run: dict[str, Any]) -> list[Claim]:
    """Compare everything that one run recorded.

    The error of a sum is relative to the tensor's norm, since numbers of both signs may sum to almost 0.
    """
    steps, reference = run["steps"], f"published code, {run['id']}"
    with jax.enable_x64(True):
        measured, tensors, logits = reproduce(run, "float64")
    final = run["final_norm_and_sum"]
    if final.keys() != tensors.keys():
        raise ValueError(f"{run['id']} records other tensors: {sorted(final.keys() ^ tensors.keys())}")
    norms, sums = np.transpose(list(final.values()))
    errors = {
        name: largest_relative_error([m[ours] for m in measured], [step[theirs] for step in steps])
        for name, ours, theirs in (
            ("loss", "loss", "loss"),
            ("KD loss", "kd_loss", "org_loss"),
            ("TaT loss", "tat_layer4", "tat_loss"),
            ("learning rate", "learning_rate", "lr"),
        )
    }
    errors["final norms of all tensors"] = largest_relative_error(
        [np.linalg.norm(tensors[name]) for name in final], norms
    )
    errors["final sums of all tensors, by norm"] = float(
        np.max(np.abs([tensors[name].sum() for name in final] - sums) / norms)
    )
    errors["evaluation logits"] = relative_error(logits[:, :8], run["eval_logits_first8"])
    return [
        Claim(f"{name}, {len(steps)} steps in float64", reference, error, 1e-10)
        for name, error in errors.items()
    ]


def claims_in_single_and_half(run: dict[str, Any]) -> list[Claim]:
    """Compare the losses of one recorded run in float32 and bfloat16.

    Each step in float32 has a bound, from the state that float64 had before it. A whole run has none:
    rounding moves a ReLU's input of 8e-8, as `open/traj0` has one, across 0, and with it the gradient, in
    PyTorch as here. So PyTorch's error in float32 stands beside ours.
    """
    reference = f"published code, {run['id']}"
    recorded = [step["loss"] for step in run["steps"]]
    each = float32_losses_from_exact_states(run)
    single = [m["loss"] for m in reproduce(run, "float32")[0]]
    half = [m["loss"] for m in reproduce(run, "bfloat16")[0]]
    theirs = [loss for loss, _, _ in _torch_training(run)]
    return [
        Claim(
            "loss, each step in float32",
            f"{reference}, its state",
            largest_relative_error(each, recorded),
            1e-3,
        ),
        Claim("loss, first step in float32", reference, largest_relative_error(single[0], recorded[0]), 1e-3),
        Claim("loss, all steps in float32", reference, largest_relative_error(single, recorded), None),
        Claim("  PyTorch's, all steps in float32", reference, largest_relative_error(theirs, recorded), None),
        Claim("loss, all steps in bfloat16", reference, largest_relative_error(half, recorded), None),
    ]


def _torch_training(run: dict[str, Any]) -> Iterator[tuple[float, float, float]]:
    """Train as `run` did with the independent step in PyTorch, in float32."""
    networks = {}
    for name in ("student", "teacher"):
        depths = tuple(run[f"{name}_layers"])
        torch_resnet.DEPTHS.setdefault(str(depths), depths)
        networks[name] = TorchResNet(str(depths), num_classes=run["num_classes"])
    model = TorchStudent(networks["student"], teacher_features=512)
    for prefix, module in ((f"{run['id']}/teacher", networks["teacher"]), (run["id"], model)):
        for name, tensor in module.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                owner, key = name.split(".", 1) if module is model else ("", name)
                entry = draw_entry(f"{prefix}/{owner}".rstrip("/"), key, tuple(tensor.shape))
                tensor.copy_(torch.from_numpy(entry))
    batches = ((torch.from_numpy(x).float(), torch.from_numpy(y)) for x, y in _batches(run))
    return torch_step.train(
        model,
        networks["teacher"],
        batches,
        learning_rate=run["optimizer"]["lr"],
        weight_decay=run["optimizer"]["weight_decay"],
        milestones=[epoch * run["steps_per_epoch"] for epoch in run["milestones_epochs"]],
        gamma=run["gamma"],
        **{name: run[name] for name in ("alpha", "beta", "temperature", "heads")},
        tat_weight=run["tat_factor"],
    )


def _built(run: dict[str, Any], dtype: str) -> tuple[Built, Mesh]:
    """Return what `run` trained, with the drawn weights, on one device."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = build(
        _config(run, dtype),
        mesh,
        num_classes=run["num_classes"],
        steps_per_epoch=run["steps_per_epoch"],
        student=_network(run, "student", dtype),
        teacher=_network(run, "teacher", dtype),
    )
    built = our_step.with_embeddings(
        built, lambda module, key, shape: draw_entry(f"{run['id']}/{module}", key, shape)
    )
    return built, mesh


def _our_batches(run: dict[str, Any]) -> Iterator[Batch]:
    for images, labels in _batches(run):
        pixels = rearrange(images, "b c h w -> b h w c")
        yield Batch(image=pixels, label=labels, where=np.ones(len(labels), bool))


def _batches(run: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images [batch, 3, size, size] and labels of every step."""
    for i in range(len(run["steps"])):
        name, size = f"{run['id']}/batch{i}", run["image_size"]
        images = draw(f"{name}/image", (run["batch"], 3, size, size))
        yield images, draw_integers(f"{name}/label", 0, run["num_classes"], run["batch"])


def _config(run: dict[str, Any], dtype: str) -> ConfigDict:
    """Return `configs/r18_r34.py` with the settings of `run`."""
    config = r18_r34.get_config()
    config.dtype = dtype
    config.batch_size = run["batch"]
    config.data.image_size = run["image_size"]
    temperature = run["temperature"]
    cross_entropy, kl = kd_weights(run["alpha"], run["beta"], temperature)
    config.losses.cross_entropy.weight = cross_entropy
    config.losses.kd.update({"weight": kl / temperature**2, "temperature": temperature})
    config.losses.tat.layer4.update({"weight": run["tat_factor"], "heads": run["heads"]})
    config.optimizer.update(
        {
            "name": run["optimizer"]["name"].lower(),
            "learning_rate": run["optimizer"]["lr"],
            "weight_decay": run["optimizer"]["weight_decay"],
            "milestones": tuple(run["milestones_epochs"]),
            "gamma": run["gamma"],
        }
    )
    return config


def _network(run: dict[str, Any], module: str, dtype: str) -> View:
    """Return the student or the teacher, converted from drawn entries under torchvision's names."""
    depths = tuple(run[f"{module}_layers"])
    name = str(depths)
    ARCHITECTURES.setdefault(name, architecture(BasicBlock, depths))
    torch_resnet.DEPTHS.setdefault(name, depths)
    with torch.device("meta"):
        shapes = TorchResNet(name, num_classes=run["num_classes"]).state_dict()
    entries = {
        key: draw_entry(f"{run['id']}/{module}", key, tuple(tensor.shape))
        for key, tensor in shapes.items()
        if not key.endswith("num_batches_tracked")
    }
    return our_step.network(entries, name, dtype=dtype)


if __name__ == "__main__":
    check_files(claims, sys.argv[1:] or [GOLDEN])
