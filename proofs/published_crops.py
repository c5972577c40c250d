"""The published training crops of segmentation, from their description with Pillow: reference for ours."""

import numpy as np
from PIL import Image, ImageFilter, ImageOps


def flip_scale_crop_and_blur(
    image: Image.Image, label: Image.Image, rng: np.random.Generator, size: int, fill: int
) -> tuple[Image.Image, Image.Image]:
    """Return a crop of an image and of its label as the published transforms make it, whole images resized.

    Args:
        image: RGB.
        label: class indices.
        rng: is advanced, in the order of the transforms.
        size: of the crop.
        fill: of the label beyond the image.
    """
    if rng.random() < 0.5:
        image, label = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (image, label))
    shorter = int(rng.integers(int(0.5 * size), int(2 * size), endpoint=True))
    width, height = image.size
    if height > width:
        new = shorter, int(height * shorter / width)
    else:
        new = int(width * shorter / height), shorter
    image, label = image.resize(new, Image.Resampling.BILINEAR), label.resize(new, Image.Resampling.NEAREST)
    if shorter < size:
        padded = max(new[0], size), max(new[1], size)
        image, label = _pad(image, padded, 0), _pad(label, padded, fill)
    left, top = (int(rng.integers(side - size, endpoint=True)) for side in image.size)
    image, label = (one.crop((left, top, left + size, top + size)) for one in (image, label))
    blurs, radius = rng.random() < 0.5, rng.random()
    return image.filter(ImageFilter.GaussianBlur(radius)) if blurs else image, label


def _pad(image: Image.Image, size: tuple[int, int], fill: int) -> Image.Image:
    """Fill what is missing on the right and below."""
    return ImageOps.expand(image, (0, 0, size[0] - image.width, size[1] - image.height), fill)
