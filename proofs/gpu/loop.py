"""Training on photographs that are read, beside its bare step."""

import tempfile
from pathlib import Path

import jax

from proofs.bench import loop
from proofs.bench.full_size import full_size
from proofs.bench.sidebyside import Row
from proofs.photographs import Photograph
from tat_jax.data.source import SPLITS

CLASSES, EPOCH = 10, 10_240  # an epoch is long enough that evaluations and its ends do not count
STEPS = 40


def measure(photos: list[Photograph]) -> list[Row]:
    """Train as `main.py` does on a folder of copies of the photographs."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_folder(photos, root, EPOCH)
        config = full_size(on_gpu=True)
        config.data.source, config.data.root = "imagefolder", str(root)
        jax.config.update("jax_compilation_cache_dir", str(root / "cache"))  # both sides compile the same
        return [
            loop.measure_one(
                f"photographs, 224², {config.dtype}", config, steps=STEPS, bound=None, rounds=2, epoch=EPOCH
            )
        ]


def write_folder(photos: list[Photograph], root: Path, images: int) -> None:
    """Write so many images to train on, and as many to evaluate as there are classes; most are links."""
    files = []
    for i, photo in enumerate(photos):
        files.append(root / f"{i}.jpg")
        files[-1].write_bytes(photo.jpeg)
    for split, count in zip(SPLITS, (images, CLASSES), strict=True):
        for i in range(count):
            to = root / split / str(i % CLASSES) / f"{i}.jpg"
            to.parent.mkdir(parents=True, exist_ok=True)
            to.hardlink_to(files[i % len(files)])
