"""Vision transformers beside timm's and Hugging Face's, with random weights that are theirs.

Each network of theirs is saved as its library does, converted by the command, and asked for all its taps at
its own image size and two others.
"""

import contextlib
import functools
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import safetensors.torch
import torch
from flax import nnx

from proofs.fidelity.claim import Claim
from proofs.others import timm
from proofs.rounding import relative_error
from tat_jax import convert, networks
from tat_jax.networks.view import View
from tat_jax.networks.vit import DESIGNS
from tat_jax.weights import store
from tat_jax.weights.names import export_entries, to_torch, torch_names

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Hugging Face's library will drop
    import transformers

BOUNDS = {"float32": 1e-4, "float64": 1e-9}


class Size(NamedTuple):
    """How large a network is.

    Attributes:
        width: channels of a token.
        depth: the number of blocks.
        grid: rows and columns of patches at its own image size; None is the published one.
    """

    width: int
    depth: int
    grid: int | None


PUBLISHED = Size(384, 4, None)  # of a ViT-S, but for two thirds of its blocks
SMALL = Size(128, 2, 4)

# timm's networks; the last one's SwiGLU needs a width at which its inner channels are the authors'.
OF_TIMM = (
    "vit_small_patch16_224",
    "deit_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_giant_patch14_dinov2",
)
OF_HUGGING_FACE = (
    "vit_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3_qkvb",
    "vit_giant_patch14_dinov2",
)
_CLASSES = 10


class Other(NamedTuple):
    """A network of another library.

    Attributes:
        name: of the architecture.
        library: whose it is.
        model: the network.
        call: returns what it pools, and logits where it has a head.
        blocks: its blocks.
        norm: its last normalisation.
        size: of its images.
        options: of our network beside its weights.
        save: writes its weights into a folder.
    """

    name: str
    library: str
    model: Any
    call: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    blocks: Any
    norm: Any
    size: int
    options: dict[str, Any]
    save: Callable[[Path], None]


def claims(
    size: Size = PUBLISHED,
    *,
    of_timm: Sequence[str] = OF_TIMM,
    of_hugging_face: Sequence[str] = OF_HUGGING_FACE,
    dtypes: Sequence[str] = tuple(BOUNDS),
) -> list[Claim]:
    """Compare the names and shapes of full-size networks, and the taps of networks of each kind.

    Args:
        size: of the networks whose taps are compared; a giant has two blocks.
        of_timm: which of timm's.
        of_hugging_face: which of Hugging Face's.
        dtypes: the types of activations.
    """
    found = [_names_claim(tuple(DESIGNS) if size == PUBLISHED else of_timm)]
    for name in of_timm:
        found += _claims_of(functools.partial(_timm, name, size), dtypes)
    for name in of_hugging_face:
        found += _claims_of(functools.partial(_hugging_face, name, size), dtypes)
    return found


