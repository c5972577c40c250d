"""What a family of networks says of each of its members; the families are the other files of this folder."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from tat_jax.fields import Field
from tat_jax.networks.view import MEAN, STD


class Architecture(NamedTuple):
    """A network that a config can name.

    Attributes:
        build: makes it, called as `build(num_classes=…, dtype=…, bn_group=…, rngs=…, **options)`.
        head: the path of the layer that makes logits of features, as in `fc`.
        options: the fields of a config that are its own.
        read_arguments: returns `num_classes` and the options of the network that entries under torchvision's
            names would fit, as far as they tell.
        published: the file of its weights that torchvision published; None where there is none.
        resize: the shorter side to which torchvision resizes images for them, before it crops 224² of them.
        found_at: where others publish a file of its weights, and on which terms, in words.
        free: those of its options that say how it is used, so that the same weights fit any value.
        backbone: the architecture from whose weights a student's attribute `backbone` may start.
        torch_modules: returns under which names PyTorch has the module at a path of ours: the first counts,
            any further ones are the same arrays again.
        translate: returns the entries of a file under the names of any library as those of the library whose
            names are ours: torchvision's, or timm's where a family says so.
        least: options with which it has no array that it has not with any other.
        mean: of the channels of its images, unless a config says otherwise.
        std: likewise.
    """

    build: Callable[..., nnx.Module]
    head: str
    options: Mapping[str, Field]
    read_arguments: Callable[[Mapping[str, np.ndarray]], dict[str, Any]]
    published: str | None = None
    resize: int = 256
    found_at: str = ""
    free: tuple[str, ...] = ()
    backbone: str | None = None
    torch_modules: Callable[[str], tuple[str, ...]] = lambda path: (path,)
    translate: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = dict
    least: Mapping[str, Any] = MappingProxyType({})
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
