"""What torchvision makes of photographs, written from its formulas with Pillow: the reference for ours."""

import math

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image

SIZE, RESIZE = 224, 256
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def resize_and_centre_crop(image: Image.Image) -> np.ndarray:
    """Return what Resize(256) and CenterCrop(224) return of a Pillow image."""
    shorter = min(image.size)
    width, height = (int(RESIZE * side / shorter) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    return np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)))


def crop_resize_and_flip(image: Image.Image, box: tuple[int, int, int, int], flip: bool) -> np.ndarray:
    """Return what resized_crop and hflip return of a Pillow image, for a box and a flip."""
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    resized = crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized)


def to_tensors(
    images: UInt8[np.ndarray, "batch height width 3"], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return what ToTensor and Normalize return."""
    pixels = torch.from_numpy(rearrange(images, "b h w c -> b c h w")).to(dtype) / 255
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=dtype)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], dtype=dtype)[:, None, None]
    return (pixels - mean) / std


def random_boxes(height: int, width: int, count: int) -> np.ndarray:
    """Draw (top, left, height, width) as RandomResizedCrop does, from PyTorch's generator."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.empty(count, 10, dtype=torch.float64).uniform_(low, high, generator=generator)

    area = height * width * uniform(*SCALE)
    aspect = torch.exp(uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    w, h = torch.round(torch.sqrt(area * aspect)), torch.round(torch.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = torch.arange(count), fits.int().argmax(1)
    w, h = w[first], h[first]
    top, left = (
        torch.floor(torch.rand(count, dtype=torch.float64, generator=generator) * (room + 1))
        for room in (height - h, width - w)
    )
    boxes = torch.stack([top, left, h, w], dim=1).long().numpy()
    boxes[~fits.any(1).numpy()] = central_box(height, width)
    return boxes


def central_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Return the box that it takes when none of ten fits."""
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w
