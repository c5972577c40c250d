"""Ten steps of the published training of semantic segmentation, ours beside an independent one in PyTorch.

In float64: a narrow ResNet-18 learns from a narrow ResNet-50, whose last stage is a multi-grid unit; both
networks drop features and normalise by the batch. A row of each batch is padding, and a fifth of the pixels
has no class. PyTorch is given the images that count, and the masks that our own layers of dropout draw.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from torch import nn

from proofs import torch_segmentation
from proofs.fidelity import our_step
from proofs.fidelity.claim import Claim
from proofs.rounding import largest_relative_error, relative_error
from proofs.torch_deeplab import TorchDeepLab
from proofs.torch_resnet import randomize
from proofs.torch_segmentation import DROPOUTS, TorchSegmentation
from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.build import Built, build
from tat_jax.configs import base
from tat_jax.data.label_maps import IGNORED
from tat_jax.distill import TrainState
from tat_jax.networks.view import watch

SIZE, CLASSES, WIDTH = 33, 5, 8
_LARGE = 321  # where every dilation reaches within the backbone's map, 21²
# The rows of each batch. With two images alone the branch of ASPP that pools has statistics of two numbers,
# and with a query of scale 1 the attention is saturated. Both amplify rounding: PyTorch's own losses moved by
# 1e-3 within ten steps, for weights moved by 1e-14.
COUNTS = np.array([True, True, True, False])
_QUERY = 0.05  # scale of the query
TERM = f"patch_anchor_{base.DECODER}"
BOUND = 1e-9
_DROPOUTS = (3, 7)  # of the decoder's last_conv
# What a step measures, in the order of `torch_segmentation.train`.
_MEASURED = {
    "loss": "loss",
    "pixel_cross_entropy": "cross-entropy over the batch",
    TERM: "patch groups and anchors",
    "gradient_norm": "norm of the gradient",
}

Masks = list[list[torch.Tensor]]


class Masked(nn.Module):
    """Dropout whose mask is given, scale included."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is left of a map."""
        return x * self.mask


def claims(steps: int = 10) -> list[Claim]:
    """Compare both networks' maps of a large image, every step of training, and what all steps lead to."""
    student, teacher = (_torch_network(name, seed) for seed, name in enumerate(("resnet18", "resnet50")))
    return [
        *(claim_of_maps(network, name) for network, name in ((student, "resnet18"), (teacher, "resnet50"))),
        *claims_of_steps(student, teacher, steps),
    ]


def claim_of_maps(network: TorchDeepLab, name: str) -> Claim:
    """Compare the pyramid's map of an image at 321² in evaluation mode."""
    images = np.random.default_rng(0).normal(size=(1, _LARGE, _LARGE, 3))
    with jax.enable_x64(True):
        view = our_step.network(our_step.entries_of(network), f"deeplab_{name}", dtype="float64")
        watch(view, ("aspp",), _LARGE)
        graph, arrays = nnx.split(view)
        ours = jax.jit(lambda arrays: nnx.merge(graph, arrays)(images).taps["aspp"])(arrays)
    with torch.no_grad():
        _, taps = network.eval()(torch.from_numpy(rearrange(images, "b h w c -> b c h w")), taps=True)
    error = relative_error(rearrange(np.asarray(ours), "b h w c -> b c h w"), taps["aspp"])
    return Claim(f"the map of the pyramid over {name}, {_LARGE}²", "PyTorch, float64", error, BOUND)


def claims_of_steps(student: TorchDeepLab, teacher: TorchDeepLab, steps: int) -> list[Claim]:
    """Train both from the same weights on the same batches; compare every step, and what all lead to."""
    rows = list(batches(steps))
    torch.manual_seed(2)
    model = TorchSegmentation(student).double()
    for embedding in (model.query, model.key, model.value):
        randomize(embedding)  # or the key's bias, which the loss does not see, would be 0 but for rounding
    with torch.no_grad():
        model.query.l2norm.weight.mul_(_QUERY)
        model.query.l2norm.bias.mul_(_QUERY)
    with jax.enable_x64(True):
        ours, masks, tensors = _our_training(model, teacher, rows)
    theirs = list(_pytorch_training(model, teacher, rows, masks, _config(steps)))
    reference = f"PyTorch, {steps} steps in float64"
    errors = {
        claim: largest_relative_error([m[name] for m in ours], [measured[i] for measured in theirs])
        for i, (name, claim) in enumerate(_MEASURED.items())
    }
    entries = our_step.entries_of(model)
    for claim, is_statistic in (("parameters", False), ("running statistics", True)):
        errors[f"{claim} after all steps, the worst tensor"] = max(
            relative_error(tensor, entries[name])
            for name, tensor in tensors.items()
            if ("running_" in name) == is_statistic
        )
    return [Claim(claim, reference, error, BOUND) for claim, error in errors.items()]


