"""Small images for tests, in memory and encoded."""

import io

import numpy as np
from PIL import Image


def photograph(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """Smooth noise, so that JPEG has something to encode everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()
