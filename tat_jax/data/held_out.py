"""A training set in two parts: what is trained on, and what is held out of it to choose by."""

from typing import Any

import numpy as np
from jaxtyping import Integer

from tat_jax.data.source import Example, Source, apart, notes

SPLIT = "held_out"  # beside those of a source


class Part:
    """Some of the images of a source.

    Args:
        source: any one whose labels are classes.
        indices: of its images.
        further: lines that whoever trains on it should have read, too.
    """

    def __init__(self, source: Source, indices: Integer[np.ndarray, " part"], *further: str):
        self._source, self._indices = source, indices
        self.num_classes, self.notes = source.num_classes, [*notes(source), *further]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    def __getattr__(self, name: str) -> Any:
        """Return what the source has of classes, and of the labels those of this part."""
        if name not in ("classes", "colours", "labels"):
            raise AttributeError(name)
        known = getattr(self._source, name)
        return known[self._indices] if name == "labels" else known


def part_of(source: Source, share: float, split: str) -> Part:
    """Return the share of a training set that is held out, evenly spaced; or, as `train`, the rest of it.

    Raises:
        ValueError: one of the two would be empty.
    """
    held, rest = apart(len(source), round(share * len(source)))
    if not (len(held) and len(rest)):
        raise ValueError(
            f"data.held_out_of_training={share:g} of {len(source):,} images leaves nothing to "
            f"{'train on' if len(held) else 'hold out'}; take another share"
        )
    if split == SPLIT:
        return Part(source, held)
    said = f"{len(held):,} of {len(source):,} training images, evenly spaced, are held out"
    return Part(source, rest, f"{said} (data.held_out_of_training={share:g})")