def _names_claim(names: Sequence[str]) -> Claim:
    different = 0
    for name in names:
        theirs = timm.create_model(name, num_classes=_CLASSES, device="meta").state_dict()
        arguments = {"architecture": name, "num_classes": _CLASSES}
        ours = nnx.eval_shape(functools.partial(_with_random_weights, arguments))
        shapes = {
            torch_names(path, name)[0]: to_torch(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
            for path, leaf in store.network_weights(ours).items()
        }
        different += shapes != {entry: tuple(array.shape) for entry, array in theirs.items()}
    claim = f"vision transformers whose arrays have other names or shapes, of {len(names)}"
    return Claim(claim, "timm", different, 0)


def _with_random_weights(arguments: dict[str, Any]) -> nnx.Module:
    return networks.construct(arguments, rngs=nnx.Rngs(0))


def _claims_of(make: Callable[[], Other], dtypes: Sequence[str]) -> list[Claim]:
    found = []
    for dtype in dtypes:
        other = make()
        worst, differing = _compare(other, dtype)
        whose = f"{other.library}, random weights"
        if other.library == "timm":
            found.append(
                Claim(f"{other.name}: tensors that differ, there and back, {dtype}", whose, differing, 0)
            )
        claim = f"{other.name}: worst tap or output at three image sizes in {dtype}"
        found.append(Claim(claim, whose, worst, BOUNDS[dtype]))
    return found


def _compare(other: Other, dtype: str) -> tuple[float, int]:
    """Return the largest error, and how many tensors are others after they came and went."""
    other.model.eval().to(getattr(torch, dtype))
    randomize(other.model)
    patch = DESIGNS[other.name].patch
    sides = other.size // patch
    sizes = [(sides, sides), (max(sides - 2, 1), sides + 1), (sides // 2, sides // 2)]
    with jax.enable_x64(dtype == "float64"):
        view, differing = _converted(other, dtype)
        worst = 0.0
        for rows, columns in sizes:
            images = np.random.default_rng(0).normal(size=(2, rows * patch, columns * patch, 3)).astype(dtype)
            ours, theirs = _ours(view, images), _theirs(other, images, dtype)
            if ours.keys() != theirs.keys():
                return float("inf"), differing
            worst = max(worst, *(relative_error(ours[name], theirs[name]) for name in theirs))
    return worst, differing


def randomize(model: torch.nn.Module) -> None:
    """Draw all parameters, so that each block and each array matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, array in model.named_parameters():
            noise = torch.randn(array.shape, generator=generator).to(array.dtype)
            if array.ndim in (2, 4) and not name.endswith("token"):
                noise *= (array.numel() / len(array)) ** -0.5
            elif array.ndim == 1:
                noise = 0.1 * noise + (0 if name.endswith("bias") else 0.7)
            array.copy_(noise)


def _converted(other: Other, dtype: str) -> tuple[View, int]:
    """Return our network with the other's weights, by the command, and how many tensors are others.

    The names of what is exported are timm's, so that only its own network can tell.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        other.save(folder)
        to = folder / "converted"
        with contextlib.redirect_stdout(io.StringIO()):
            convert.main([other.name, "--from", str(folder), "--to", str(to)])
        stored = store.load_network(to)
    differing = 0
    if other.library == "timm":
        exported, state = export_entries(stored), other.model.state_dict()
        differing = len(exported.keys() ^ state.keys()) + sum(
            not np.array_equal(array, state[name].numpy())
            for name, array in exported.items()
            if name in state
        )
    arguments = stored.arguments | other.options
    network = networks.construct(arguments, dtype=dtype, rngs=nnx.Rngs(0))
    store.set_weights(network, stored.weights, source=other.name)
    return View(network), differing


def _ours(view: View, images: np.ndarray) -> dict[str, np.ndarray]:
    graph, state = nnx.split(view)
    logits, taps = jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)
    found = {name: np.asarray(tap).reshape(len(tap), -1, tap.shape[-1]) for name, tap in taps.items()}
    found["pooled"] = found["pooled"][:, 0]
    return found if logits is None else found | {"logits": np.asarray(logits)}


def _theirs(other: Other, images: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Return the patches' tokens after each block, and the rest."""
    kept: dict[str, torch.Tensor] = {}
    modules = {**{f"block{i}": block for i, block in enumerate(other.blocks)}, "norm": other.norm}
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: kept.update({name: output}))
        for name, module in modules.items()
    ]
    exact = _resampling_in_float64() if dtype == "float64" else contextlib.nullcontext()
    with torch.no_grad(), exact:
        kept |= other.call(torch.from_numpy(images).permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()
    prefix = 1 + DESIGNS[other.name].registers
    return {name: (x[:, prefix:] if x.ndim == 3 else x).numpy() for name, x in kept.items()}


@contextlib.contextmanager
def _resampling_in_float64() -> Iterator[None]:
    """Let PyTorch resample positions in float64, which both libraries cast to float32 before."""
    to = torch.Tensor.to

    def unless_float32(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if torch.float32 in (*arguments, options.get("dtype")):
            return tensor
        return to(tensor, *arguments, **options)

    with (
        mock.patch.object(torch.Tensor, "float", lambda tensor: tensor),
        mock.patch.object(torch.Tensor, "to", unless_float32),
    ):
        yield


def _timm(name: str, size: Size) -> Other:
    design, size = DESIGNS[name], _of_giant(name, size)
    side = (size.grid or design.grid or 16) * design.patch
    classes = 0 if "dino" in name else _CLASSES
    model = timm.create_model(
        name,
        img_size=side,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.width // 64,
        num_classes=classes,
        dynamic_img_size=True,
        global_pool="token",
    )

    def call(images: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        return {"pooled": pooled} | ({"logits": model.head(pooled)} if classes else {})

    def save(folder: Path) -> None:
        safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")

    return Other(name, "timm", model, call, model.blocks, model.norm, side, {}, save)


def _of_giant(name: str, size: Size) -> Size:
    """Return the size of a giant, whose inner channels are those of its authors and of timm."""
    return Size(384, 2, 4) if "giant" in name else size


def _hugging_face(name: str, size: Size) -> Other:
    design, size = DESIGNS[name], _of_giant(name, size)
    side = (size.grid or design.grid or 16) * design.patch
    common: dict[str, Any] = {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.width // 64,
        "intermediate_size": 4 * size.width,
        "image_size": side,
        "patch_size": design.patch,
    }
    registers = {"num_register_tokens": 4}
    options: dict[str, Any] = {"position_antialias": bool(design.registers)}
    if "dinov3" in name:
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**common, **registers))
        blocks, body, norm, options = model.model.layer, model, model.norm, {}
        model.rope_embeddings = _Rotations(model.config)
    elif "reg4" in name:
        config = transformers.Dinov2WithRegistersConfig(**common, **registers)
        model = body = transformers.Dinov2WithRegistersModel(config)
        blocks, norm = model.encoder.layer, model.layernorm
    elif "dinov2" in name:
        config = transformers.Dinov2Config(**common, use_swiglu_ffn=design.gated)
        model = body = transformers.Dinov2Model(config)
        blocks, norm = model.encoder.layer, model.layernorm
    else:
        # Its default adds 1e-12 to the variance, timm and the networks that were trained 1e-6.
        config = transformers.ViTConfig(**common, layer_norm_eps=1e-6, num_labels=_CLASSES)
        model = transformers.ViTForImageClassification(config)
        body, blocks, norm = model.vit, model.vit.layers, model.vit.layernorm
    resampling = {"interpolate_pos_encoding": True} if body is not model else {}

    def call(images: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = body(images, **resampling).last_hidden_state[:, 0]
        return {"pooled": pooled} | ({} if body is model else {"logits": model.classifier(pooled)})

    def save(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size="1MB")  # several files and an index

    return Other(name, "transformers", model, call, blocks, norm, side, options, save)


class _Rotations(torch.nn.Module):
    """timm's rotations: Hugging Face's are computed in float32 whatever the type of the network."""

    def __init__(self, config: Any):
        super().__init__()
        self.patch = config.patch_size
        self.of_timm = timm.layers.RotaryEmbeddingDinoV3(
            config.hidden_size // config.num_attention_heads, temperature=config.rope_theta
        )
        self.own = transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTRopePositionEmbedding(config)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if images.dtype == torch.float32:
            cosines, sines = self.own(images)
            return cosines, sines
        rows, columns = (side // self.patch for side in images.shape[2:])
        sines, cosines = self.of_timm.get_embed((rows, columns)).chunk(2, -1)
        return cosines, sines
