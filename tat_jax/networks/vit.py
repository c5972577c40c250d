"""Vision transformers, whose attributes carry timm's names.

An Image is Worth 16x16 Words, Dosovitskiy et al., ICLR 2021, for AugReg's and DeiT's weights; DINOv2, Oquab
et al., with registers by Darcet et al.; DINOv3, Siméoni et al. They compute what timm's networks compute, of
which DINOv3's are of the type Eva; but pool the class token there, too, as their authors do.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Where
from tat_jax.fields import YES_OR_NO, Field, Rule, one_of, or_none, whole
from tat_jax.networks import taps, vit_names
from tat_jax.networks.architecture import Architecture
from tat_jax.networks.layers import LayerNorm, at_least_float32, normal
from tat_jax.networks.view import MEAN, STD
from tat_jax.networks.vit_layers import HEAD, Block, PatchEmbed, linear
from tat_jax.networks.vit_positions import resample, rotations


class Design(NamedTuple):
    """What a transformer is made of.

    Attributes:
        patch: height and width of a patch.
        width: channels of a token.
        depth: the number of blocks.
        grid: rows and columns of learned positions; None is DINOv3: rotations, layer scales that are arrays
            of the block, and normalisations that add 1e-5 to the variance in the place of 1e-6.
        registers: tokens beside the class token; with them, the class token has no position.
        layer_scale: each branch has a factor of each channel.
        gated: MLPs are SwiGLUs.
        bias: of the attention, see `Attention`.
    """

    patch: int
    width: int
    depth: int
    grid: int | None
    registers: int = 0
    layer_scale: bool = False
    gated: bool = False
    bias: str = "qkv"


class VisionTransformer(nnx.Module):
    """Classify images by attention between their patches.

    Its taps are `block0` … and `norm`, the tokens of patches as maps after each block and after the final
    normalisation, and `pooled`, what the head reads. Stochastic depth and dropout are left out: what is
    trained here has none.

    Args:
        design: what it is made of.
        num_classes: the number of logits; 0 is a network without a head, whose logits are None.
        position_antialias: how learned positions come to another grid, see `resample`.
        pooling: the head reads the class "token", or the "mean" of the patches', both after the final
            normalisation.
        dtype: the type of activations. Parameters are float32, or float64 if `dtype` is, and so are
            normalisations and softmax.
        rngs: the key stream `params`.
    """

    def __init__(
        self,
        design: Design,
        *,
        num_classes: int = 1000,
        position_antialias: bool = True,
        pooling: str = "token",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width, exact = design.width, at_least_float32(dtype)
        self.design = design
        self.dtype = jnp.dtype(dtype)
        self.position_antialias = position_antialias
        self.pooling = pooling
        self.patch_embed = PatchEmbed(design.patch, width, dtype=dtype, rngs=rngs)
        self.cls_token = nnx.Param(normal(1e-6)(rngs.params(), (1, 1, width), exact))
        if design.registers:
            self.reg_token = nnx.Param(normal(1e-6)(rngs.params(), (1, design.registers, width), exact))
        if design.grid is not None:
            positions = design.grid**2 + (not design.registers)
            self.pos_embed = nnx.Param(normal(0.02)(rngs.params(), (1, positions, width), exact))
        rotary = design.grid is None
        epsilon = 1e-5 if rotary else 1e-6
        scale = ("gamma" if rotary else "ls") if design.layer_scale else ""
        self.blocks = nnx.List(
            [
                Block(
                    width,
                    bias=design.bias,
                    gated=design.gated,
                    scale=scale,
                    epsilon=epsilon,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(design.depth)
            ]
        )
        self.norm = LayerNorm(width, epsilon=epsilon, dtype=dtype, rngs=rngs)
        self.head = linear(width, num_classes, dtype=dtype, rngs=rngs) if num_classes else None

    def __call__(
        self,
        images: Float[Array, "batch height width 3"],
        *,
        train: bool = False,
        where: Where | None = None,
    ) -> Float[Array, "batch classes"] | None:
        """Return the logits of normalised images.

        Args:
            images: normalised images, of any size that patches divide.
            train: no difference, as there are no statistics over the batch, nor is anything dropped.
            where: likewise.

        Raises:
            ValueError: the images are no whole number of patches.
        """
        x = self.patch_embed(self._checked(images).astype(self.dtype))
        rows, columns = x.shape[1:3]
        x, prefix = self._tokens(x)
        turned = (
            rotations(rows, columns, self._head_channels(), prefix=prefix, dtype=self.dtype)
            if self.design.grid is None
            else None
        )
        for i, block in enumerate(self.blocks):
            x = block(x, turned)
            taps.show(self, **{f"block{i}": rearrange(x[:, prefix:], "b (h w) c -> b h w c", h=rows)})
        x = self.norm(x)
        taps.show(self, norm=rearrange(x[:, prefix:], "b (h w) c -> b h w c", h=rows))
        pooled = x[:, 0]
        if self.pooling == "mean":
            exact = x[:, prefix:].astype(at_least_float32(x.dtype))
            pooled = reduce(exact, "b n c -> b c", "mean").astype(x.dtype)
        taps.show(self, pooled=pooled)
        return self.head(pooled) if self.head is not None else None

    def _checked(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch height width 3"]:
        patch, sides = self.design.patch, images.shape[1:3]
        if any(side % patch for side in sides):
            near = max(round(min(sides) / patch), 1) * patch
            raise ValueError(
                f"patches of {patch}×{patch} pixels do not divide images of {sides[0]}×{sides[1]}: give the "
                f"network another size, as image_size={near}"
            )
        return images

    def _head_channels(self) -> int:
        return self.design.width // self.blocks[0].attn.heads

    def _tokens(
        self, x: Float[Array, "batch rows columns width"]
    ) -> tuple[Float[Array, "batch tokens width"], int]:
        """Return patches' tokens behind those of class and registers, and how many those are."""
        batch, rows, columns, width = x.shape
        x = rearrange(x, "b h w c -> b (h w) c")
        prefix = [self.cls_token[...]] + ([self.reg_token[...]] if self.design.registers else [])
        if self.design.grid is not None:
            learned = self.pos_embed[...]
            of_class, of_patches = jnp.split(learned, [learned.shape[1] - self.design.grid**2], axis=1)
            grid = rearrange(of_patches, "1 (h w) c -> h w c", h=self.design.grid)
            grid = resample(grid, rows, columns, antialias=self.position_antialias)
            x = x + rearrange(grid, "h w c -> 1 (h w) c").astype(x.dtype)
            if of_class.shape[1]:
                prefix[0] = prefix[0] + of_class
        tokens = jnp.concatenate(prefix, axis=1).astype(x.dtype)
        repeated = jnp.broadcast_to(tokens, (batch, tokens.shape[1], width))
        return jnp.concatenate([repeated, x], axis=1), tokens.shape[1]