def batches(steps: int) -> Iterator[Batch]:
    """Yield images of noise with labels of noise."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        shape = (len(COUNTS), SIZE, SIZE)
        label = rng.integers(0, CLASSES, shape).astype(np.uint8)
        label[rng.random(shape) < 0.2] = IGNORED
        yield Batch(image=rng.normal(size=(*shape, 3)), label=label, where=COUNTS)


def _config(steps: int) -> ConfigDict:
    config = base.base()
    config.update({"task": "segmentation", "dtype": "float64", "epochs": 1, "batch_size": len(COUNTS)})
    config.data.image_size = SIZE
    config.teacher_mode = "train"
    config.losses.cross_entropy.weight = 0.0
    config.losses.pixel_cross_entropy.weight = 1.0
    config.losses.patch_anchor[base.DECODER].update(
        {"weight": 0.1, "patches": (4, 4), "groups": 4, "anchors": (4, 4)}
    )
    config.optimizer.update(
        {
            "name": "sgd",
            "learning_rate": 0.007,
            "nesterov": True,
            "schedule": "cosine",
            "rates": (("student.network.aspp", 10.0), ("student.network.decoder", 10.0)),
        }
    )
    return config


def _torch_network(architecture: str, seed: int) -> TorchDeepLab:
    torch.manual_seed(seed)
    network = TorchDeepLab(architecture, num_classes=CLASSES, width=WIDTH, dropouts=DROPOUTS)
    return randomize(network).double()


def _our_training(
    model: TorchSegmentation, teacher: TorchDeepLab, rows: Sequence[Batch]
) -> tuple[list[dict[str, float]], list[Masks], dict[str, np.ndarray]]:
    """Return what each step measured, the masks that it drew, and the tensors after the last."""
    built, mesh = _built(model, teacher, len(rows))
    measured, masks, tensors = [], [_masks(built, built.state)], {}
    for state, metrics in our_step.steps(built, rows, mesh):
        measured.append(metrics)
        masks.append(_masks(built, state))
        tensors = our_step.published_tensors(our_step.trained(built, state), TERM)
    return measured, masks[:-1], tensors


def _built(model: TorchSegmentation, teacher: TorchDeepLab, steps: int) -> tuple[Built, Mesh]:
    """Return our training from the weights of PyTorch's modules, on one device."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    student, master = (
        our_step.network(
            our_step.entries_of(module), f"deeplab_{name}", dtype="float64", seed=seed, aspp_dropout=False
        )
        for seed, (module, name) in enumerate(((model.student, "resnet18"), (teacher, "resnet50")))
    )
    built = build(
        _config(steps), mesh, num_classes=CLASSES, steps_per_epoch=steps, student=student, teacher=master
    )
    entries = our_step.entries_of(model)
    return our_step.with_embeddings(built, lambda name, key, _: entries[f"{name}.{key}"], TERM), mesh


def _masks(built: Built, state: TrainState) -> Masks:
    """Return the masks of student and teacher in the step from a state on, of the images that count."""
    assert built.recipe.teacher is not None
    assert built.teacher is not None
    teacher = nnx.merge(built.recipe.teacher, built.teacher, copy=True)
    for _, key in nnx.iter_graph(teacher):
        if isinstance(key, nnx.RngKey):
            key.set_value(jax.random.fold_in(key.get_value(), state.step))
    return [_drawn(view.network) for view in (our_step.trained(built, state).student, teacher)]


def _drawn(network: Any) -> list[torch.Tensor]:
    side = -(-SIZE // 4)
    ones = jnp.ones((len(COUNTS), side, side, network.decoder.last_conv[0].out_features))
    drawn = [network.decoder.last_conv[i](ones, deterministic=False) for i in _DROPOUTS]
    return [torch.from_numpy(rearrange(np.asarray(x)[COUNTS], "b h w c -> b c h w")) for x in drawn]


def _pytorch_training(
    model: TorchSegmentation,
    teacher: TorchDeepLab,
    rows: Sequence[Batch],
    masks: Sequence[Masks],
    config: ConfigDict,
) -> Iterator[tuple[float, ...]]:
    """Train with PyTorch's step on the rows that count; yield what each step measured."""

    def tensors() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for row, of_networks in zip(rows, masks, strict=True):
            for network, of_layers in zip((model.student, teacher), of_networks, strict=True):
                for i, mask in zip(_DROPOUTS, of_layers, strict=True):
                    network.decoder.last_conv[i] = Masked(mask)
            images = rearrange(np.asarray(row.image)[COUNTS], "b h w c -> b c h w")
            yield torch.from_numpy(images), torch.from_numpy(np.asarray(row.label)[COUNTS]).long()

    optimizer = config.optimizer
    return torch_segmentation.train(
        model,
        teacher,
        tensors(),
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        steps=len(rows),
        **torch_segmentation.terms_of(config),
    )
