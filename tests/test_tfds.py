"""Data sets that TensorFlow Datasets prepared, made and read here without TensorFlow."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tat_jax.data import prepare
from tat_jax.data.sources import Tfds
from tests.interpreter import run_python
from tests.test_pipeline import assert_same, make


def jpeg(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8 + i, 12, 3), 10 * i, np.uint8)).save(file, "JPEG")
    return file.getvalue()


class Miniature(tfds.core.GeneratorBasedBuilder):
    """Five images to train and two to validate, of three classes; the last has no label."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # to find it, tfds needs a package that TensorFlow brings

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["ant", "bee", "cat"]),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(5)), "validation": self._generate_examples((5, 6))}

    def _generate_examples(self, numbers):
        for i in numbers:
            label = -1 if i == 6 else i % 3
            yield str(i), {"image": io.BytesIO(jpeg(i)), "label": label, "file_name": f"photo_{i}.JPEG"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    builder = Miniature(data_dir=path, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return path


@pytest.fixture
def edit(data_dir, tmp_path):
    """Return a function that copies the data set and changes the text of one of its files."""

    def change(file: str, old: str, new: str) -> Path:
        shutil.copytree(data_dir, tmp_path / "copy")
        path = tmp_path / "copy/miniature/1.0.0" / file
        text = json.dumps(json.loads(path.read_text()))
        assert old in text
        path.write_text(text.replace(old, new))
        return tmp_path / "copy"

    return change


def test_examples_are_the_encoded_files_with_their_labels_and_names(data_dir):
    source = Tfds("miniature", data_dir, "train")
    assert (len(source), source.num_classes) == (5, 3)
    assert sorted(source[i].name for i in range(5)) == [f"photo_{i}.JPEG" for i in range(5)]
    for example in map(source.__getitem__, range(5)):
        number = int(example.name[6])
        assert example.image == jpeg(number)
        assert example.label == number % 3


def test_processes_read_it_alike(data_dir):
    source = Tfds("miniature", data_dir, "train")
    data = make(source, batch_size=2, processes=1)
    assert_same(data.epoch(1), make(source, batch_size=2).epoch(1))
    data.close()


def test_validation_is_the_split_of_that_name(data_dir):
    assert len(Tfds("miniature", data_dir, "val")) == 2


def test_reading_imports_no_tensorflow(data_dir):
    done = run_python(
        f"""
        import sys
        from tat_jax.data.sources import Tfds
        Tfds("miniature", {str(data_dir)!r}, "train")[0]
        print("tensorflow" in sys.modules)
        """
    )
    assert done.stdout.strip() == "False"


def test_the_newest_version_is_read(data_dir, tmp_path):
    for version in ("9.0.0", "10.0.0"):
        shutil.copytree(data_dir / "miniature/1.0.0", tmp_path / "miniature" / version)
    path = tmp_path / "miniature/9.0.0/dataset_info.json"
    path.write_text(path.read_text().replace('"train"', '"old"'))
    assert len(Tfds("miniature", tmp_path, "train")) == 5


def test_what_is_called_otherwise_than_a_version_is_passed_over(data_dir, tmp_path):
    shutil.copytree(data_dir / "miniature/1.0.0", tmp_path / "miniature/1.0.0")
    for name in ("1.0.0_backup", "1.0", "2.0.0.incomplete", "latest"):
        shutil.copytree(data_dir / "miniature/1.0.0", tmp_path / "miniature" / name)
        (tmp_path / "miniature" / name / "dataset_info.json").write_text("{}")
    assert len(Tfds("miniature", tmp_path, "train")) == 5


def test_classes_have_the_names_of_the_data_set(data_dir):
    assert Tfds("miniature", data_dir, "val").classes == ["ant", "bee", "cat"]


@pytest.fixture
def record_file(data_dir, tmp_path) -> Path:
    """Return the file of the training images in a copy of the data set."""
    shutil.copytree(data_dir, tmp_path / "copy")
    (path,) = (tmp_path / "copy/miniature/1.0.0").glob("*train*record*")
    return path


def flip(data: bytes) -> bytes:
    """Change a byte in the middle, which a record's check sum covers."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flip, lambda data: data[:-100], lambda data: b""], ids=["bit", "cut", "empty"]
)
def test_a_damaged_record_is_named_with_its_file_and_the_way_out(record_file, damage):
    record_file.write_bytes(damage(record_file.read_bytes()))
    source = Tfds("miniature", record_file.parents[2], "train")
    named = rf"^record \d of miniature/train in {record_file} cannot be read, it is damaged .*; copy it anew"
    with pytest.raises(ValueError, match=named) as caught:
        [source[i] for i in range(5)]
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_at_once(record_file):
    record_file.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"lacks 1 of its 1 files of train: {record_file.name}; copy"
    ):
        Tfds("miniature", record_file.parents[2], "train")


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"name": 3}'])
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_a_damaged_description_is_named(record_file, file, text):
    (record_file.parent / file).write_text(text)
    with pytest.raises(ValueError, match=rf"{record_file.parent} ") as caught:
        Tfds("miniature", record_file.parents[2], "train")
    assert "\n" not in str(caught.value)


def test_an_image_without_label_is_an_error(data_dir):
    source = Tfds("miniature", data_dir, "val")
    with pytest.raises(ValueError, match=r"photo_6\.JPEG has no label"):
        [source[i] for i in range(2)]


def test_what_is_not_prepared_is_answered_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"imagenet2012 is not prepared in .*make imagenet TARS="):
        Tfds("imagenet2012", tmp_path, "train")


def test_a_missing_split_is_answered_with_those_there(edit):
    root = edit("dataset_info.json", '"train"', '"unsupervised"')
    with pytest.raises(ValueError, match=r"no split train; it has unsupervised, validation"):
        Tfds("miniature", root, "train")


def test_another_file_format_is_named(edit):
    root = edit("dataset_info.json", "array_record", "tfrecord")
    with pytest.raises(ValueError, match="holds tfrecord files; prepare it as array_record"):
        Tfds("miniature", root, "train")


def test_a_data_set_of_something_else_is_refused(edit):
    root = edit("features.json", '"label"', '"species"')
    with pytest.raises(ValueError, match=r"no image and class label; its features are .*species"):
        Tfds("miniature", root, "train")


@pytest.mark.parametrize("present", [(), prepare.TARS[:1], prepare.TARS], ids=["none", "train", "both"])
def test_preparing_says_in_one_line_what_is_missing(present, tmp_path, monkeypatch):
    for tar in present:
        (tmp_path / tar).touch()
    monkeypatch.setattr(prepare, "find_spec", lambda package: None)
    monkeypatch.setattr(sys, "argv", ["prepare", "--tars", str(tmp_path), "--to", str(tmp_path / "data")])
    missing = [str(tmp_path / tar) for tar in prepare.TARS if tar not in present] or ["tensorflow"]
    with pytest.raises(SystemExit) as caught:
        prepare.main()
    assert missing[0] in str(caught.value.code)
    assert "\n" not in str(caught.value.code)


# In a bucket


def test_records_in_a_bucket_of_google_are_those_of_a_folder(data_dir, emulator):
    emulator.copy(data_dir, "data")
    ours, theirs = Tfds("miniature", "gs://bucket/data", "train"), Tfds("miniature", data_dir, "train")
    assert (len(ours), ours.classes) == (len(theirs), theirs.classes)
    assert [ours[i] for i in range(5)] == [theirs[i] for i in range(5)]


def test_what_a_bucket_lacks_of_a_data_set_is_named(data_dir, emulator):
    with pytest.raises(FileNotFoundError, match=r"^miniature is not prepared in gs://bucket/data"):
        Tfds("miniature", "gs://bucket/data", "train")
    emulator.copy(data_dir, "data")
    for name in emulator.names("data/miniature/1.0.0/miniature-train"):
        emulator.delete(name)
    with pytest.raises(FileNotFoundError, match=r"^gs://bucket/data/miniature/1.0.0 lacks 1 of its 1 files"):
        Tfds("miniature", "gs://bucket/data", "train")


def test_records_in_a_bucket_of_amazon_are_refused(emulator):
    with pytest.raises(
        ValueError, match=r"^s3://bucket/data: ArrayRecord files are read from disks and gs://"
    ):
        Tfds("miniature", "s3://bucket/data", "train")
