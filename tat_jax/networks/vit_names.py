"""The names that other libraries give to a vision transformer's arrays, into timm's, which are ours.

Those of Hugging Face's library are read as it saves them and as its modules are called, those of
facebookresearch where they differ from timm's.
"""

import re
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

Arrays: TypeAlias = dict[str, np.ndarray]
Rules: TypeAlias = tuple[tuple[str, str], ...]  # patterns and what is in their place

# What Hugging Face's networks with a head have around the network without.
_WITHIN = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.")
_HUGGING_FACE = (
    (r"^classifier\.", "head."),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?(?=weight|bias)", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(encoder\.layer|model\.layer|layers|layer)\.(\d+)\.", r"blocks.\2."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".attn.\2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(weights_out|down_proj)\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
_FACEBOOK = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # in chunks, as training keeps them
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^storage_tokens$", "reg_token"),
)
# What is of use in training alone, or follows from the architecture.
_LEFT_OUT = re.compile(
    r"^(mask_token|pooler\.dense\.(weight|bias)|rope_embed\.periods|local_cls_norm\.(weight|bias))$"
    r"|^blocks\.\d+\.attn\.qkv\.bias_mask$"
)


def translate(entries: Mapping[str, np.ndarray], *, drop_zero_biases: bool) -> Arrays:
    """Return entries of Hugging Face or facebookresearch under timm's names.

    Queries, keys and values become one array, as do the two halves of a SwiGLU. With registers, DINOv2's
    class token takes up its position, as in timm. Prefixes around a network stay, and so do other entries.

    Args:
        entries: of a file.
        drop_zero_biases: leave out biases of queries and values that are zero, as DINOv3's are, for a network
            that has none.

    Raises:
        ValueError: two entries would have one name.
    """
    networks: dict[str, tuple[str, Rules]] = {}
    for name in entries:
        if f".{name}".endswith(".cls_token"):
            around = name.removesuffix("cls_token")
            if f".{around}".endswith(".embeddings."):
                above = around.removesuffix("embeddings.")
                within = next((w for w in _WITHIN if f".{above}".endswith(f".{w}")), "")
                networks[above.removesuffix(within)] = (within, _HUGGING_FACE)
            else:
                networks[around] = ("", _FACEBOOK)
    found: Arrays = {}
    of_networks: dict[str, Arrays] = {around: {} for around in networks}
    lengths = sorted({len(around) for around in networks}, reverse=True)
    for name, array in entries.items():
        prefix = next((name[:length] for length in lengths if name[:length] in networks), None)
        if prefix is None:
            found[name] = array
            continue
        known = _renamed(name.removeprefix(prefix), *networks[prefix])
        if known in of_networks[prefix]:
            raise ValueError(f"{name} and another tensor would both be {prefix}{known}")
        if not _LEFT_OUT.search(known):
            of_networks[prefix][known] = array
    for around, arrays in of_networks.items():
        fused = _fused(arrays)
        if drop_zero_biases:
            fused = {
                n: a for n, a in fused.items() if not (n.endswith((".q_bias", ".v_bias")) and not a.any())
            }
        found |= {around + name: array for name, array in fused.items()}
    return found


def _renamed(name: str, within: str, rules: Rules) -> str:
    name = name.removeprefix(within)
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _fused(arrays: Arrays) -> Arrays:
    """Return the arrays of a network as timm has them."""
    found = dict(arrays)
    for block in {name.split(".")[1] for name in arrays if re.match(r"blocks\.\d+\.", name)}:
        of_block = f"blocks.{block}."
        _fuse(found, f"{of_block}attn.", ("q.weight", "k.weight", "v.weight"), "qkv.weight")
        if f"{of_block}attn.k.bias" in found:
            _fuse(found, f"{of_block}attn.", ("q.bias", "k.bias", "v.bias"), "qkv.bias")
        for leaf in ("weight", "bias"):
            _fuse(found, f"{of_block}mlp.", (f"gate_proj.{leaf}", f"up_proj.{leaf}"), f"fc1.{leaf}")
            _rename(found, f"{of_block}mlp.up_proj.{leaf}", f"{of_block}mlp.fc1.{leaf}")
    if "register_tokens" in found:
        _rename(found, "register_tokens", "reg_token")
        _place_class_token(found)
    if "pos_embed" not in found and "reg_token" in found:
        _as_dinov3(found)
    return found


def _fuse(found: Arrays, prefix: str, parts: tuple[str, ...], whole: str) -> None:
    """Put arrays one above the other, where all are there and fit."""
    names = [prefix + part for part in parts]
    if any(name not in found or not found[name].ndim for name in names):
        return
    if len({(found[name].shape, found[name].dtype) for name in names}) == 1:
        found[prefix + whole] = np.concatenate([found.pop(name) for name in names])


def _rename(found: Arrays, name: str, now: str) -> None:
    if name in found and now not in found:
        found[now] = found.pop(name)


def _place_class_token(found: Arrays) -> None:
    """Add its position to the class token, as the network does, in float32 at least."""
    token, positions = found.get("cls_token"), found.get("pos_embed")
    if token is None or positions is None or positions.ndim != 3 or token.shape != positions[:, :1].shape:
        return
    exact = np.promote_types(np.float32, token.dtype) if token.dtype.kind == "f" else np.float32
    found["cls_token"] = token.astype(exact) + positions[:, :1].astype(exact)
    found["pos_embed"] = positions[:, 1:]


def _as_dinov3(found: Arrays) -> None:
    """Give factors and biases the names that they have in timm's network of type Eva."""
    for name in list(found):
        if scale := re.fullmatch(r"(blocks\.\d+\.)ls(\d)\.gamma", name):
            _rename(found, name, f"{scale[1]}gamma_{scale[2]}")
        elif part := re.fullmatch(r"(blocks\.\d+\.attn\.)(q|v)\.bias", name):
            _rename(found, name, f"{part[1]}{part[2]}_bias")
        elif name.endswith(".attn.qkv.bias") and found[name].ndim == 1 and len(found[name]) % 3 == 0:
            query, _, value = np.split(found.pop(name), 3)  # that of keys is masked, and changes nothing
            attention = name.removesuffix("qkv.bias")
            found |= {f"{attention}q_bias": query, f"{attention}v_bias": value}


def found_at(name: str) -> str:
    """Return where a file of a network's weights is published, and on which terms, in words."""
    timm = "model.safetensors from https://huggingface.co/timm/"
    size = name.split("_")[1]
    if "dinov3" in name:
        return (
            f"{timm}{name}.lvd1689m or .../facebook/dinov3-vit{size[0]}16-pretrain-lvd1689m, once you have "
            "accepted Meta's DINOv3 licence there"
        )
    if "dinov2" in name:
        model = f"dinov2_vit{size[0]}14"
        registers = "_reg4" if "reg4" in name else ""
        return (
            f"{timm}{name}.lvd142m or https://dl.fbaipublicfiles.com/dinov2/{model}/{model}{registers}"
            "_pretrain.pth"
        )
    return f"{timm}{name}.{'fb_in1k' if name.startswith('deit') else 'augreg_in21k_ft_in1k'}"
