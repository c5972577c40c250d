"""The pixels that training and evaluation see, compared with Pillow's and with torchvision's distribution."""

import io
import math

import numpy as np
import torch
from PIL import Image
from scipy import stats

from proofs.fidelity.claim import Claim
from proofs.fidelity.photographs import Photograph
from tat_jax.data.transforms import crop_and_resize, decode, eval_transform, random_resized_crop_box

SIZE, RESIZE = 224, 256
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
# Height and width: ImageNet's commonest, others, and two so long that drawing a crop mostly or always fails.
SHAPES = [(375, 500), (500, 333), (97, 1024), (2000, 30), (224, 224)]


def resize_and_centre_crop(image: Image.Image) -> np.ndarray:
    """Return what torchvision's Resize(256) and CenterCrop(224) return of a Pillow image."""
    shorter = min(image.size)
    width, height = (int(RESIZE * side / shorter) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    return np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)))


def crop_resize_and_flip(image: Image.Image, box: tuple[int, int, int, int], flip: bool) -> np.ndarray:
    """Return what torchvision's resized_crop and hflip return of a Pillow image, for a box and a flip."""
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    resized = crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized)


def shift(ours: np.ndarray, reference: np.ndarray) -> float:
    """Return by how many pixels `ours` lies beside `reference`: the length of the least-squares shift.

    Solves ours ≈ reference − dy ∂y reference − dx ∂x reference over all pixels.
    """
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    gradients = np.stack([-g.ravel() for g in np.gradient(reference, axis=(0, 1))], axis=1)
    solution = np.linalg.lstsq(gradients, (ours - reference).ravel(), rcond=None)[0]
    return float(np.linalg.norm(solution))


def torchvision_boxes(height: int, width: int, count: int) -> np.ndarray:
    """Draw (top, left, height, width) as torchvision's RandomResizedCrop does, from PyTorch's generator."""
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
    boxes[~fits.any(1).numpy()] = _central_box(height, width)
    return boxes


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def box_p_values(height: int, width: int, count: int) -> dict[str, float]:
    """Return, for each property of a crop, how probable so large a difference is between equal distributions.

    Kolmogorov-Smirnov's two-sample test, and Fisher's exact one for how often no crop fitted.
    """
    rng = np.random.default_rng(1)
    ours = np.array([random_resized_crop_box(height, width, rng, SCALE, RATIO) for _ in range(count)])
    theirs = torchvision_boxes(height, width, count)
    values = {}
    for name, of in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
    }.items():
        values[name] = float(stats.ks_2samp(of(ours), of(theirs), method="asymp").pvalue)
    central = [int((b == _central_box(height, width)).all(1).sum()) for b in (ours, theirs)]
    counts = [[n, count - n] for n in central]
    values["no crop fits"] = float(stats.fisher_exact(counts).pvalue)
    return values


def claims(photos: list[Photograph], *, draws: int = 100_000) -> list[Claim]:
    """Compare the transforms on photographs, and the distribution of boxes over so many draws."""
    rng = np.random.default_rng(0)
    largest, means, shifts = 0, [], []
    for photo in photos:
        ours = decode(photo.jpeg, photo.name)
        theirs = Image.open(io.BytesIO(photo.jpeg)).convert("RGB")
        expected = resize_and_centre_crop(theirs).astype(int)
        largest = max(largest, np.abs(eval_transform(ours, resize=RESIZE, size=SIZE) - expected).max())
        height, width = ours.shape[:2]
        box = random_resized_crop_box(height, width, rng, SCALE, RATIO)
        flip = bool(rng.random() < 0.5)
        crop, expected = crop_and_resize(ours, box, SIZE, flip), crop_resize_and_flip(theirs, box, flip)
        means.append(np.abs(crop - expected.astype(int)).mean())
        shifts.append(shift(crop, expected))
    tests = {
        f"{name} of boxes in {height}×{width}": p
        for height, width in SHAPES
        for name, p in box_p_values(height, width, draws).items()
    }
    least = min(tests, key=lambda name: tests[name])
    pillow = f"Pillow, {len(photos)} photographs"
    return [
        Claim("evaluation transform: largest difference, grey levels", pillow, float(largest), 1),
        Claim("training crop: mean difference of the worst photograph, grey levels", pillow, max(means), 1),
        Claim("training crop: largest shift, pixels", pillow, max(shifts), 0.05),
        Claim(
            # Of so many tests of equal distributions, one in a thousand sets has a smaller least p.
            f"crop boxes: 1 − p of the least probable of {len(tests)} tests ({least})",
            f"RandomResizedCrop's formulas, {draws:,} draws a shape",
            1 - tests[least],
            1 - 1e-3 / len(tests),
        ),
    ]
