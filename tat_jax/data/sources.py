"""Where the images are: random access by index to encoded or plain images with their labels."""

import functools
import os
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Integer, UInt8
from ml_collections import ConfigDict

SPLITS = ("train", "val")
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


class Example(NamedTuple):
    """One image, as a file or as RGB, with its label and the name under which errors report it.

    A label is an integer, a map of integers or, where the images have none, None.
    """

    image: bytes | UInt8[np.ndarray, "height width 3"]
    label: int | Integer[np.ndarray, "height width"] | None
    name: str


class Source(Protocol):
    """The images of one split, read by index from any thread."""

    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class NamedSource(Source, Protocol):
    """A source that a config names."""

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the images that a config's `data` describes."""


class ImageFolder:
    """Images in `root/train/<class>/` and `root/val/<class>/`, PyTorch's layout, in torchvision's order.

    Where every class folder is a WordNet id of ImageNet's 1,000 classes, labels are ImageNet's, even if some
    classes are missing. Else they number the class folders of `train`, sorted, in both splits. Names that
    begin with a dot are passed over.

    Raises:
        FileNotFoundError: the folder, the split or the images are missing.
        ValueError: images lie outside class folders, or `val` has a class that `train` lacks.
    """

    def __init__(self, root: str | Path, split: str):
        root = Path(root)
        layout = f"images belong in {root}/train/<class>/ and {root}/val/<class>/"
        for folder in (root, root / split):
            if not folder.is_dir():
                raise FileNotFoundError(f"no folder {folder}; {layout}")
        found = _class_folders(root / split)
        if not found:
            raise ValueError(f"{root / split} has no class folders; {layout}")
        trained = _class_folders(root / "train") if (root / "train").is_dir() else []
        classes = imagenet_classes()
        if not set(found) | set(trained) <= set(classes):
            classes = trained
            if not trained:
                raise FileNotFoundError(f"no class folders in {root / 'train'} to number those of {split}")
            unknown = sorted(set(found) - set(trained))
            if unknown:
                raise ValueError(f"{root / split} has classes that train lacks: {', '.join(unknown[:5])}")
        self.num_classes = len(classes)
        numbers = {name: number for number, name in enumerate(classes)}
        self._paths: list[str] = []
        self._labels: list[int] = []
        for name in found:
            paths = _images(root / split / name)
            if not paths:
                raise FileNotFoundError(f"no images in {root / split / name} ({' '.join(_EXTENSIONS)})")
            self._paths += paths
            self._labels += [numbers[name]] * len(paths)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of the images in `data.root`."""
        return cls(data.root, split)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        path = self._paths[index]
        with open(path, "rb") as file:
            return Example(file.read(), self._labels[index], path)


class Tfds:
    """A data set that TensorFlow Datasets prepared as ArrayRecord files, read without TensorFlow.

    `val` is its split `validation`, or `test` where it has no other.

    Args:
        name: of a data set with the features `image` and `label`.
        data_dir: the folder that holds the folder `name`.
        split: `train` or `val`.

    Raises:
        FileNotFoundError: the data set has not been prepared there.
        ValueError: it has another format, no such split or other features.
    """

    def __init__(self, name: str, data_dir: str | Path, split: str):
        # Imported here, because it takes a second that other sources need not wait for.
        import tensorflow_datasets as tfds

        versions = [path.parent for path in (Path(data_dir) / name).glob("*/dataset_info.json")]
        if not versions:
            raise FileNotFoundError(
                f"{name} is not prepared in {data_dir}; for ImageNet, "
                f"`make imagenet TARS=<folder of its tars> DATA={data_dir}` does that"
            )
        folder = max(versions, key=lambda path: tfds.core.Version(path.name))
        builder = tfds.builder_from_directory(folder)
        accepted = ("train",) if split == "train" else ("validation", "test")
        chosen = next((name for name in accepted if name in builder.info.splits), None)
        if chosen is None:
            raise ValueError(
                f"{folder} has no split {' or '.join(accepted)}; it has {', '.join(builder.info.splits)}"
            )
        features = builder.info.features
        kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
        if not all(key in features and isinstance(features[key], kind) for key, kind in kinds.items()):
            raise ValueError(f"{folder} has no image and class label; its features are {', '.join(features)}")
        self.num_classes = int(features["label"].num_classes)
        self._name = f"{name}/{chosen}"
        try:
            self._records = builder.as_data_source(chosen, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError:
            raise ValueError(
                f"{folder} holds {builder.info.file_format.value} files; prepare it as array_record "
                "in another folder"
            ) from None

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of `data.tfds_name` in `data.root`."""
        return cls(data.tfds_name, data.root, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        file_name = record.get("file_name")
        name = file_name.decode() if file_name else f"record {index} of {self._name}"
        if record["label"] < 0:
            raise ValueError(f"{name} has no label")
        return Example(record["image"], int(record["label"]), name)


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels as RGB: 1,000 to train, 797 to validate.

    Args:
        split: `train` or `val`; each class has the same share of both.
        labels_per_class: train on the first so many images of each class; None is all.
    """

    num_classes = 10

    def __init__(self, split: str, labels_per_class: int | None = None):
        # Imported here, because it takes a second that other sources need not wait for.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        halves = train_test_split(
            np.arange(len(digits.target)), train_size=1000, stratify=digits.target, random_state=0
        )
        chosen = halves[SPLITS.index(split)]
        if split == "train" and labels_per_class is not None:
            if labels_per_class < 1:
                raise ValueError(f"labels_per_class={labels_per_class} leaves no image to train on")
            labels = digits.target[chosen]
            first = [np.flatnonzero(labels == digit)[:labels_per_class] for digit in range(self.num_classes)]
            chosen = chosen[np.sort(np.concatenate(first))]
        self._indices = chosen
        self._labels = digits.target[chosen]
        grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self._images = np.repeat(grey[..., None], 3, axis=-1)

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split, of that for training the first `data.labels_per_class` images of each class."""
        return cls(split, data.labels_per_class)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]), f"digit {self._indices[index]}")


SOURCES: dict[str, type[NamedSource]] = {"imagefolder": ImageFolder, "tfds": Tfds, "digits": Digits}


def open_source(data: ConfigDict, split: str) -> Source:
    """Open the split `train` or `val` of the source that `data.source` names.

    Raises:
        FileNotFoundError: the images are not there.
        ValueError: no such source or split, or the files cannot be what they should be.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if data.source not in SOURCES:
        raise ValueError(f"no data.source {data.source!r}; there are {', '.join(SOURCES)}")
    return SOURCES[data.source].open(data, split)


@functools.cache
def imagenet_classes() -> list[str]:
    """Return the WordNet ids of ImageNet's 1,000 classes; the place of an id is its label."""
    return (Path(__file__).parent / "imagenet_wnids.txt").read_text().split()


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _images(folder: Path) -> list[str]:
    return [
        os.path.join(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(_EXTENSIONS) and name[0] != "."
    ]
