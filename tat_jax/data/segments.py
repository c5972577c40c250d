"""How segmentation transforms an image with its label map; without JAX, for the processes that read."""

import math

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from tat_jax.data.blur import gaussian_blur
from tat_jax.data.label_maps import IGNORED, nearest
from tat_jax.data.source import Label

_BILINEAR = ResizeAlg.convolution(FilterType.bilinear)  # as wide as what it shrinks: antialias
_FILL = {"background": 0, "ignored": IGNORED}  # of a label, where `data.pad_label` says so
_LONGEST = 2**22  # pixels of a side that is resized


def segment(
    image: UInt8[np.ndarray, "height width 3"],
    label: Label,
    rng: np.random.Generator | None,
    data: ConfigDict,
) -> tuple[UInt8[np.ndarray, "size size 3"], UInt8[np.ndarray, "..."]]:
    """Flip, scale, pad, crop and blur as published; in evaluation squash the image alone to a square.

    The shorter side becomes s, a whole number drawn from `scale_range` · size, and the longer one
    int(long · s / short), images bilinearly with antialias, labels by nearest pixels; right and below, what
    is missing to the size is black, and of the label background or ignored. Half of the crops are blurred by
    a radius below 1.

    Drawn are, in this order and whatever `data` says: flip, s, left, top, whether to blur, radius.

    Args:
        image: RGB.
        label: a map of the image's size.
        rng: is advanced; None is the transform of evaluation.
        data: the config's.

    Returns:
        The image, and the label: of the same size, or in evaluation as it came.

    Raises:
        ValueError: image and label are of different sizes.
    """
    size = data.image_size
    if not isinstance(label, np.ndarray) or label.shape != image.shape[:2]:
        found = " × ".join(map(str, label.shape[::-1])) if isinstance(label, np.ndarray) else "no map"
        raise ValueError(f"the image is {image.shape[1]} × {image.shape[0]} pixels, its label {found}")
    if rng is None:
        # With Pillow, as published figures were measured with it.
        return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)), label
    flip = rng.random() < 0.5 and data.flip
    low, high = (max(1, int(scale * size)) for scale in data.scale_range)
    _check_sides(image.shape[0], image.shape[1], high)
    shape = _scaled(image.shape[0], image.shape[1], int(rng.integers(low, high, endpoint=True)))
    left, top = (int(rng.integers(max(side - size, 0), endpoint=True)) for side in shape[::-1])
    box = top, left, min(shape[0], size), min(shape[1], size)
    blur, radius = rng.random() < 0.5, rng.random()
    pixels = crop_of_resized(image, shape, box, size, flip)
    if blur and data.blur:
        pixels = gaussian_blur(pixels, radius)
    return pixels, crop_of_nearest(label, shape, box, size, flip, _FILL[data.pad_label])


def crop_of_resized(
    image: UInt8[np.ndarray, "height width 3"],
    shape: tuple[int, int],
    box: tuple[int, int, int, int],
    size: int,
    flip: bool,
) -> UInt8[np.ndarray, "size size 3"]:
    """Return a box of an image resized with antialias, top left in a black square; only the box is computed.

    Args:
        image: RGB.
        shape: height and width to which it is resized.
        box: (top, left, height, width) within that.
        size: of the square.
        flip: mirror left and right before the box is cut.
    """
    top, left, height, width = box
    if flip:
        left = shape[1] - left - width
    rows, row, high = _needed(image.shape[0], shape[0], top, height)
    columns, column, wide = _needed(image.shape[1], shape[1], left, width)
    part = image[rows, columns]
    source = ImageData(part.shape[1], part.shape[0], PixelType.U8x3, part.tobytes())
    resized = ImageData(width, height, PixelType.U8x3)
    options = ResizeOptions(resize_alg=_BILINEAR, crop_box=CropBox(column, row, wide, high))
    Resizer().resize(source, resized, options)
    pixels = np.frombuffer(resized.get_buffer(), np.uint8).reshape(height, width, 3)
    if not flip and height == width == size:
        return pixels
    square = np.zeros((size, size, 3), np.uint8)
    for channel in range(3):  # faster than pixels of three bytes each
        square[:height, :width, channel] = pixels[:, :: -1 if flip else 1, channel]
    return square


def crop_of_nearest(
    label: UInt8[np.ndarray, "height width"],
    shape: tuple[int, int],
    box: tuple[int, int, int, int],
    size: int,
    flip: bool,
    fill: int,
) -> UInt8[np.ndarray, "size size"]:
    """Return the same box of a label resized to the nearest pixels, top left in a square of `fill`."""
    top, left, height, width = box
    rows = nearest(label.shape[0], shape[0])[top : top + height]
    columns = nearest(label.shape[1], shape[1])[left : left + width]
    if flip:
        columns = label.shape[1] - 1 - columns
    square = np.full((size, size), fill, np.uint8)
    square[:height, :width] = label.take(rows, 0).take(columns, 1)
    return square


def _scaled(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Return height and width when the shorter side is brought to a length."""
    longer = int(max(height, width) * shorter / min(height, width))
    return (longer, shorter) if height > width else (shorter, longer)


def _check_sides(height: int, width: int, shorter: int) -> None:
    """Raise a ValueError if the longer side would have no end when the shorter one is brought to a length."""
    if max(_scaled(height, width, shorter)) > _LONGEST:
        raise ValueError(f"{width} × {height} pixels, of which a crop would be a line")


def _needed(side: int, new_side: int, start: int, length: int) -> tuple[slice, float, float]:
    """Return of which pixels of a side a part of the resized one is made, its start in them, its length."""
    scale = side / new_side
    first, end = start * scale, (start + length) * scale
    reach = max(scale, 1.0)
    cut = slice(max(math.floor(first - reach), 0), min(math.ceil(end + reach), side))
    begin = first - cut.start
    return cut, begin, min(end - first, cut.stop - cut.start - begin)