_WIDTH = Rule(
    f"a multiple of {HEAD}, which are the channels of a head, or a multiple of 4 below",
    lambda value: type(value) is int and value > 0 and value % (HEAD if value >= HEAD else 4) == 0,
)
_OPTIONS = {
    "depth": Field(int, or_none(whole(1)), "blocks of a transformer; None: as many as the architecture has"),
    "embed_dim": Field(int, or_none(_WIDTH), "channels of a transformer's tokens; None: the architecture's"),
    "pooling": Field(
        "token", one_of("token", "mean"), "what a transformer's head reads: the class token, or patches' mean"
    ),
}
_OF_LEARNED = {
    "position_grid": Field(
        int, or_none(whole(1)), "rows and columns of learned positions; None: as many as the architecture has"
    ),
    "position_antialias": Field(
        True,
        YES_OR_NO,
        "resample learned positions to other sizes as timm does; False: as DINOv2 without registers does in "
        "Hugging Face's library",
    ),
}


def _build(
    design: Design,
    *,
    depth: int | None = None,
    embed_dim: int | None = None,
    position_grid: int | None = None,
    bn_group: int | None = None,  # there is no normalisation by the batch
    **of_network: Any,
) -> VisionTransformer:
    made = design._replace(
        depth=depth or design.depth,
        width=embed_dim or design.width,
        grid=position_grid or design.grid,
    )
    return VisionTransformer(made, **of_network)


