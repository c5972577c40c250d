"""Converted networks, compared with PyTorch's: every format of file, and what they say of photographs."""

import io
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import torch
from flax import nnx
from jaxtyping import Float, UInt8

from proofs.fidelity import our_step
from proofs.fidelity.claim import Claim
from proofs.photographs import Photograph
from proofs.rounding import relative_error
from proofs.torch_resnet import TorchResNet, random_torch_resnet
from proofs.torch_transforms import to_tensors
from tat_jax import convert
from tat_jax.data.transforms import decode, eval_transform
from tat_jax.metrics import progress
from tat_jax.networks.view import View
from tat_jax.weights import store
from tat_jax.weights.files import read_entries
from tat_jax.weights.names import export_entries

ARCHITECTURES = ("resnet18", "resnet34")
_BATCH = 20


def torch_network(architecture: str, folder: Path | None) -> TorchResNet:
    """Return a network in PyTorch with the weights of `folder`, else with random ones.

    The weights are those of the first .pth or .safetensors file whose name begins with the architecture's;
    without a head there, it has a random one.

    Raises:
        FileNotFoundError: there is no such file.
    """
    model = random_torch_resnet(architecture)
    if folder is not None:
        files = sorted(p for p in folder.glob(f"{architecture}*") if p.suffix in (".pth", ".safetensors"))
        if not files:
            raise FileNotFoundError(f"no {architecture}*.pth or {architecture}*.safetensors in {folder}")
        entries = {name: torch.from_numpy(np.array(a)) for name, a in read_entries(files[0]).items()}
        left_out = model.load_state_dict(entries, strict=False)
        missing = {name for name in left_out.missing_keys if not name.endswith("num_batches_tracked")}
        if left_out.unexpected_keys or missing - {"fc.weight", "fc.bias"}:
            raise ValueError(f"{files[0]} does not hold a {architecture}: {left_out}")
    return model.eval()


def claims(photos: list[Photograph], folder: Path | None) -> list[Claim]:
    """Compare the files' tensors bit by bit, and the logits of every photograph."""
    found = []
    images = np.stack([eval_transform(decode(p.jpeg, p.name), resize=256, size=224) for p in photos])
    for architecture in ARCHITECTURES:
        model = torch_network(architecture, folder)
        found += [
            Claim(f"{architecture} from {name}: tensors that differ", "PyTorch", differ, 0)
            for name, differ in _differing_tensors(model, architecture).items()
        ]
        network = our_step.network(our_step.entries_of(model), architecture, dtype="float32")
        ours = _logits(_jitted(network), images, f"{architecture} in JAX")
        theirs = _logits(_without_gradient(model), images, f"{architecture} in PyTorch")
        whose = f"PyTorch, {len(images)} photographs, {'pretrained' if folder else 'random'} weights"
        worst = max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
        others = int((ours.argmax(1) != theirs.argmax(1)).sum())
        found += [
            # Both compute in float32, and sum in different orders through 18 or 34 layers.
            Claim(f"{architecture}: logits of the worst photograph in float32", whose, worst, 1e-4),
            Claim(f"{architecture}: photographs of another class", whose, others, 0),
        ]
    return found


def _differing_tensors(model: TorchResNet, architecture: str) -> dict[str, int]:
    """Return, for each kind of file, how many tensors differ after the command that converts it."""
    state = model.state_dict()
    expected = our_step.entries_of(model)
    floats = {name: array for name, array in expected.items() if not name.endswith("num_batches_tracked")}
    differing = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.save(state, folder / "zip.pth")
        torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
        safetensors.numpy.save_file(floats, folder / "plain.safetensors")
        # timm's files carry torchvision's names, the batches counted, and a remark about the framework.
        safetensors.numpy.save_file(expected, folder / "timm.safetensors", metadata={"format": "pt"})
        for kind, file in (
            (".pth (zip)", "zip.pth"),
            (".pth (before PyTorch 1.6)", "legacy.pth"),
            (".safetensors", "plain.safetensors"),
            ("timm's .safetensors", "timm.safetensors"),
        ):
            to = folder / file.replace(".", "_")
            with redirect_stdout(io.StringIO()):
                convert.main([architecture, "--from", str(folder / file), "--to", str(to)])
            entries = export_entries(store.load_network(to))
            differing[kind] = sum(
                name not in entries or not np.array_equal(entries[name], array)
                for name, array in floats.items()
            ) + len(entries.keys() - floats.keys())
    return differing


def _logits(
    forward: Callable[[np.ndarray], Any], images: UInt8[np.ndarray, "batch 224 224 3"], description: str
) -> Float[np.ndarray, "batch classes"]:
    """Return the logits of all images, which go through `forward` a few at a time."""
    with progress(len(images), description=description, leave=False) as bar:
        found = []
        for first in range(0, len(images), _BATCH):
            found.append(np.asarray(forward(images[first : first + _BATCH])))
            bar.update(len(found[-1]))
    return np.concatenate(found)


def _jitted(view: View) -> Callable[[np.ndarray], jax.Array]:
    graph, state = nnx.split(view)
    forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images).logits)
    return lambda images: forward(state, images)


def _without_gradient(model: TorchResNet) -> Callable[[np.ndarray], torch.Tensor]:
    return torch.no_grad()(lambda images: model(to_tensors(images)))
