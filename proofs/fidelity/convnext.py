"""ConvNeXt beside timm's, torchvision's and transformers', with random weights: files, taps and logits."""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
import torch
from einops import rearrange
from flax import nnx
from torch import nn

from proofs.fidelity import our_step
from proofs.fidelity.claim import Claim
from proofs.others import timm, torchvision, transformers
from proofs.rounding import relative_error
from proofs.torch_resnet import randomize
from tat_jax import convert, networks
from tat_jax.networks.convnext import ARCHITECTURES
from tat_jax.networks.resnet import Depths
from tat_jax.networks.view import View
from tat_jax.weights import store
from tat_jax.weights.names import export_entries

CLASSES = 10
SIZES = ((224, 224), (256, 256), (160, 200))  # the first is the native one
BOUNDS = {"float32": 1e-4, "float64": 1e-9}

# By our names: stage0 to stage3, pooled, and logits of those with a head.
Outputs = Mapping[str, torch.Tensor]


class Size(NamedTuple):
    """The size of a network: its name here, blocks and channels of its stages."""

    architecture: str
    depths: Depths
    channels: tuple[int, int, int, int]


TINY = Size("convnext_tiny", (3, 3, 9, 3), (96, 192, 384, 768))


class Other(NamedTuple):
    """A network of another library: what makes one of a size, and how its outputs are read."""

    make: Callable[[Size], nn.Module]
    read: Callable[[Any, torch.Tensor], Outputs]


def _stages(maps: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"stage{i}": value for i, value in enumerate(maps)}


def _read_timm(model: Any, images: torch.Tensor) -> Outputs:
    last, maps = model.forward_intermediates(images)
    pooled = model.forward_head(last, pre_logits=True)
    return {**_stages(maps), "pooled": pooled, "logits": model(images)}


def _make_timm(size: Size) -> nn.Module:
    return timm.models.ConvNeXt(dims=size.channels, depths=size.depths, num_classes=CLASSES)


def _make_torchvision(size: Size) -> nn.Module:
    settings = [
        torchvision.models.convnext.CNBlockConfig(*each)
        for each in zip(size.channels, (*size.channels[1:], None), size.depths, strict=True)
    ]
    return torchvision.models.ConvNeXt(settings, num_classes=CLASSES)


def _read_torchvision(model: Any, images: torch.Tensor) -> Outputs:
    maps, x = [], images
    for layer in model.features:
        maps.append(x := layer(x))
    norm, flatten, _ = model.classifier
    pooled = flatten(norm(model.avgpool(x)))
    return {**_stages(maps[1::2]), "pooled": pooled, "logits": model(images)}


def _make_convnext(size: Size) -> nn.Module:
    # transformers' ε of the last norm is 1e-12 by default; facebookresearch's is 1e-6, as all others are.
    config = transformers.ConvNextConfig(hidden_sizes=size.channels, depths=size.depths, layer_norm_eps=1e-6)
    config.num_labels = CLASSES
    return transformers.ConvNextForImageClassification(config)


def _read_convnext(model: Any, images: torch.Tensor) -> Outputs:
    found = model.convnext(images, output_hidden_states=True)
    logits = model(images).logits
    return {**_stages(found.hidden_states[-4:]), "pooled": found.pooler_output, "logits": logits}


def _make_dinov3(size: Size) -> nn.Module:
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=list(size.channels), depths=list(size.depths))
    return transformers.DINOv3ConvNextModel(config)


def _read_dinov3(model: Any, images: torch.Tensor) -> Outputs:
    found = model(images, output_hidden_states=True)
    return {**_stages(found.hidden_states[-4:]), "pooled": found.pooler_output}


OTHERS: Mapping[str, Other] = {
    "timm": Other(_make_timm, _read_timm),
    "torchvision": Other(_make_torchvision, _read_torchvision),
    "transformers' ConvNextForImageClassification": Other(_make_convnext, _read_convnext),
    "transformers' DINOv3ConvNextModel": Other(_make_dinov3, _read_dinov3),
}


def claims(size: Size = TINY, of_images: Sequence[tuple[int, int]] = SIZES) -> list[Claim]:
    """Compare every library's files and outputs with ours."""
    found = []
    for name, other in OTHERS.items():
        model = _random(other, size)
        with tempfile.TemporaryDirectory() as temporary:
            for ending in ("pth", "safetensors"):
                converted = _converted(model, Path(temporary) / f"theirs.{ending}", size)
                differing = _differing(model, converted, size)
                found.append(
                    Claim(f"tensors that differ, from .{ending} and back to timm's", name, differing, 0)
                )
        found += [
            Claim(
                f"the worst of stages, pooled features and logits, {height} × {width}, {dtype}",
                name,
                error,
                BOUNDS[dtype],
            )
            for dtype in BOUNDS
            for (height, width), error in _errors(other, model, converted, dtype, of_images).items()
        ]
    return found


