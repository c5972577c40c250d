"""Grey of more than 8 bits a pixel, as X-rays and microscopes have it: which levels are black and white."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, TiffImagePlugin

_WHITE_IS_ZERO = 0  # of a TIFF's photometric interpretations
_UNSIGNED, _SIGNED = 1, 2  # of its sample formats
_STRETCHED = 65535  # where Pillow has the white of a PGM, whatever it says


def to_rgb(image: Image.Image, grey_range: tuple[float, float] | None) -> UInt8[np.ndarray, "height width 3"]:
    """Return the pixels of an image as RGB: those of 8 bits as Pillow makes them, deeper grey by its levels.

    Args:
        image: as Pillow opened it.
        grey_range: the levels that become black and white, those between linearly; None is the least and the
            greatest of the file's type.

    Raises:
        ValueError: the levels are floats or of 32 bits, whose types reach too far, or some are no numbers.
    """
    is_signed = image.mode == "L" and _tag(image, TiffImagePlugin.SAMPLEFORMAT) == _SIGNED
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16") or is_signed):
        return np.asarray(image.convert("RGB"))
    most = _most_of_pgm(image)
    black, white = grey_range or ((0.0, most) if most else _range_of_type(image))
    levels = _levels(image, most)
    if np.isnan(levels).any():
        raise ValueError("some of its grey levels are no numbers")
    levels -= black
    levels *= 255 / (white - black)
    grey = np.rint(np.clip(levels, 0, 255, out=levels), out=levels).astype(np.uint8)
    if _tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return np.repeat(grey[..., None], 3, axis=-1)


def _most_of_pgm(image: Image.Image) -> int | None:
    """Return which level a PGM says is white, where that is not the greatest of 16 bits; else None."""
    tiles: Any = getattr(image, "tile", ())
    arguments = tiles[0].args if tiles and image.format == "PPM" and image.mode == "I" else None
    return arguments[1] if isinstance(arguments, tuple) else None


def _levels(image: Image.Image, most: int | None) -> np.ndarray:
    """Return the grey levels as floats that hold them exactly; of a PGM that says so, `most` is white."""
    levels = np.asarray(image)
    if most:
        return np.rint(levels * (most / _STRETCHED))
    if image.mode == "L":  # of signed levels, which Pillow takes for others
        return levels.view(np.int8).astype(np.float32)
    if image.mode not in ("I", "F"):
        return levels.astype(np.float32)
    if image.mode == "I" and _tag(image, TiffImagePlugin.SAMPLEFORMAT, _UNSIGNED) == _UNSIGNED:
        levels = levels.view(np.uint32)  # Pillow has but signed ones
    return levels.astype(np.float64)


def _range_of_type(image: Image.Image) -> tuple[float, float]:
    """Return the least and the greatest level that the file could hold.

    Raises:
        ValueError: they say nothing of those it holds.
    """
    bits = _tag(image, TiffImagePlugin.BITSPERSAMPLE, 16)  # what is no TIFF has no other deep ones
    if image.mode == "F" or bits not in (8, 12, 16):
        kind = "floats" if image.mode == "F" else f"whole numbers of {bits} bits"
        raise ValueError(
            f"its grey levels are {kind}; say which of them are black and white, as in "
            '--config.data.grey_range="(0, 1)"'
        )
    if _tag(image, TiffImagePlugin.SAMPLEFORMAT) == _SIGNED:
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1


def _tag(image: Image.Image, tag: int, default: int | None = None) -> int | None:
    """Return a number that a TIFF says of itself."""
    value: Any = getattr(image, "tag_v2", {}).get(tag, default)
    return value[0] if isinstance(value, tuple) and value else value
