"""Images that nobody has labelled, in a folder; without JAX, as processes that read import it."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from tat_jax.data.disk_folder import read
from tat_jax.data.listing import EXTENSIONS, PassedOver, Paths, list_images
from tat_jax.data.rows import Transform
from tat_jax.data.source import Example, printable, some


class UnlabelledFolder:
    """The images of a folder and of all folders within it, in torchvision's order.

    One that cannot be read counts as one that is no image, so that whoever skips those goes on.

    Args:
        root: on this machine.

    Attributes:
        folders: in which images were looked for.
        notes: what was passed over.

    Raises:
        FileNotFoundError: there are no images.
    """

    num_classes = 0

    def __init__(self, root: Path):
        passed = PassedOver()
        found, states = list_images(str(root), passed)
        self.folders = list(states)
        self.notes = passed.lines(printable(str(root)))
        if passed.unreadable:
            self.notes.append(f"folders that cannot be read are passed over: {some(passed.unreadable)}")
        if not found:
            what = "".join(f"; {line}" for line in self.notes)
            raise FileNotFoundError(f"no images in {printable(str(root))} ({' '.join(EXTENSIONS)}){what}")
        self._root = root
        self._paths = Paths.of(found)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        file, name = self.file(index)
        return Example(file, None, name)

    def file(self, index: int) -> tuple[bytes, str]:
        """Return an image, and what errors call it."""
        path = self._paths[index]
        try:
            return read(path), printable(path)
        except OSError:
            return b"", printable(path)

    def path(self, index: int) -> str:
        """Return the path of an image below the folder."""
        return os.path.relpath(self._paths[index], self._root)

    def why_unread(self, index: int, decode: Callable[[bytes, str], object]) -> str:
        """Return in a line why an image was skipped, which is read once more for it."""
        path = self._paths[index]
        try:
            decode(read(path), printable(path))
        except OSError as error:
            return f"{printable(path)}: {error.strerror}"
        except ValueError as error:
            return str(error)
        return f"{printable(path)}: it could not be read before, and can be now"


def sized(
    transform: Transform,
    image: UInt8[np.ndarray, "height width 3"],
    label: None,
    rng: None,
    data: ConfigDict,
) -> tuple[UInt8[np.ndarray, "size size 3"], Int[np.ndarray, "1 2"]]:
    """Transform an image to be evaluated; its label is its height and width before, in a row."""
    pixels, _ = transform(image, np.broadcast_to(np.uint8(0), image.shape[:2]), None, data)
    return pixels, np.array([image.shape[:2]], np.int32)
