"""What data, losses, tasks and the training step hand each other."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, UInt8

Images = UInt8[Array | np.ndarray, "batch height width 3"] | Float[Array | np.ndarray, "batch height width 3"]
Labels = Integer[Array | np.ndarray, " batch"] | Integer[Array | np.ndarray, "batch rows columns"]
Where = Bool[Array | np.ndarray, " batch"]


class MixedLabels(NamedTuple):
    """The labels of images that were mixed from two each, see `mixing`.

    Attributes:
        first: of the image itself.
        second: of the one that it was mixed with.
        share: of the first in the label, from 0 to 1; that of the second is the rest.
    """

    first: Labels
    second: Labels
    share: Float[Array | np.ndarray, " batch"]


class Batch(NamedTuple):
    """Images, their labels if there are any, and which rows count: padding and unreadable files do not.

    Attributes:
        image: pixels in uint8; or in floating point, normalised already.
        label: an integer or a map of integers for each image; None where images have no labels. Where a
            training mixes its images, `MixedLabels`.
        where: the rows that count.
        indices: of the images within their split; −1 of rows that do not count. None: nobody numbered them.
    """

    image: Images
    label: Labels | MixedLabels | None
    where: Where
    indices: Int[Array | np.ndarray, " batch"] | None = None

    def __getitem__(self, key: Any) -> Any:
        """Return a part by its name, too, as scripts read batches that were dictionaries."""
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)
