"""Transforms of single images on the host, in uint8, as torchvision has them on Pillow images."""

import contextlib
import io
import math
import warnings
from collections.abc import Callable

import numpy as np
import simplejpeg
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from jaxtyping import UInt8
from PIL import ExifTags, Image, TiffImagePlugin

from tat_jax.data.grey import to_rgb

# Those of torchvision's file extensions. Pillow knows more, and starts Ghostscript for one of them.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# 268 MB as RGB: where Pillow begins to suspect a decompression bomb.
MAX_PIXELS = 89_478_485
# A progressive JPEG has ten. Each further one may be a few bytes, and costs a pass over all pixels.
_SCAN, _MAX_SCANS = b"\xff\xda\0", 100
_TIFF = (b"II*\0", b"MM\0*")  # how its files begin
_UNREAD_TIFF = (
    "a TIFF of a kind that is not read, as of 64-bit floats, float colours or other than one, three or four "
    "channels, or a damaged one"
)
# As wide as what it shrinks: antialias.
_BILINEAR = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear))

# What undoes each of EXIF's orientations but the first, which is upright.
_TURNS: dict[object, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}

# What Pillow warns of, `decode` rejects or torchvision ignores. Threads share the filters, so that they
# cannot be set around each call.
warnings.filterwarnings("ignore", module=r"PIL\.")


class DecodeError(ValueError):
    """A file is no readable image.

    Args:
        name: of the file.
        why: what is wrong with it; may be part of the name, as sources of one's own have it.
    """

    def __init__(self, name: str, why: str = ""):
        super().__init__(name, why)
        self.name = name

    def __str__(self) -> str:
        return ": ".join(filter(None, self.args))


