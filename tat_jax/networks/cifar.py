"""What networks for CIFAR's images of 32×32 pixels have in common; the families are files of their own.

They are those of RepDistiller (https://github.com/HobbitLong/RepDistiller), under whose names they convert,
and of mdistiller. Their taps are what it calls features: `stem`, the maps `stage1` …, `stage1_preact` … the
same before the last activation, `class_maps`, what each position adds to the logits, and `pooled`, the
vectors that the head reads; of one with SimKD's projector `projected`, too.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from tat_jax.batch import Where
from tat_jax.networks.architecture import Architecture
from tat_jax.networks.heads import OPTIONS, Projector, class_maps, freeze
from tat_jax.networks.layers import at_least_float32, torch_uniform, uniform
from tat_jax.networks.taps import show

CLASSES = 100
MEAN = (0.5071, 0.4867, 0.4408)  # of CIFAR-100 as published, and likewise:
STD = (0.2675, 0.2565, 0.2761)

Maps = Float[Array, "batch height width channels"]
Out = Float[Array, "batch h w c"]
Taps = dict[str, Float[Array, "batch *_"]]


class CifarNetwork(nnx.Module):
    """Classify images by the maps that a subclass makes of them.

    A subclass builds its layers, calls `_add_head`, and says in `maps` what the images become.
    """

    fc: nnx.Linear | None
    dtype: jnp.dtype
    projector: Projector | None = None

    def _add_head(
        self,
        features: int,
        num_classes: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = torch_uniform,
        bias_init: nnx.Initializer | None = None,
    ) -> None:
        """Add the layer that makes logits of features, drawn as PyTorch does unless said otherwise."""
        self.dtype = jnp.dtype(dtype)
        self.fc = (
            nnx.Linear(
                features,
                num_classes,
                dtype=dtype,
                param_dtype=at_least_float32(dtype),
                kernel_init=kernel_init,
                bias_init=bias_init or uniform(features**-0.5),
                rngs=rngs,
            )
            if num_classes
            else None
        )

    def change_head(
        self, *, projected: int | None, head_bias: bool, bn_group: int | None, rngs: nnx.Rngs
    ) -> None:
        """Change the head that there is to the one that `heads.OPTIONS` describe."""
        if self.fc is None:
            return
        if projected:
            images = jax.ShapeDtypeStruct((1, 32, 32, 3), self.dtype)
            taps = nnx.eval_shape(lambda x: self.maps(x, train=False, where=None)[1], images)
            channels, classes = taps[_last_stage(taps)].shape[-1], self.fc.out_features
            self.projector = Projector(channels, projected, dtype=self.dtype, bn_group=bn_group, rngs=rngs)
            self._add_head(projected, classes, dtype=self.dtype, rngs=rngs)
            freeze(self.fc)
        if not head_bias:
            self.fc.use_bias, self.fc.bias = False, None

    def _by_sums(
        self, x: Maps, stages: Iterable[Iterable[Any]], *, train: bool, where: Where | None
    ) -> tuple[Out, Taps]:
        """Return the maps behind stages of blocks that end with the ReLU of a sum, and their taps."""
        taps: Taps = {"stem": x}
        for i, stage in enumerate(stages, start=1):
            for block in stage:
                total = block.before_relu(x, train=train, where=where)
                x = nnx.relu(total)
            taps |= {f"stage{i}": x, f"stage{i}_preact": total}
        return x, taps

    def maps(self, images: Maps, *, train: bool, where: Where | None) -> tuple[Out, Taps]:
        """Return the maps whose means the head reads, and the taps."""
        raise NotImplementedError

    def __call__(
        self, images: Maps, *, train: bool = False, where: Where | None = None
    ) -> Float[Array, "batch classes"] | None:
        """Return the logits of normalised images; without a head, None.

        Args:
            images: normalised images.
            train: normalise by batch statistics and update the running ones.
            where: the images that count in batch statistics; None is all.
        """
        last, taps = self.maps(images.astype(self.dtype), train=train, where=where)
        if self.projector is not None:
            last = taps["projected"] = self.projector(taps[_last_stage(taps)], train=train, where=where)
        if self.fc is not None:
            taps["class_maps"] = class_maps(last, self.fc)
        pooled = reduce(last.astype(at_least_float32(last.dtype)), "b h w c -> b c", "mean")
        show(self, **taps, pooled=pooled)
        return None if self.fc is None else self.fc(pooled.astype(self.dtype))


def _last_stage(names: Iterable[str]) -> str:
    return max(name for name in names if name.startswith("stage") and name[5:].isdigit())


def architecture(
    build: Callable[..., CifarNetwork],
    *,
    head: str = "fc",
    torch_modules: Callable[[str], str] = lambda path: path,
) -> Architecture:
    """Return a network for CIFAR as a config can name it.

    Args:
        build: makes it.
        head: what RepDistiller calls the layer that makes logits; `fc` here.
        torch_modules: returns what it calls the module at any other path of ours.
    """

    def built(
        *,
        projected: int | None = None,
        head_bias: bool = True,
        bn_group: int | None = None,
        **of_network: Any,
    ) -> nnx.Module:
        network = build(bn_group=bn_group, **of_network)
        network.change_head(
            projected=projected, head_bias=head_bias, bn_group=bn_group, rngs=of_network["rngs"]
        )
        return network

    def in_torch(path: str) -> tuple[str]:
        return (head if path == "fc" else torch_modules(path),)

    def read_arguments(entries: Mapping[str, np.ndarray]) -> dict[str, Any]:
        weight = entries.get(f"{head}.weight")
        return {"num_classes": len(weight) if weight is not None and weight.ndim == 2 else CLASSES}

    return Architecture(
        build=built,
        head="fc",
        options=OPTIONS,
        read_arguments=read_arguments,
        torch_modules=in_torch,
        found_at="RepDistiller's and mdistiller's checkpoints, under the names of the former's networks",
        mean=MEAN,
        std=STD,
    )