def _random(other: Other, size: Size) -> nn.Module:
    torch.manual_seed(0)
    model = randomize(other.make(size)).eval()
    for name, value in model.named_parameters():
        if name.endswith("layer_scale"):  # which has axes for height and width
            nn.init.uniform_(value, 0.5, 1.5)
    return model


def _converted(model: nn.Module, file: Path, size: Size) -> store.StoredNetwork:
    """Return what the command makes of a file of the model."""
    entries = our_step.entries_of(model)
    if file.suffix == ".pth":
        torch.save(model.state_dict(), file)
    else:
        safetensors.numpy.save_file(entries, file)
    to = file.with_suffix(f"{file.suffix}.converted")
    with redirect_stdout(io.StringIO()):
        convert.main([size.architecture, "--from", str(file), "--to", str(to)])
    return store.load_network(to)


def _differing(model: nn.Module, converted: store.StoredNetwork, size: Size) -> int:
    """Return how many tensors are not in the export, which has timm's names, or in it alone."""
    exported = export_entries(converted)
    classes = converted.arguments["num_classes"]
    reference = timm.models.ConvNeXt(dims=size.channels, depths=size.depths, num_classes=classes)
    reference.load_state_dict({name: torch.from_numpy(a) for name, a in exported.items()}, strict=True)
    theirs, ours = (
        sorted(np.ascontiguousarray(array).tobytes() for array in entries.values())
        for entries in (our_step.entries_of(model), exported)
    )
    return abs(len(theirs) - len(ours)) + sum(a != b for a, b in zip(theirs, ours, strict=False))


def _errors(
    other: Other,
    model: nn.Module,
    converted: store.StoredNetwork,
    dtype: str,
    of_images: Sequence[tuple[int, int]],
) -> dict[tuple[int, int], float]:
    """Return the largest error of all outputs by the images' height and width."""
    model = model.to(getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        network = networks.construct(converted.arguments, dtype=dtype, rngs=nnx.Rngs(0))
        store.set_weights(network, converted.weights, source="converted")
        graph, state = nnx.split(View(network))
        found = {}
        for size in of_images:
            images = np.random.default_rng(0).normal(size=(1, *size, 3)).astype(dtype)
            with torch.no_grad():
                theirs = other.read(model, torch.from_numpy(rearrange(images, "b h w c -> b c h w")))
            logits, ours = _forward(graph, state, images)
            found[size] = _largest(ours if logits is None else ours | {"logits": logits}, theirs)
    return found


def _largest(ours: Mapping[str, jax.Array], theirs: Outputs) -> float:
    if ours.keys() != theirs.keys():
        return float("inf")
    errors = [relative_error(ours[name], _channels_last(value)) for name, value in theirs.items()]
    return float(np.max(errors))  # NaN if one is


@jax.jit(static_argnums=0)
def _forward(graph: Any, state: nnx.State, images: jax.Array) -> Any:
    return nnx.merge(graph, state)(images)


def _channels_last(value: torch.Tensor) -> np.ndarray:
    array = value.numpy()
    return rearrange(array, "b c h w -> b h w c") if array.ndim == 4 else array


def parameters() -> list[Claim]:
    """Compare the numbers of parameters with timm's, without making any."""
    found = []
    for name in ARCHITECTURES:
        with torch.device("meta"):
            theirs = sum(value.numel() for value in timm.create_model(name).parameters())
        arguments = {"architecture": name, "num_classes": 1000}
        model = nnx.eval_shape(lambda arguments=arguments: networks.construct(arguments, rngs=nnx.Rngs(0)))
        ours = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        found.append(Claim(f"parameters of {name}, of {theirs:,}: difference", "timm", abs(ours - theirs), 0))
    return found


def published() -> list[Claim]:
    """Compare what is said of torchvision's files with torchvision."""
    found = []
    for name, ours in ARCHITECTURES.items():
        theirs = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        pairs = (Path(theirs.url).name, ours.published), (theirs.transforms().resize_size, [ours.resize])
        differing = sum(a != b for a, b in pairs)
        claim = f"file of {name}, and the shorter side of its images: differences"
        found.append(Claim(claim, "torchvision", differing, 0))
    return found
