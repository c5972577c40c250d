"""Scenes of handwritten digits with a class for each pixel, which need no files: to try a segmentation."""

import functools

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from tat_jax.data.label_maps import IGNORED
from tat_jax.data.source import SPLITS, Example, Source

_SCENES = {"train": 160, "val": 48}
_DIGITS = 1000  # of scikit-learn's 1,797 are in scenes to train, the others in those to validate
_SIDES, _DIGIT_SIDES = (40, 72), (20, 32)  # pixels
_A_SCENE = 3  # digits
_INK, _EDGE = 128, 64  # from which grey on a pixel is of the digit, and from which of no class


class DigitMasks:
    """Scenes of scikit-learn's digits, 160 to train and 48 to validate, in sizes of 40 to 72 pixels.

    Class 0 is the background, and digit d is class d + 1; the soft edges of strokes are of no class.

    Args:
        split: `train` or `val`; no digit is in both.

    Attributes:
        largest: height and width within which all scenes lie.
    """

    num_classes = 11

    def __init__(self, split: str):
        # Imported here, because it takes a second that other sources need not wait for.
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = slice(None, _DIGITS) if split == "train" else slice(_DIGITS, None)
        self.classes = ["background", *map(str, range(10))]
        self._split = split
        self._digits = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self._values = digits.target[chosen]

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split."""
        return cls(split)

    @functools.cached_property
    def largest(self) -> tuple[int, int]:
        """Return the largest height and the largest width."""
        sizes = np.array([_size(self._random(index)) for index in range(len(self))])
        height, width = sizes.max(0).tolist()
        return height, width

    def __len__(self) -> int:
        return _SCENES[self._split]

    def __getitem__(self, index: int) -> Example:
        rng = self._random(index)
        height, width = _size(rng)
        image = rng.integers(0, 48, (height, width, 3), np.uint8)
        label = np.zeros((height, width), np.uint8)
        for which in rng.integers(len(self._values), size=_A_SCENE).tolist():
            side = int(rng.integers(*_DIGIT_SIDES, endpoint=True))
            top, left = (int(rng.integers(room, endpoint=True)) for room in (height - side, width - side))
            here = slice(top, top + side), slice(left, left + side)
            digit = np.asarray(
                Image.fromarray(self._digits[which]).resize((side, side), Image.Resampling.BILINEAR)
            )
            colour = rng.integers(160, 256, 3)
            ink = (digit[..., None] * colour // 255).astype(np.uint8)
            image[here] = np.where(digit[..., None] >= _EDGE, ink, image[here])
            label[here][digit >= _EDGE] = IGNORED
            label[here][digit >= _INK] = self._values[which] + 1
        return Example(image, label, f"scene {index} of {self._split}")

    def _random(self, index: int) -> np.random.Generator:
        return np.random.default_rng((SPLITS.index(self._split), index))


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """Draw the height and the width of a scene, which is the first that is drawn of it."""
    height, width = rng.integers(*_SIDES, endpoint=True, size=2).tolist()
    return height, width
