"""How the inputs of recorded figures are drawn from their names, in float64."""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from einops import rearrange


def draw(name: str, shape: Sequence[int], scale: float = 1.0) -> np.ndarray:
    """Draw the array called `name`, in PyTorch's layout."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape)) * scale


def draw_integers(name: str, low: int, high: int, shape: int | Sequence[int]) -> np.ndarray:
    """Draw the whole numbers called `name`, such as labels."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(low, high, shape)


def draw_entry(name: str, shape: Sequence[int]) -> np.ndarray:
    """Draw the entry of a state dict called `name`, at the scale of its kind in `rivals.json`."""
    drawn = draw(name, shape)
    if len(shape) in (2, 4):
        return drawn * math.prod(shape[1:]) ** -0.5
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(drawn)
    if name.endswith("weight"):
        return 1 + 0.1 * drawn
    return 0.1 * drawn


def draw_entries(prefix: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Draw all entries of a state dict, by their keys."""
    return {key: draw_entry(f"{prefix}/{key}", shape) for key, shape in shapes.items()}


def channels_last(x: np.ndarray) -> np.ndarray:
    """Return maps as our networks have them; what is none stays as it is."""
    return rearrange(x, "b c h w -> b h w c") if x.ndim == 4 else x


def channels_first(x: np.ndarray) -> np.ndarray:
    """Return maps as PyTorch has them; what is none stays as it is."""
    return rearrange(x, "b h w c -> b c h w") if x.ndim == 4 else x


def norm_and_sum(x: np.ndarray) -> tuple[float, float]:
    """Return the 2-norm of an array and the sum of its elements."""
    return float(np.linalg.norm(x)), float(x.sum())


def norm_of_all(arrays: Iterable[np.ndarray]) -> float:
    """Return the 2-norm of arrays taken as one."""
    return math.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in arrays))
