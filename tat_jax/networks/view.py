"""A network as the rest of the house sees it: images in, logits and taps out, whatever the network."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from tat_jax.batch import Images, Where
from tat_jax.networks.layers import at_least_float32
from tat_jax.networks.precision import widened
from tat_jax.networks.taps import keeping, modules_of, read

# torchvision's statistics of ImageNet, in units of the full range of a pixel.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_LAYOUT = "b h w c"
_WAY_OUT = "give its View the `layout`, `image_size` or `call` that it needs"


class Outputs(NamedTuple):
    """What a network gives for a batch of images.

    Attributes:
        logits: [batch, classes], or [batch, height, width, classes]; None of a network without a head.
        taps: by name, feature maps [batch, height, width, channels], tokens [batch, positions, channels] or
            features [batch, channels].
    """

    logits: Array | None
    taps: dict[str, Array]


OutputShapes = Any  # Outputs with jax.ShapeDtypeStruct in the place of arrays


class View(nnx.Module):
    """A network, how it is called, which images it wants and what is read within it.

    A call is made on a copy of the network. In training it shares the network's variables, so that statistics
    are updated; whatever else a forward pass hangs on its modules vanishes with the copy.

    Args:
        network: any nnx module; it is left as it is.
        mean: of its images' channels, in units of the full range of a pixel.
        std: likewise.
        image_size: the height and width it wants, to which images are resized; None takes them as they are.
        call: called as `call(network, images, train=…, where=…)`, returns logits or `Outputs`. None calls
            `network(images)`, and in training `network(images, train=True, where=where)`. In evaluation,
            `network.eval()` has been called before.
        layout: the order of the axes of its images and maps, as einops has it; `b c h w` in PyTorch.
        prefix_tokens: so many first tokens are no position, as a class token is none, and are left out.
        tokens_as_maps: tokens are positions of a square grid, row by row, and shown as a map.
        taps: what is read besides all that the network sows: names that it sows, or paths of modules whose
            output is meant, as in `blocks.3.mlp`. Of a name that is both, what is sown.

    Raises:
        ValueError: `layout` is no order of these axes.
    """

    def __init__(
        self,
        network: nnx.Module,
        *,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        image_size: int | None = None,
        call: Callable[..., Any] | None = None,
        layout: str = _LAYOUT,
        prefix_tokens: int = 0,
        tokens_as_maps: bool = False,
        taps: Sequence[str] = (),
    ):
        if sorted(layout.split()) != sorted(_LAYOUT.split()):
            raise ValueError(f"layout={layout!r} is no order of the axes {_LAYOUT}")
        self.network = network
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.image_size = image_size
        self.call = call
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.tokens_as_maps = tokens_as_maps
        self.taps = tuple(taps)

    def __call__(self, images: Images, *, train: bool = False, where: Where | None = None) -> Outputs:
        """Return logits and taps of a batch.

        Args:
            images: pixels in uint8; or in floating point, normalised already.
            train: what the network does in training.
            where: the images that count in statistics over the batch; None is all.

        Raises:
            ValueError: the network cannot be called so, or has no such tap.
        """
        batch = jnp.asarray(images)
        graph, state = nnx.split(self.network)
        network = nnx.merge(graph, widened(state), copy=not train)
        if not train:
            network.eval()
        modules = modules_of(network)
        call = self.call or _call
        with keeping(modules, self.taps):
            prepared = self._prepare(batch)
            try:
                given = call(network, prepared, train=train, where=where)
            except Exception as error:  # whatever a network raises
                error.add_note(_WAY_OUT)
                raise
        given = given if isinstance(given, Outputs) else Outputs(given, {})
        if wrong := _no_logits(given.logits, len(batch)):
            raise ValueError(
                f"{type(network).__name__} returns {wrong}, not logits; give its View a `call` that returns "
                "logits or Outputs"
            )
        taps = read(self.taps, modules, given.taps, batch=len(batch))
        logits = None if given.logits is None else self._as_map(given.logits)
        return Outputs(logits, self._as_taps(taps))

    def _prepare(self, images: Array) -> Float[Array, "batch _ _ _"]:
        """Return a batch in the network's size, statistics and layout."""
        size, are_pixels = self.image_size, images.dtype == jnp.uint8
        if size is not None and images.shape[1:3] != (size, size):
            images = images.astype(at_least_float32(images.dtype))
            images = jax.image.resize(images, (len(images), size, size, 3), "bilinear")  # with antialias
        images = _standardize(images, self.mean, self.std) if are_pixels else images
        return rearrange(images, f"{_LAYOUT} -> {self.layout}")

    def _as_map(self, value: Array) -> Array:
        return rearrange(value, f"{self.layout} -> {_LAYOUT}") if value.ndim == 4 else value

    def _as_taps(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Return taps in the layout of ours; those that cannot be are left out unless they are wanted."""
        taps = {}
        for name, value in values.items():
            if not (wrong := self._unfit(value)):
                taps[name] = self._as_tap(value)
            elif name in self.taps:
                raise ValueError(f"no tap {name}: {wrong}")
        return taps

    def _as_tap(self, value: Array) -> Array:
        if value.ndim != 3:
            return self._as_map(value)
        positions = value[:, self.prefix_tokens :]
        if not self.tokens_as_maps:
            return positions
        return rearrange(positions, "b (h w) c -> b h w c", h=math.isqrt(positions.shape[1]))

    def _unfit(self, value: Array) -> str:
        """Return why tokens are not the positions that the view says they are, or nothing."""
        count = value.shape[1] - self.prefix_tokens if value.ndim == 3 else 1
        if count < 1:
            return f"its {value.shape[1]} tokens leave none after prefix_tokens={self.prefix_tokens}"
        if self.tokens_as_maps and math.isqrt(count) ** 2 != count:
            return f"its {count} tokens after prefix_tokens={self.prefix_tokens} are no square grid"
        return ""


def _no_logits(given: Any, batch: int) -> str:
    """Return what a network gives in the place of logits, or nothing."""
    if given is None:
        return ""
    if not isinstance(given, jax.Array):
        return f"a {type(given).__name__}"
    if given.shape[:1] != (batch,) or not jnp.issubdtype(given.dtype, jnp.floating):
        return f"{given.dtype}{list(given.shape)} for {batch} images"
    return ""


def _call(network: Any, images: Array, *, train: bool, where: Where | None) -> Any:
    if not train:
        return network(images)
    try:
        inspect.signature(network).bind(images, train=True, where=where)
    except TypeError as error:
        raise ValueError(
            f"{type(network).__name__} cannot be called as network(images, train=True, where=…), as in "
            f"training: {error}; give its View a `call` of its own"
        ) from None
    return network(images, train=True, where=where)


def normalize(images: Images, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Array:
    """Return uint8 pixels as (x / 255 − mean) / std; images in floating point are normalised already."""
    images = jnp.asarray(images)
    return _standardize(images, mean, std) if images.dtype == jnp.uint8 else images


def _standardize(pixels: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    shift, scale = (rearrange(np.array(value, np.float32), "c -> 1 1 1 c") for value in (mean, std))
    return (pixels / np.float32(255) - shift) / scale


def watch(view: View, names: Sequence[str], image_size: int) -> OutputShapes:
    """Make a view tap what `names` says, besides what it taps already.

    Args:
        view: of a network.
        names: of what it sows, or paths of its modules.
        image_size: height and width of the data's images.

    Returns:
        The shapes and types of its outputs for one image, without computing them.

    Raises:
        ValueError: it has no such tap; what it sows and the nearest modules are named.
    """
    before, view.taps = view.taps, tuple(dict.fromkeys((*view.taps, *names)))
    graph, state = nnx.split(view)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    try:
        return jax.eval_shape(lambda state, image: nnx.merge(graph, state)(image), state, image)
    except Exception as error:
        view.taps = before
        is_ours = type(view.network).__module__.startswith("tat_jax.")
        if is_ours or _WAY_OUT not in getattr(error, "__notes__", ()):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{type(view.network).__name__} does not take images of {image_size}×{image_size} in the layout "
            f"`{view.layout}`: {said}; {_WAY_OUT}"
        ) from None
