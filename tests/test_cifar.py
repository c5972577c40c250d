"""CIFAR's archives are read without executing a pickle, and their images cropped as usual."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest

from tat_jax.configs import base
from tat_jax.data.cifar import SIDE
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.sources import open_source
from tat_jax.data.transforms import padded_crop
from tat_jax.tasks.classification import Classification
from tests.images import encode

CLASSES = ["apple", "bear", "cup"]


def text(value: bytes) -> bytes:
    """Return a text as a pickle of Python 2 has it."""
    return b"T" + struct.pack("<I", len(value)) + value + b"q\x01"


def numbers(values) -> bytes:
    return b"]q\x02(" + b"".join(b"K" + bytes([value]) for value in values) + b"e"


def texts(values) -> bytes:
    return b"]q\x03(" + b"".join(map(text, values)) + b"e"


def array(images) -> bytes:
    """Return pixels as NumPy's arrays are pickled, plane after plane."""
    raw = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).tobytes()
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85U\x01btR(K\x01"
    made += b"K" + bytes([len(images)]) + b"M\0\x0c\x86"
    return made + b"cnumpy\ndtype\n(U\x02u1K\0K\x01tR\x89" + text(raw) + b"tb"


def pickled(**entries: bytes) -> bytes:
    body = b"".join(text(key.encode()) + value for key, value in entries.items())
    return b"\x80\x02}q\0(" + body + b"u."


def files(seed=0, key="fine_labels", count=7):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    labels = rng.integers(0, len(CLASSES), count)
    named = texts(f"{i}.png".encode() for i in range(count))
    coarse = numbers([0] * count)
    found = pickled(filenames=named, coarse_labels=coarse, data=array(images), **{key: numbers(labels)})
    return images, labels, found


@pytest.fixture
def hundred(tmp_path):
    """Return the images, the labels and the archive of a small CIFAR-100."""
    images, labels, train = files()
    names = pickled(coarse_label_names=texts([b"x"]), fine_label_names=texts(c.encode() for c in CLASSES))
    contents = {"train": train, "test": files(1)[2], "meta": names}
    path = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return images, labels, path


def data_of(root, **fields):
    data = base.base().data
    data.update({"source": "cifar100", "root": str(root), "image_size": SIDE, "crop_padding": 4, **fields})
    return data


def test_the_archive_and_its_folder_have_the_images_and_labels_of_their_pickles(hundred, tmp_path):
    images, labels, path = hundred
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    for root in (path, tmp_path / "unpacked", tmp_path / "unpacked" / "cifar-100-python"):
        source = open_source(data_of(root), "train")
        assert source.classes == CLASSES
        assert [source[i].label for i in range(len(source))] == labels.tolist()
        np.testing.assert_array_equal([source[i].image for i in range(len(source))], images)
    assert len(open_source(data_of(path), "val")) == 7


def test_what_numpy_makes_of_such_a_pickle_is_the_same():
    images, labels, content = files()
    found = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(found[b"data"].ravel(), images.transpose(0, 3, 1, 2).ravel())
    assert found[b"fine_labels"] == labels.tolist()


def test_cifar_10_has_five_files_to_train(tmp_path):
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(files(i, "labels")[2])
    (tmp_path / "test_batch").write_bytes(files(9, "labels")[2])
    names = pickled(
        num_cases_per_batch=b"M\x10\x27",
        label_names=texts(c.encode() for c in CLASSES),
        num_vis=b"M\0\x0c",
    )
    (tmp_path / "batches.meta").write_bytes(names)
    source = open_source(data_of(tmp_path, source="cifar10"), "train")
    assert (len(source), source.classes) == (35, CLASSES)
    np.testing.assert_array_equal(source[8].image, files(2, "labels")[0][1])


@pytest.fixture
def folders(tmp_path):
    """Return folders of classes with two images each, and the images to validate."""
    images = np.random.default_rng(0).integers(0, 256, (2, 6, SIDE, SIDE, 3), np.uint8)
    for split, of_split in zip(("train", "val"), images, strict=True):
        for i, image in enumerate(of_split):
            path = tmp_path / split / CLASSES[i // 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(image, "PNG"))
    return tmp_path, images[1]


def test_folders_of_classes_are_held_in_memory(folders):
    root, images = folders
    source = open_source(data_of(root), "val")
    assert (len(source), source.classes) == (6, CLASSES)
    np.testing.assert_array_equal([source[i].image for i in range(6)], images)
    assert [source[i].label for i in range(6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("train", [True, False])
def test_batches_of_images_in_memory_are_those_of_their_files(folders, train):
    found = []
    for name in ("cifar100", "imagefolder"):
        data = data_of(folders[0], source=name)
        source = open_source(data, "val")
        pipeline = Pipeline(source, Classification(), data, batch_size=4, train=train, seed=1, threads=0)
        found.append([(batch.image, batch.label) for batch in pipeline.epoch(2)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1], theirs[1])


def test_an_image_of_another_size_among_folders_is_named(folders):
    (folders[0] / "train/cup/9.png").write_bytes(encode(np.zeros((40, SIDE, 3), np.uint8), "PNG"))
    with pytest.raises(ValueError, match=r"train/cup/9\.png is 40×32, and CIFAR's are 32×32"):
        open_source(data_of(folders[0]), "train")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def labelled(labels: bytes, images=None) -> bytes:
    return pickled(data=array(files()[0] if images is None else images), fine_labels=labels)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (pickle.dumps(Bomb()), "refused, and nothing of it run: no data set has need of 'builtins.exec'"),
        (
            files()[2][:-2] + text(b"more") + pickle.dumps(Bomb(), protocol=2)[2:-1] + b"u.",
            "refused, and nothing of it run: no data set has need of '__builtin__.exec'",
        ),
        (files()[2][:-2000], "expected 21504 bytes in a string4, but only"),
        (b"not a pickle", "at position 0, opcode b'n' unknown"),
        (b"}q\0(u.", "has no fine_labels: it is another data set, or damaged"),
        (b"\x80\x02u.", r"its pickle is damaged \(pop from empty list\)"),
        (b"}q\0()K\x01u.", r"its pickle is damaged \(a tuple instead of a bytes\)"),
        (b"K\x01.", "is no dictionary"),
        (files(key="labels")[2], "has no fine_labels: it is another data set, or damaged"),
        (labelled(numbers([200] * 7)), "has the label 200, and there are 3 classes"),
        (labelled(b"](" + b"J\xff\xff\xff\xff" * 7 + b"e"), "has the label -1, and there are 3 classes"),
        (labelled(numbers([1] * 6)), r"has 6 labels and data \[7, 3072\], and an image"),
        (labelled(numbers([1] * 14), np.zeros((7, 2 * SIDE, SIDE, 3), np.uint8)), "its data are no array"),
        (pickled(fine_labels=numbers([1] * 7)), "its data are no array of bytes with two axes"),
    ],
)
def test_a_file_that_is_another_or_damaged_is_named_and_never_executed(content, said, hundred, tmp_path):
    with tarfile.open(hundred[2]) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "cifar-100-python" / "train").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}: train:? .*{said}"):
        open_source(data_of(tmp_path), "train")


