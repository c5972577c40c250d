"""Images in tar files, as WebDataset writes them."""

import numpy as np
from ml_collections import ConfigDict

from tat_jax.buckets import Place
from tat_jax.data.class_names import CLASSES, read_lines
from tat_jax.data.folders import open_folder
from tat_jax.data.source import Example, Source, some
from tat_jax.data.tar_shards import UNLABELLED, ShardImages, list_shards

_LAYOUT = "shards belong in {root}/train/ and {root}/val/, as 00000.tar"


class WebDataset:
    """Images in `root/train/*.tar` and `root/val/*.tar`, each beside its class index: `0001.jpg`, `0001.cls`.

    Shards come by name, their images as they lie in them. `root/classes.txt` names the classes, a line each;
    without it there are as many as the greatest index of `train` says.

    Args:
        root: holds the splits, on this machine or in a bucket.
        split: `train` or `val`.

    Attributes:
        classes: the names of the classes by their labels; None where none are said.
        notes: what was passed over, and classes without images.

    Raises:
        FileNotFoundError: the folder, the split or its shards are missing.
        OSError: shards cannot be read, or the bucket cannot be reached.
        ValueError: a shard is compressed, damaged or without images; an image has no class index, or one
            beyond the classes.
    """

    def __init__(self, root: str | Place, split: str):
        self._folder = open_folder(root, _LAYOUT)
        self._images = ShardImages(self._folder, split)
        self._shards = self._images.shards
        self.classes = read_lines(self._folder.root)
        if self.classes is not None:
            self.num_classes = len(self.classes)
        else:
            trained = self._shards if split == "train" else list_shards(self._folder, "train")
            self.num_classes = int(trained.label.max()) + 1
            if not self.num_classes:
                raise ValueError(
                    f"no image of {self._folder.root}/train has a class index beside it, in .cls"
                )
        self.labels = self._shards.label
        self._check_labels()
        self.notes = self._shards.passed.lines(split) + self._notes_of_classes(split)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the images in `data.root`."""
        return cls(data.root, split)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        image, name = self._images.read(index)
        return Example(image, int(self.labels[index]), name)

    def _check_labels(self) -> None:
        """Raise a ValueError unless each image has the index of a class."""
        labels = self.labels
        if (wrong := np.flatnonzero(labels == UNLABELLED)).size:
            name = self._images.name(int(wrong[0]))
            raise ValueError(
                f"{name} has no class index beside it, as a file of its name that ends in .cls; of "
                f"{len(labels):,} images {len(wrong):,} have none"
            )
        if (wrong := np.flatnonzero(labels >= self.num_classes)).size:
            first = int(wrong[0])
            says = f"{CLASSES} names" if self.classes is not None else "train has"
            raise ValueError(
                f"{self._images.name(first)} is of class {labels[first]}, and {says} {self.num_classes:,}, "
                "from 0 on"
            )

    def _notes_of_classes(self, split: str) -> list[str]:
        """Return what to note of classes that the split has no images of."""
        present = set(np.unique(self._shards.label).tolist())
        missing = [label for label in range(self.num_classes) if label not in present]
        if not missing:
            return []
        names = [str(label) if self.classes is None else self.classes[label] for label in missing]
        return [f"{split} has no images of {len(missing):,} of {self.num_classes:,} classes: {some(names)}"]
