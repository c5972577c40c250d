"""The photographs that the proofs look at: JPEG files of a folder, or pieces of scikit-learn's two."""

import argparse
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


class Photograph(NamedTuple):
    """A JPEG file's name and its bytes."""

    name: str
    jpeg: bytes


def photographs(folder: Path | None, count: int = 200) -> list[Photograph]:
    """Return the first `count` JPEG files under `folder`, by path; without one, pieces of scikit-learn's two.

    Raises:
        FileNotFoundError: there is no JPEG file.
    """
    if folder is None:
        return _pieces(count)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise FileNotFoundError(f"no .jpg or .jpeg file under {folder}")
    return [Photograph(str(path), path.read_bytes()) for path in paths[:count]]


def add_photos(parser: argparse.ArgumentParser) -> None:
    """Add `--photos FOLDER`, whose value are the photographs."""
    parser.add_argument(
        "--photos",
        type=_of_option,
        default="",
        metavar="FOLDER",
        help="JPEG files at any depth; else pieces of scikit-learn's two photographs",
    )


def _of_option(folder: str) -> list[Photograph]:
    try:
        return photographs(Path(folder) if folder else None)
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _pieces(count: int) -> list[Photograph]:
    rng = np.random.default_rng(0)
    whole = [Image.fromarray(image) for image in load_sample_images().images]
    pieces = []
    for i in range(count):
        image = whole[i % 2]
        width, height = (int(rng.integers(side // 3, side, endpoint=True)) for side in image.size)
        left = int(rng.integers(image.width - width, endpoint=True))
        top = int(rng.integers(image.height - height, endpoint=True))
        file = io.BytesIO()
        image.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=90)
        pieces.append(Photograph(f"piece {i} of scikit-learn's photographs", file.getvalue()))
    return pieces
