"""PASCAL VOC 2012's segmentation, alone or with the Semantic Boundaries Dataset."""

import functools
from pathlib import Path

from ml_collections import ConfigDict

from tat_jax import paths
from tat_jax.data.disk_folder import DiskFolder
from tat_jax.data.id_lists import files_of, read_ids
from tat_jax.data.label_maps import IGNORED, class_map, decode_indices, largest
from tat_jax.data.listing import Paths
from tat_jax.data.mat_file import read_matrix
from tat_jax.data.source import Example, Source

CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_LAYOUT = (
    "{root} is to be the folder VOC2012 of VOCdevkit, with JPEGImages/, SegmentationClass/ and "
    "ImageSets/Segmentation/"
)
_SBD_LAYOUT = (
    "{root} is to be SBD's folder benchmark_RELEASE, with dataset/img/, dataset/cls/ and dataset/train.txt"
)


class Voc:
    """VOC 2012's images with their classes' masks, 1,464 to train and 1,449 to validate.

    With SBD, images to train are VOC's, then those of SBD, to train and to validate; of an image in both,
    VOC's mask is taken, and none is one of VOC's to validate: 10,582 as published.

    Args:
        root: the folder VOC2012.
        split: `train` or `val`.
        sbd: the folder benchmark_RELEASE of SBD; None is VOC alone.

    Attributes:
        classes: the names of the classes by their labels.
        notes: how many images are of which data set.
        largest: height and width within which all images of the split lie.

    Raises:
        FileNotFoundError: a folder, a list, or files that it names are missing.
        OSError: a folder cannot be read.
        ValueError: a list is empty.
    """

    num_classes = len(CLASSES)

    def __init__(self, root: str | Path, split: str, sbd: str | Path | None = None):
        self._folder = DiskFolder(paths.local(str(root)), _LAYOUT)
        self.classes = list(CLASSES)
        self.notes: list[str] = []
        images, labels = self._of_voc(split)
        if sbd is not None and split == "train":
            more_images, more_labels = self._of_sbd(paths.local(str(sbd)))
            self.notes.append(f"train: {len(images):,} images of VOC, {len(more_images):,} of SBD")
            images, labels = images + more_images, labels + more_labels
        self._images, self._labels = Paths.of(images), Paths.of(labels)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of `data.root`, for training with SBD in `data.sbd_root`, if that is said."""
        return cls(data.root, split, data.sbd_root)

    @functools.cached_property
    def largest(self) -> tuple[int, int]:
        """Return the largest height and width."""
        return largest(self._images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        path = self._labels[index]
        file, label_name = self._folder.read_image(path)
        if path.endswith(".mat"):
            indices = read_matrix(file, ("GTcls", "Segmentation"), label_name)
        else:
            indices = decode_indices(file, label_name)
        image, name = self._folder.read_image(self._images[index])
        return Example(image, class_map(indices, self.num_classes, IGNORED, label_name), name)

    def _ids(self, split: str) -> list[str]:
        self._folder.check_is_there("ImageSets/Segmentation")
        root = self._folder.root
        return read_ids(root / "ImageSets/Segmentation" / f"{split}.txt", _LAYOUT.format(root=root))

    def _of_voc(self, split: str) -> tuple[list[str], list[str]]:
        """Return the paths of VOC's images of a split, and of their masks."""
        ids, root = self._ids(split), self._folder.root
        layout = _LAYOUT.format(root=root)
        return (
            files_of(root / "JPEGImages", ids, ".jpg", layout),
            files_of(root / "SegmentationClass", ids, ".png", layout),
        )

    def _of_sbd(self, root: Path) -> tuple[list[str], list[str]]:
        """Return the paths of SBD's images that are none of VOC's, and of their masks."""
        layout = _SBD_LAYOUT.format(root=root)
        ids = [one for part in ("train", "val") for one in read_ids(root / "dataset" / f"{part}.txt", layout)]
        of_voc = {*self._ids("train"), *self._ids("val")}
        ids = [one for one in dict.fromkeys(ids) if one not in of_voc]
        return (
            files_of(root / "dataset/img", ids, ".jpg", layout),
            files_of(root / "dataset/cls", ids, ".mat", layout),
        )
