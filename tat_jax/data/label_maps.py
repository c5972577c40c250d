"""Label maps: a class for each pixel, as uint8 [height, width], and the PNG files that hold them."""

import io
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int, Integer, UInt8
from PIL import Image

from tat_jax.data.transforms import MAX_PIXELS, DecodeError

IGNORED = 255  # a pixel of no class, which neither trains nor counts
OUTSIDE = 254  # fills what a map of the largest image's size has beyond its own image
MOST_CLASSES = 254  # indices below both

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3  # of a PNG's colour types
_STRETCH = {
    1: 255,
    2: 85,
    4: 17,
}  # by which Pillow multiplies grey of so many bits, so that the greatest is 255
_THREADS = 16


def decode_indices(file: bytes, name: str) -> Integer[np.ndarray, "height width"]:
    """Decode a PNG whose pixels are class indices: places in a palette, or levels of grey.

    Args:
        file: the whole of it.
        name: what errors call it.

    Returns:
        The indices as they stand there, of 16 bits where the file has so many.

    Raises:
        DecodeError: it is no PNG, is cut short, or claims more than 89 million pixels.
        ValueError: its pixels are colours.
    """
    if not file.startswith(_PNG):
        raise DecodeError(name, f"not a PNG; it begins with {file[:16]!r}" if file else "the file is empty")
    try:
        width, height, bits, kind = struct.unpack(">IIBB", file[16:26])
    except struct.error:
        raise DecodeError(name, "the file is cut short") from None
    if width * height > MAX_PIXELS:
        raise DecodeError(name, f"{width * height:,} pixels, more than the {MAX_PIXELS:,} allowed")
    if kind not in (_GREY, _PALETTE):
        raise ValueError(
            f"{name} is of colours (RGB or with alpha); a label is a PNG of class indices, with a palette or "
            "grey"
        )
    # Pillow's readers raise whatever their parsing meets.
    try:
        with Image.open(io.BytesIO(file), formats=("PNG",)) as opened:
            indices = np.asarray(opened)
    except Exception as error:
        raise DecodeError(name, str(error)) from error
    if kind == _GREY and bits in _STRETCH:
        return indices.view(np.uint8) // _STRETCH[bits]
    return indices


def class_map(
    indices: Integer[np.ndarray, "height width"], num_classes: int, ignored: int, name: str
) -> UInt8[np.ndarray, "height width"]:
    """Return a label map of indices of which one means that a pixel is of no class.

    Args:
        indices: of classes, or `ignored`.
        num_classes: at most `MOST_CLASSES`.
        ignored: becomes `IGNORED`.
        name: what errors call the label.

    Raises:
        ValueError: an index is no class.
    """
    is_ignored = indices == ignored
    wrong = ((indices < 0) | (indices >= num_classes)) & ~is_ignored
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name} has {indices[row, column]} in row {row}, column {column}, which is no class: they are "
            f"0 to {num_classes - 1}, and {ignored} is ignored"
        )
    if ignored == IGNORED and indices.dtype == np.uint8:
        return indices
    return np.where(is_ignored, IGNORED, indices).astype(np.uint8)


def nearest(size: int, new_size: int) -> Int[np.ndarray, " new_size"]:
    """Return which pixels of a row Pillow takes to resize it to the nearest ones.

    It adds up steps of size / new_size from half a step on; their rounding decides between neighbours.
    """
    steps = np.full(new_size, size / new_size)
    steps[:1] /= 2
    return np.add.accumulate(steps).astype(np.intp)


def largest(paths: Iterable[str]) -> tuple[int, int]:
    """Return the largest height and the largest width of image files, of their headers alone.

    What has none, or claims more than 89 million pixels, is left out: to decode it will say so.

    Raises:
        OSError: a file cannot be read.
    """

    def size(path: str) -> tuple[int, int]:
        try:
            with Image.open(path) as opened:
                return (opened.height, opened.width) if opened.height * opened.width <= MAX_PIXELS else (1, 1)
        except Exception as error:  # whatever Pillow's readers meet
            if isinstance(error, OSError) and error.errno is not None:  # not of the file's content
                raise
            return 1, 1

    with ThreadPoolExecutor(_THREADS) as pool:
        height, width = np.array([(1, 1), *pool.map(size, paths)]).max(0).tolist()
    return height, width