@pytest.mark.parametrize("damage", [lambda raw: raw[:3000], lambda raw: raw[:-4], lambda raw: b"no archive"])
def test_an_archive_that_is_cut_short_is_named(hundred, tmp_path, damage):
    short = tmp_path / "short.tar.gz"
    short.write_bytes(damage(hundred[2].read_bytes()))
    with pytest.raises(ValueError, match=r"short\.tar\.gz is no \.tar\.gz, cut short or damaged"):
        open_source(data_of(short), "train")


def test_no_flipped_byte_of_an_archive_passes_for_pixels(hundred):
    raw = hundred[2].read_bytes()
    for place in range(60, len(raw), len(raw) // 50):  # behind the name of the archive
        hundred[2].write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        with pytest.raises(ValueError, match=r"is no \.tar\.gz, cut short or damaged"):
            open_source(data_of(hundred[2]), "train")


def test_the_archive_of_the_other_set_and_one_that_is_not_there_are_named(hundred, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"tar\.gz has no cifar-10-batches-py/batches\.meta; data\.root"
    ):
        open_source(data_of(hundred[2], source="cifar10"), "train")
    with pytest.raises(FileNotFoundError, match=r"absent is not there; data\.root is the \.tar\.gz"):
        open_source(data_of(tmp_path / "absent"), "train")
    with pytest.raises(ValueError, match=r"^gs://there/cifar: CIFAR is read from disks alone"):
        open_source(data_of("gs://there/cifar"), "train")


def crops(image, count=4000, flip=True):
    rng = np.random.default_rng(0)
    return np.array([padded_crop(image, rng, size=SIDE, padding=4, flip=flip) for _ in range(count)])


def test_every_crop_of_the_padded_image_and_its_mirror_image_are_as_likely():
    image = np.random.default_rng(1).integers(1, 256, (SIDE, SIDE, 3), np.uint8)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    every = [padded[i : i + SIDE, j : j + SIDE] for i in range(9) for j in range(9)]
    numbers = {crop.tobytes(): i for i, crop in enumerate([*every, *(crop[:, ::-1] for crop in every)])}
    counts = np.bincount([numbers[crop.tobytes()] for crop in crops(image)], minlength=162)
    expected = 4000 / 162
    assert ((counts - expected) ** 2 / expected).sum() < 161 + 4 * (2 * 161) ** 0.5  # of chi-square
    unmirrored = {numbers[crop.tobytes()] for crop in crops(image, count=200, flip=False)}
    assert max(unmirrored) < 81


def test_an_image_of_another_size_has_no_padded_crop():
    with pytest.raises(ValueError, match=r"the image is 40×32, and data\.crop_padding"):
        padded_crop(
            np.zeros((40, SIDE, 3), np.uint8), np.random.default_rng(0), size=SIDE, padding=4, flip=True
        )


def test_an_epoch_from_its_middle_on_is_the_rest_of_that_epoch_with_the_last_images_kept(hundred):
    images, _, path = hundred
    data = data_of(path)
    pipeline = Pipeline(
        open_source(data, "train"), Classification(), data, batch_size=2, train=True, seed=3, threads=1
    )
    whole, rest = list(pipeline.epoch(1)), list(pipeline.epoch(1, start_step=2))
    assert [int(batch.where.sum()) for batch in whole] == [2, 2, 2, 1]
    for batch, again in zip(whole[2:], rest, strict=True):
        np.testing.assert_array_equal(batch.image, again.image)
    evaluated = Pipeline(
        open_source(data, "train"), Classification(), data, batch_size=7, train=False, seed=3, threads=0
    )
    np.testing.assert_array_equal(next(iter(evaluated.epoch(0))).image, images)
