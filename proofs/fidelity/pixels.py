"""The pixels that training and evaluation see, compared with Pillow's and with torchvision's distribution."""

import io

import numpy as np
from PIL import Image
from scipy import stats

from proofs.fidelity.claim import Claim
from proofs.photographs import Photograph
from proofs.torch_transforms import (
    RATIO,
    RESIZE,
    SCALE,
    SIZE,
    central_box,
    crop_resize_and_flip,
    random_boxes,
    resize_and_centre_crop,
)
from tat_jax.data.transforms import crop_and_resize, decode, eval_transform, random_resized_crop_box

# Height and width: ImageNet's commonest, others, and two so long that drawing a crop mostly or always fails.
SHAPES = [(375, 500), (500, 333), (97, 1024), (2000, 30), (224, 224)]


def shift(ours: np.ndarray, reference: np.ndarray) -> float:
    """Return by how many pixels `ours` lies beside `reference`: the length of the least-squares shift.

    Solves ours ≈ reference − dy ∂y reference − dx ∂x reference over all pixels.
    """
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    gradients = np.stack([-g.ravel() for g in np.gradient(reference, axis=(0, 1))], axis=1)
    solution = np.linalg.lstsq(gradients, (ours - reference).ravel(), rcond=None)[0]
    return float(np.linalg.norm(solution))


def box_p_values(height: int, width: int, count: int) -> dict[str, float]:
    """Return, for each property of a crop, how probable so large a difference is between equal distributions.

    Kolmogorov-Smirnov's two-sample test, and Fisher's exact one for how often no crop fitted.
    """
    rng = np.random.default_rng(1)
    ours = np.array([random_resized_crop_box(height, width, rng, SCALE, RATIO) for _ in range(count)])
    theirs = random_boxes(height, width, count)
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
    central = [int((b == central_box(height, width)).all(1).sum()) for b in (ours, theirs)]
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