def _read_arguments(name: str, classes: int, entries: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the arguments of the network that entries under timm's names fit.

    Raises:
        ValueError: they are those of another architecture, which is named if there is one.
    """
    design, head = DESIGNS[name], entries.get("head.weight")
    if "dist_token" in entries:
        raise ValueError(f"it has a distillation token; {name} is the network that was trained without one")
    found = _design_of(design, entries)
    fitting = [
        other for other, of_other in DESIGNS.items() if _without_grid(of_other) == _without_grid(found)
    ]
    if fitting and name not in fitting:
        raise ValueError(f"it is {' or '.join(fitting)}, and no {name}")
    if found.registers != design.registers:
        raise ValueError(f"it has {found.registers} register tokens, and {name} has {design.registers}")
    if not _WIDTH.holds(found.width):
        raise ValueError(f"its tokens have {found.width} channels; allowed is {_WIDTH.allowed}")
    if head is not None and head.shape[1:] == (2 * found.width,):
        raise ValueError(
            "its head reads the class token beside the patches' mean, which no head does here: --head none "
            "or --head fresh leaves it out"
        )
    return {
        "num_classes": len(head) if head is not None and head.ndim == 2 else classes,
        "depth": found.depth if found.depth != design.depth else None,
        "embed_dim": found.width if found.width != design.width else None,
        **(
            {}
            if design.grid is None
            else {"position_grid": found.grid if found.grid != design.grid else None}
        ),
    }


def _without_grid(design: Design) -> tuple[Any, ...]:
    return (*design._replace(grid=None), design.grid is None)


def _design_of(named: Design, entries: Mapping[str, np.ndarray]) -> Design:
    """Return the design of a file, as far as it tells, and otherwise the one that was named."""
    stem, registers = entries.get("patch_embed.proj.weight"), entries.get("reg_token")
    # A stem with less behind each feature than colours and pixels may claim a width of any size.
    told = stem is not None and stem.shape[1:2] == (3,) and stem.shape[2:3] == stem.shape[3:] != ()
    first, second = (entries.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    gated = named.gated
    if first is not None and second is not None and first.ndim == second.ndim == 2:
        gated = len(first) == 2 * second.shape[1]
    depth = len({name.split(".")[1] for name in entries if re.match(r"blocks\.\d+\.", name)})
    attention = {"qkv": "blocks.0.attn.qkv.bias", "qv": "blocks.0.attn.q_bias"}
    return Design(
        patch=stem.shape[2] if stem is not None and told else named.patch,
        width=len(stem) if stem is not None and told else named.width,
        depth=depth or named.depth,
        grid=_grid_of(named, entries, prefix=registers is None),
        registers=registers.shape[1] if registers is not None and registers.ndim == 3 else 0,
        layer_scale="blocks.0.ls1.gamma" in entries or "blocks.0.gamma_1" in entries,
        gated=gated,
        bias=next((bias for bias, entry in attention.items() if entry in entries), ""),
    )


def _grid_of(named: Design, entries: Mapping[str, np.ndarray], *, prefix: bool) -> int | None:
    positions = entries.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return None if "blocks.0.gamma_1" in entries else named.grid
    count = positions.shape[1] - prefix
    grid = math.isqrt(max(count, 0))
    if not grid or grid**2 != count:
        token = " and one of the class token" if prefix else ""
        raise ValueError(f"its {positions.shape[1]:,} positions are not those of a square of patches{token}")
    return grid


_TINY, _SMALL, _BASE, _LARGE, _GIANT = (192, 12), (384, 12), (768, 12), (1024, 24), (1536, 40)
_SIZES = {"tiny": _TINY, "small": _SMALL, "base": _BASE, "large": _LARGE, "giant": _GIANT}


def _designs() -> dict[str, Design]:
    found = {}
    for size, (width, depth) in _SIZES.items():
        if size != "giant":
            found[f"vit_{size}_patch16_224"] = Design(16, width, depth, 14)
        if size in ("tiny", "small", "base"):
            found[f"deit_{size}_patch16_224"] = Design(16, width, depth, 14)
        if size != "tiny":
            dino = Design(14, width, depth, 37, layer_scale=True, gated=size == "giant")
            found[f"vit_{size}_patch14_dinov2"] = dino
            found[f"vit_{size}_patch14_reg4_dinov2"] = dino._replace(registers=4)
        if size in ("small", "base", "large"):
            turned = Design(16, width, depth, None, registers=4, layer_scale=True, bias="")
            found[f"vit_{size}_patch16_dinov3"] = turned
            found[f"vit_{size}_patch16_dinov3_qkvb"] = turned._replace(bias="qv")
    return found


DESIGNS = _designs()


def _architecture(name: str, design: Design) -> Architecture:
    headless = "dino" in name
    of_augreg = name.startswith("vit") and not headless
    half = (0.5, 0.5, 0.5)
    learned = _OF_LEARNED if design.grid is not None else {}
    return Architecture(
        build=functools.partial(_build, design),
        head="head",
        options=_OPTIONS | learned,
        read_arguments=functools.partial(_read_arguments, name, 0 if headless else 1000),
        found_at=vit_names.found_at(name),
        free=("pooling", *({"position_antialias"} & learned.keys())),
        translate=functools.partial(vit_names.translate, drop_zero_biases=design.bias == ""),
        least={"depth": 1},
        mean=half if of_augreg else MEAN,
        std=half if of_augreg else STD,
    )


ARCHITECTURES = {name: _architecture(name, design) for name, design in DESIGNS.items()}