def decode(
    image: bytes,
    name: str,
    memory: UInt8[np.ndarray, " bytes"] | None = None,
    *,
    grey_range: tuple[float, float] | None = None,
    exif_orientation: bool = False,
) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an image file to RGB as torchvision does, but that grey of more than 8 bits keeps its levels.

    Args:
        image: the whole file.
        name: what errors call it.
        memory: where the pixels may lie, until the next call with it. New memory for each image costs more
            time than its resize.
        grey_range: of grey of more than 8 bits a pixel, the levels that become black and white; see
            `grey.to_rgb`.
        exif_orientation: turn and mirror the image as its EXIF says; torchvision does not.

    Raises:
        DecodeError: the bytes are no image, are cut short, would take more memory or time than an image of 89
            million pixels, or are grey levels that need a `grey_range`.
    """
    if not image:
        raise DecodeError(name, "the file is empty")
    if image.count(_SCAN) > _MAX_SCANS:
        raise DecodeError(name, f"more than {_MAX_SCANS} scans")
    # Faster than Pillow, and the same pixels. What it refuses, warns of or does not know, as the sampling
    # 4:4:1, is Pillow's to judge.
    with contextlib.suppress(Exception):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
        if height * width <= MAX_PIXELS and colours in ("YCbCr", "Gray"):
            fits = memory is not None and 3 * height * width <= memory.size
            rgb = simplejpeg.decode_jpeg(image, "RGB", buffer=memory if fits else None)
            if exif_orientation and _may_be_turned(image):
                with Image.open(io.BytesIO(image), formats=("JPEG",)) as opened:
                    rgb = _turn_upright(rgb, opened)
            return rgb
    # Pillow's readers raise whatever their parsing meets: OSError, SyntaxError, struct.error, IndexError …
    try:
        with Image.open(io.BytesIO(image), formats=_FORMATS) as opened:
            pixels = opened.width * opened.height
            tags = getattr(opened, "tag_v2", {})
            # int, because a tag may hold bytes, which a number would multiply.
            sides = (
                int(tags.get(side, 0)) for side in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH)
            )
            tile = math.prod(sides)
            if pixels <= MAX_PIXELS and tile <= MAX_PIXELS:  # a tile may be larger than the image
                rgb = to_rgb(opened, grey_range)
                return _turn_upright(rgb, opened) if exif_orientation else rgb
    except Image.UnidentifiedImageError:
        unread = _UNREAD_TIFF if image.startswith(_TIFF) else f"not an image; it begins with {image[:16]!r}"
        raise DecodeError(name, unread) from None
    except Exception as error:
        raise DecodeError(name, str(error)) from error
    raise DecodeError(name, f"{max(pixels, tile):,} pixels, more than the {MAX_PIXELS:,} allowed")


def _may_be_turned(jpeg: bytes) -> bool:
    """Return whether a JPEG has a segment of EXIF or XMP, or is built otherwise than most."""
    place = 2
    while jpeg[place] == 0xFF and jpeg[place + 1] not in (0xDA, 0xE1, 0xFF):
        place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return jpeg[place : place + 2] != b"\xff\xda"


def _turn_upright(rgb: np.ndarray, opened: Image.Image) -> np.ndarray:
    """Turn and mirror pixels as the file says, as a view of them. Of a TIFF Pillow has done it."""
    turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation))
    return turn(rgb) if turn else rgb


def padded_crop(
    image: UInt8[np.ndarray, "height width 3"],
    rng: np.random.Generator,
    *,
    size: int,
    padding: int,
    flip: bool,
) -> UInt8[np.ndarray, "size size 3"]:
    """Return a crop of an image with zeros around it, and mirror half of them.

    As torchvision's `RandomCrop(size, padding)` and `RandomHorizontalFlip`, the usual ones on CIFAR: zeros in
    uint8, so that what is normalised is not 0 there.

    Args:
        image: as large as the crop.
        rng: is advanced.
        size: of the image and of the crop.
        padding: on every side.
        flip: whether to mirror.

    Raises:
        ValueError: the image is of another size.
    """
    if image.shape[:2] != (size, size):
        height, width = image.shape[:2]
        raise ValueError(
            f"the image is {height}×{width}, and data.crop_padding cuts crops of data.image_size={size} from "
            "images of that size"
        )
    drawn = int(rng.integers(2 * (2 * padding + 1) ** 2))
    drawn, left = divmod(drawn, 2 * padding + 1)
    mirrored, top = divmod(drawn, 2 * padding + 1)
    crop = np.zeros_like(image)
    down, right = top - padding, left - padding  # of the crop's corner from the image's
    crop[max(-down, 0) : size - max(down, 0), max(-right, 0) : size - max(right, 0)] = image[
        max(down, 0) : size + min(down, 0), max(right, 0) : size + min(right, 0)
    ]
    return crop[:, ::-1] if flip and mirrored else crop


def random_resized_crop_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw the (top, left, height, width) of a crop, distributed as in torchvision's RandomResizedCrop.

    Args:
        height: of the image.
        width: of the image.
        rng: is advanced.
        scale: the range of the crop's share of the image's area, drawn uniformly.
        ratio: the range of width / height, drawn uniformly in its logarithm. After ten crops that do not
            fit, the answer is the largest central one within the range.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = rng.integers(height - crop_height, endpoint=True)
            left = rng.integers(width - crop_width, endpoint=True)
            return int(top), int(left), crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def train_transform(
    image: UInt8[np.ndarray, "height width 3"],
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
) -> UInt8[np.ndarray, "size size 3"]:
    """Crop at random, resize bilinearly with antialias and flip half of the images, as torchvision does.

    Args:
        image: RGB.
        rng: is advanced.
        size: of the result.
        scale: see `random_resized_crop_box`.
        ratio: likewise.
        flip: mirror left and right with probability ½.
    """
    box = random_resized_crop_box(image.shape[0], image.shape[1], rng, scale, ratio)
    return crop_and_resize(image, box, size, flip and rng.random() < 0.5)


def crop_and_resize(
    image: UInt8[np.ndarray, "height width 3"], box: tuple[int, int, int, int], size: int, flip: bool
) -> UInt8[np.ndarray, "size size 3"]:
    """Cut the box (top, left, height, width), resize it with antialias, and mirror it if `flip`."""
    top, left, height, width = box
    # Cropped first: the filter of a resize reads no pixel outside the crop.
    crop = image[top : top + height, left : left + width].tobytes()
    # Pillow's filter in a quarter of its time. It rounds otherwise, by at most two grey levels.
    resized = ImageData(size, size, PixelType.U8x3)
    Resizer().resize(ImageData(width, height, PixelType.U8x3, crop), resized, _BILINEAR)
    pixels = np.frombuffer(resized.get_buffer(), np.uint8).reshape(size, size, 3)
    if not flip:
        return pixels
    mirrored = np.empty_like(pixels)
    for channel in range(3):  # four times as fast as pixels of three bytes each
        mirrored[..., channel] = pixels[:, ::-1, channel]
    return mirrored


def eval_transform(
    image: UInt8[np.ndarray, "height width 3"], *, resize: int, size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Resize the shorter side to `resize` and take the centre, rounding as torchvision does.

    Raises:
        ValueError: the centre is larger than what it is cut from.
    """
    if resize < size:
        raise ValueError(f"a centre of {size} pixels cannot be cut from a shorter side of {resize}")
    height, width = image.shape[:2]
    if height == width == resize == size:
        return image.copy()  # as Pillow would
    short, long = min(height, width), max(height, width)
    resized_long = int(resize * long / short)
    new_height, new_width = (resized_long, resize) if width <= height else (resize, resized_long)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    # Only what the centre needs is computed. With Pillow, as published accuracies were measured with it.
    y, x = height / new_height, width / new_width
    box = (x * left, y * top, x * (left + size), y * (top + size))
    centre = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box)
    return np.asarray(centre)
