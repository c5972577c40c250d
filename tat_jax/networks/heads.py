"""Heads that methods of distillation give networks: a teacher's classifier behind a projector; class maps."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Where
from tat_jax.fields import YES_OR_NO, Field, or_none, whole
from tat_jax.networks.layers import BatchNorm, at_least_float32, conv

_FACTOR = 2  # SimKD's, by which the projector is narrower within
OPTIONS: Mapping[str, Field] = {
    "projected": Field(
        int,
        or_none(whole(_FACTOR)),
        "channels to which SimKD's projector brings the last stage's maps, for a frozen head of as many; "
        "None: the head reads its own features",
    ),
    "head_bias": Field(True, YES_OR_NO, "whether the head adds a bias to each class; CAT-KD has none"),
}


class Frozen(nnx.BatchStat):
    """An array of a network that is kept with its weights, and not trained."""


class Projector(nnx.Module):
    """Bring maps to a teacher's channels: 1×1, 3×3 and 1×1 convolutions, each with BatchNorm and ReLU.

    Knowledge Distillation with the Reused Teacher Classifier (SimKD), Chen et al., CVPR 2022, section 3.2;
    the first two have half the channels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: DTypeLike = jnp.float32,
        bn_group: int | None = None,
        rngs: nnx.Rngs,
    ):
        inner = out_features // _FACTOR
        widths = (in_features, inner, inner, out_features)
        self.convs = nnx.List(
            conv(widths[i], widths[i + 1], size, dtype=dtype, rngs=rngs) for i, size in enumerate((1, 3, 1))
        )
        self.norms = nnx.List(BatchNorm(width, group=bn_group, dtype=dtype) for width in widths[1:])

    def __call__(
        self, x: Float[Array, "batch height width in_features"], *, train: bool, where: Where | None = None
    ) -> Float[Array, "batch height width out_features"]:
        """Return the projected maps."""
        for convolve, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(convolve(x), train=train, where=where))
        return x


def freeze(head: nnx.Linear) -> None:
    """Let a head not be trained."""
    for name in ("kernel", "bias"):
        if (array := getattr(head, name)) is not None:
            setattr(head, name, Frozen(array[...]))


def class_maps(
    x: Float[Array, "batch height width channels"], head: nnx.Linear
) -> Float[Array, "batch height width classes"]:
    """Return what each position adds to the logits, which are the mean over positions and the bias."""
    exact = at_least_float32(x.dtype)
    return jnp.einsum("bhwc,ck->bhwk", x.astype(exact), head.kernel[...].astype(exact))
