"""Data sets that TensorFlow Datasets prepared, read without TensorFlow."""

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from tat_jax.buckets import Bucket, Place, place
from tat_jax.data.source import Example, Source, some
from tat_jax.paths import expand

_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_ANEW = "copy it anew from where it was prepared, or prepare it again"


class Tfds:
    """A data set that TensorFlow Datasets prepared as ArrayRecord files, read without TensorFlow.

    `val` is its split `validation`, or `test` where it has no other. Folders beside its versions are passed
    over.

    Args:
        name: of a data set with the features `image` and `label`.
        data_dir: the folder that holds the folder `name`, on this machine or, gs:// alone, in a bucket.
        split: `train` or `val`.

    Attributes:
        classes: the names of the classes by their labels.

    Raises:
        FileNotFoundError: the data set has not been prepared there, or lacks files.
        ValueError: it has another format, no such split or other features, or is damaged.
    """

    def __init__(self, name: str, data_dir: str | Place, split: str):
        # Imported here, because it takes a second that other sources need not wait for.
        import tensorflow_datasets as tfds

        root = place(expand(str(data_dir)))
        folder = _newest_in_bucket(name, root) if isinstance(root, Bucket) else _newest_version(name, root)
        with _described(name, folder) as described:
            try:
                builder = tfds.builder_from_directory(described)
                features, splits = builder.info.features, builder.info.splits
            except Exception as error:  # whatever the readers of two formats meet
                raise _damaged(folder, error) from error
        accepted = ("train",) if split == "train" else ("validation", "test")
        chosen = next((name for name in accepted if name in splits), None)
        if chosen is None:
            raise ValueError(f"{folder} has no split {' or '.join(accepted)}; it has {', '.join(splits)}")
        kinds = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
        if not all(key in features and isinstance(features[key], kind) for key, kind in kinds.items()):
            raise ValueError(f"{folder} has no image and class label; its features are {', '.join(features)}")
        self.num_classes = int(features["label"].num_classes)
        self.classes = list(features["label"].names)
        self._name = f"{name}/{chosen}"
        instructions = [
            dataclasses.replace(instruction, filename=str(folder / os.path.basename(instruction.filename)))
            for instruction in splits[chosen].file_instructions
        ]
        self._files = [(instruction.filename, instruction.take) for instruction in instructions]
        try:
            self._records = builder.as_data_source(chosen, decoders={"image": tfds.decode.SkipDecoding()})
        except NotImplementedError:
            raise ValueError(
                f"{folder} holds {builder.info.file_format.value} files; prepare it as array_record "
                "in another folder"
            ) from None
        if isinstance(folder, Bucket):
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            self._records.data_source = ArrayRecordDataSource(instructions)
        there = folder.objects() if isinstance(folder, Bucket) else os.listdir(folder)
        if missing := [name for file, _ in self._files if (name := os.path.basename(file)) not in there]:
            of = f"{len(missing)} of its {len(self._files)} files of {chosen}"
            raise FileNotFoundError(f"{folder} lacks {of}: {some(missing)}; {_ANEW}")

    @classmethod
    def open(cls, data: ConfigDict, split: str) -> Source:
        """Open a split of `data.tfds_name` in `data.root`."""
        return cls(data.tfds_name, data.root, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        try:
            record = self._records[index]
        except Exception as error:  # whatever the readers of two formats meet
            raise _damaged(self._file(index), error, f"record {index} of {self._name} in ") from error
        file_name = record.get("file_name")
        name = file_name.decode() if file_name else f"record {index} of {self._name}"
        if record["label"] < 0:
            raise ValueError(f"{name} has no label")
        return Example(record["image"], int(record["label"]), name)

    def _file(self, index: int) -> str:
        """Return the file that holds a record."""
        for file, records in self._files:
            if index < records:
                return file
            index -= records
        raise IndexError(f"{self._name} has no such record")


def _newest_version(name: str, data_dir: Path) -> Path:
    """Return the folder of a data set's newest version.

    Raises:
        FileNotFoundError: there is none.
    """
    found = _newest(path.parent.name for path in (data_dir / name).glob("*/dataset_info.json"))
    if found is None:
        raise FileNotFoundError(
            f"{name} is not prepared in {data_dir}; for ImageNet, "
            f"`make imagenet TARS=<folder of its tars> DATA={data_dir}` does that"
        )
    return data_dir / name / found


def _newest_in_bucket(name: str, root: Bucket) -> Bucket:
    """Return the folder of a data set's newest version in a bucket likewise.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the bucket is of a kind that is not read.
    """
    if not str(root).startswith("gs://"):
        raise ValueError(f"{root}: ArrayRecord files are read from disks and gs:// alone; mount the bucket")
    found = _newest(root.folders(name))
    if found is None:
        raise FileNotFoundError(f"{name} is not prepared in {root}; copy it there from where it is")
    return root / name / found


def _newest(folders: Iterable[str]) -> str | None:
    """Return of folders that are called by versions the newest one; others do not count."""
    versions = {
        tuple(map(int, version.groups())): folder
        for folder in folders
        if (version := _VERSION.fullmatch(folder))
    }
    return versions[max(versions)] if versions else None


@contextlib.contextmanager
def _described(name: str, folder: Place) -> Iterator[str]:
    """Yield a folder with what describes a data set, without its records."""
    if not isinstance(folder, Bucket):
        yield str(folder)
        return
    found = {file: entry for file, entry in folder.objects().items() if file.endswith((".json", ".txt"))}
    with tempfile.TemporaryDirectory(prefix="tat_jax_") as copied:
        here = Path(copied) / name / folder.name
        folder.fetch(found, here)
        yield str(here)


def _damaged(path: str | Place, error: Exception, part: str = "") -> ValueError:
    """Return the error of a data set that cannot be read, which names it and the way out."""
    reason = re.split(r"[;\n]", str(error).strip())[0] or type(error).__name__
    return ValueError(f"{part}{path} cannot be read, it is damaged ({reason}); {_ANEW}")
