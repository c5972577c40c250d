"""The names that other libraries give to ConvNeXt's arrays, into timm's, which are ours."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Rules = tuple[tuple[str, str], ...]


class Spelling(NamedTuple):
    """How a library names the network.

    Attributes:
        stem: its name of the first kernel, by which it is told.
        within: what all of it but the head, or the last norm, may lie under.
        rules: patterns and what is in their place in timm's names, one after the other.
    """

    stem: str
    within: str
    rules: Rules


_SPELLINGS = (
    # facebookresearch/ConvNeXt and facebookresearch/dinov3
    Spelling(
        "downsample_layers.0.0.weight",
        "",
        (
            (r"^head\.", "head.fc."),
            (r"^norm\.", "head.norm."),
            (r"^downsample_layers\.0\.", "stem."),
            (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
            (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.dwconv\.", ".conv_dw."),
            (r"\.pwconv", ".mlp.fc"),
        ),
    ),
    # torchvision
    Spelling(
        "features.0.0.weight",
        "",
        (
            (r"^classifier\.0\.", "head.norm."),
            (r"^classifier\.2\.", "head.fc."),
            (r"^features\.0\.", "stem."),
            *((rf"^features\.{2 * i}\.", f"stages.{i}.downsample.") for i in (1, 2, 3)),
            *((rf"^features\.{2 * i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
            (r"\.block\.0\.", ".conv_dw."),
            (r"\.block\.2\.", ".norm."),
            (r"\.block\.3\.", ".mlp.fc1."),
            (r"\.block\.5\.", ".mlp.fc2."),
            (r"\.layer_scale$", ".gamma"),
        ),
    ),
    # Hugging Face: ConvNextModel and ConvNextForImageClassification
    Spelling(
        "embeddings.patch_embeddings.weight",
        "convnext.",
        (
            (r"^classifier\.", "head.fc."),
            (r"^layernorm\.", "head.norm."),
            (r"^embeddings\.patch_embeddings\.", "stem.0."),
            (r"^embeddings\.layernorm\.", "stem.1."),
            (r"^encoder\.stages\.", "stages."),
            (r"\.downsampling_layer\.", ".downsample."),
            (r"\.layers\.", ".blocks."),
            (r"\.dwconv\.", ".conv_dw."),
            (r"\.layernorm\.", ".norm."),
            (r"\.pwconv", ".mlp.fc"),
            (r"\.layer_scale_parameter$", ".gamma"),
        ),
    ),
    # Hugging Face: DINOv3ConvNextModel
    Spelling(
        "stages.0.downsample_layers.0.weight",
        "model.",
        (
            (r"^layer_norm\.", "head.norm."),
            (r"^stages\.0\.downsample_layers\.", "stem."),
            (r"\.downsample_layers\.", ".downsample."),
            (r"\.layers\.", ".blocks."),
            (r"\.depthwise_conv\.", ".conv_dw."),
            (r"\.layer_norm\.", ".norm."),
            (r"\.pointwise_conv", ".mlp.fc"),
        ),
    ),
)


def translate(entries: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return entries of facebookresearch, torchvision or Hugging Face under timm's names.

    Prefixes around a network stay, and so do other entries.

    Raises:
        ValueError: two of them would have one name.
    """
    networks = {
        name.removesuffix(spelling.stem).removesuffix(spelling.within): spelling
        for spelling in _SPELLINGS
        for name in entries
        if f".{name}".endswith(f".{spelling.stem}")
    }
    found: dict[str, np.ndarray] = {}
    for name, array in entries.items():
        around = max((prefix for prefix in networks if name.startswith(prefix)), key=len, default=None)
        known = name if around is None else around + _renamed(name.removeprefix(around), networks[around])
        if _is_double(name, array, entries):
            continue
        if known in found:
            raise ValueError(f"{name} and another tensor would both be {known}")
        # torchvision's scales are [channels, 1, 1].
        found[known] = array[:, 0, 0] if known != name and array.shape[1:] == (1, 1) else array
    return found


def _renamed(name: str, spelling: Spelling) -> str:
    name = name.removeprefix(spelling.within)
    for pattern, replacement in spelling.rules:
        name = re.sub(pattern, replacement, name)
    return name


def _is_double(name: str, array: np.ndarray, entries: Mapping[str, np.ndarray]) -> bool:
    """Return whether an array is the last norm's under its further name in DINOv3."""
    norm = entries.get(name.replace("norms.3.", "norm.")) if "norms.3." in name else None
    return norm is not None and np.array_equal(norm, array)
