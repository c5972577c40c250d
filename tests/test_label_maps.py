"""Sources of label maps: which classes pixels have, and in a line with its path what is wrong with a file."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from tat_jax.configs import base
from tat_jax.data.coco_stuff import CocoStuff, class_names
from tat_jax.data.digit_masks import DigitMasks
from tat_jax.data.label_folder import LabelFolder
from tat_jax.data.label_maps import IGNORED, OUTSIDE, decode_indices
from tat_jax.data.mat_file import read_matrix
from tat_jax.data.rows import Rows
from tat_jax.data.segments import segment
from tat_jax.data.shared import Layout
from tat_jax.data.sources import open_source
from tat_jax.data.transforms import DecodeError
from tat_jax.data.voc import Voc
from tat_jax.data.workers import AHEAD, HELD, Workers
from tat_jax.tasks.segmentation import Segmentation
from tests.images import encode, photograph

INDICES = np.array([[0, 1, 2, 1], [3, 2, 0, 1], [1, 1, 0, 3]], np.uint8)


def indices(height=6, width=8, classes=4, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, (height, width), np.uint8)


def png(label: np.ndarray, bits: int = 8, kind: int = 3) -> bytes:
    """Return a PNG of indices, of so many bits, with a palette (3) or in grey (0): Pillow writes not all."""
    height, width = label.shape
    if bits == 16:
        rows = label.astype(">u2").view(np.uint8).reshape(height, -1)
    else:
        levels = label[..., None] >> np.arange(bits)[::-1] & 1
        rows = np.packbits(levels.reshape(height, -1), axis=1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))]
    if kind == 3:
        chunks.append((b"PLTE", bytes(range(3)) * 2 ** min(bits, 8)))
    chunks += [(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def mat(compressed=True, **variables) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=compressed)
    return file.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def jpeg(height=6, width=8, seed=0) -> bytes:
    return encode(photograph(height, width, seed))


def pairs(*names: str, split="train", label=None) -> dict[str, bytes]:
    files = {}
    for seed, name in enumerate(names):
        files[f"images/{split}/{name}.jpg"] = jpeg(seed=seed)
        files[f"labels/{split}/{name}.png"] = png(indices(seed=seed) if label is None else label)
    return files


class TestIndicesOfAPng:
    @pytest.mark.parametrize(("bits", "kind"), [(b, 3) for b in (2, 4, 8)] + [(b, 0) for b in (2, 4, 8, 16)])
    def test_are_places_in_a_palette_or_levels_of_grey_of_any_number_of_bits(self, bits, kind):
        np.testing.assert_array_equal(decode_indices(png(INDICES, bits, kind), "a.png"), INDICES)

    @pytest.mark.parametrize("kind", [0, 3])
    def test_of_one_bit_are_0_and_1(self, kind):
        np.testing.assert_array_equal(decode_indices(png(INDICES % 2, 1, kind), "a.png"), INDICES % 2)

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
    def test_in_colours_are_refused(self, mode):
        file = encode(Image.fromarray(INDICES).convert(mode), "PNG")
        with pytest.raises(
            ValueError, match=r"^a.png is of colours .*class indices, with a palette or grey$"
        ):
            decode_indices(file, "a.png")

    @pytest.mark.parametrize(
        ("file", "why"),
        [
            (b"", "the file is empty"),
            (jpeg(), "not a PNG; it begins with b'.xff"),
            (png(INDICES)[:20], "the file is cut short"),
            (png(np.tile(INDICES, (50, 50)))[:-60], ""),
            (
                png(INDICES).replace(struct.pack(">II", 4, 3), struct.pack(">II", 99999, 99999)),
                "9,999,800,001 p",
            ),
        ],
        ids=["empty", "jpeg", "header", "cut", "huge"],
    )
    def test_of_broken_files_are_refused_by_name(self, file, why):
        with pytest.raises(DecodeError, match=rf"^a\.png: {why}[^\n]*$") as error:
            decode_indices(file, "a.png")
        assert error.value.name == "a.png"


class TestLabelFolder:
    def test_images_have_the_labels_of_their_names_in_folders_at_any_depth(self, tmp_path):
        root = write(tmp_path, pairs("b", "deep/er/a", "a"))
        source = LabelFolder(root, "train", 255)
        assert [source[i].name for i in range(3)] == [
            f"{root}/images/train/{name}.jpg" for name in ("a", "b", "deep/er/a")
        ]
        np.testing.assert_array_equal(source[1].label, indices(seed=0))
        np.testing.assert_array_equal(source[2].label, indices(seed=1))
        assert source[0].image == (root / "images/train/a.jpg").read_bytes()
        assert source[0].label.dtype == np.uint8

    def test_without_names_classes_are_counted_in_the_labels_that_train(self, tmp_path):
        label = np.array([[0, 7, 11]], np.uint8)
        few = np.array([[0, 1, 255]], np.uint8)
        root = write(tmp_path, pairs("a", label=label) | pairs("v", split="val", label=few))
        val = LabelFolder(root, "val", 255)
        assert (val.num_classes, val.classes[-1], val.colours) == (12, "11", None)
        assert val.notes == [
            f"12 classes, as many as the labels of train have; {root}/classes.txt would name them"
        ]
        assert LabelFolder(root, "train", 11).num_classes == 8

    def test_the_ignored_index_becomes_255_and_others_stay(self, tmp_path):
        root = write(tmp_path, pairs("a", label=np.array([[0, 7, 11]], np.uint8)))
        assert LabelFolder(root, "train", 11)[0].label.tolist() == [[0, 7, IGNORED]]
        assert LabelFolder(root, "train", 255)[0].label.tolist() == [[0, 7, 11]]
        files = pairs("a") | {"labels/train/a.png": png(np.array([[0, 3, 65535]], np.uint16), 16, 0)}
        assert LabelFolder(write(tmp_path, files), "train", 65535)[0].label.tolist() == [[0, 3, IGNORED]]

    @pytest.mark.parametrize(
        "text",
        [
            "sky 128 128 128\nopen road 0 0 255\n",
            "sky,128,128,128\r\nopen road, 0, 0, 255",
            "\ufeffsky 128 128 128\nopen road 0,0 255",
        ],
    )
    def test_classes_txt_names_classes_and_colours(self, tmp_path, text):
        root = write(tmp_path, pairs("a", label=INDICES % 2) | {"classes.txt": text})
        source = LabelFolder(root, "train", 255)
        assert (source.classes, source.notes) == (["sky", "open road"], [])
        assert source.colours.tolist() == [[128, 128, 128], [0, 0, 255]]

    def test_classes_txt_may_say_names_alone(self, tmp_path):
        root = write(tmp_path, pairs("a", label=INDICES) | {"classes.txt": "a\nlane 2\nc, d\nlast\n"})
        source = LabelFolder(root, "train", 255)
        assert (source.classes, source.colours) == (["a", "lane 2", "c, d", "last"], None)

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("a\n\nb", r"line 2 of .*classes.txt is empty"),
            ("a\nb\na", r"lines 1 and 3 of .*classes.txt name the same class, 'a'"),
            ("a 1 2 3\nb", r"line 2 of .*classes.txt says no colour, and others do"),
            ("a 1 2 3\nb 1 2 256", r"line 2 of .*classes.txt says a colour beyond 255: b 1 2 256"),
            ("\n".join(map(str, range(255))), r"classes.txt names 255 classes; there may be 254 at most"),
            (b"\xff\xfe", r"classes.txt is no text in UTF-8"),
        ],
    )
    def test_what_is_wrong_with_classes_txt_is_said_by_line(self, tmp_path, text, why):
        root = write(tmp_path, pairs("a", label=INDICES % 2) | {"classes.txt": text})
        with pytest.raises(ValueError, match=why):
            LabelFolder(root, "train", 255)

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (
                {"images/train/b.jpg": jpeg()},
                r"^1 of 2 have nothing of their name in .*labels: .*images/train/b.jpg$",
            ),
            ({"labels/train/b.png": png(INDICES)}, r"^1 of 2 have .* in .*/images: .*/labels/train/b.png$"),
            (
                {"labels/train/a.jpg": jpeg()},
                r"^[^\n]*labels/train/a.jpg: a label is a PNG of class indices$",
            ),
            ({"images/train/a.png": png(INDICES)}, r"^\S*a.jpg and \S*a.png have one name"),
            (
                {"labels/train/a.png": encode(photograph(6, 8), "PNG")},
                r"^\S*labels/train/a.png is of colours",
            ),
            (
                {"labels/train/a.png": png(INDICES + 251)},
                r"^\S*a.png has index 254, .*data.ignore_label=254$",
            ),
            ({"labels/train/a.png": png(INDICES * 0 + 255)}, r"labels/train have no index but 255"),
        ],
        ids=["image", "label", "jpeg", "twice", "colours", "beyond", "ignored"],
    )
    def test_what_does_not_fit_is_refused_in_a_line_with_its_path(self, tmp_path, change, why):
        root = write(tmp_path, pairs("a") | change)
        with pytest.raises((ValueError, FileNotFoundError), match=why):
            LabelFolder(root, "train", 255)

    def test_an_index_that_is_no_class_is_refused_when_it_is_read(self, tmp_path):
        root = write(tmp_path, pairs("a", label=INDICES) | {"classes.txt": "a\nb\nc"})
        with pytest.raises(
            ValueError,
            match=r"^\S*labels/train/a.png has 3 in row 1, column 0, which is no class: they are 0 to 2",
        ):
            LabelFolder(root, "train", 255)[0]

    def test_folders_that_are_missing_or_empty_are_named_with_what_belongs_there(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"^no folder \S*/images/train; images belong in \S*/images/train/"
        ):
            LabelFolder(tmp_path, "train", 255)
        write(tmp_path / "inner", pairs("a"))
        with pytest.raises(FileNotFoundError, match=r"did you mean --config.data.root=\S*/inner\?$"):
            LabelFolder(tmp_path, "train", 255)
        (tmp_path / "inner/images/train/a.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"^no images in \S*/inner/images/train "):
            LabelFolder(tmp_path / "inner", "train", 255)

    def test_a_bucket_is_refused(self):
        with pytest.raises(
            ValueError, match=r"^gs://b/c is not on a disk of this machine; mount a bucket first"
        ):
            LabelFolder("gs://b/c", "train", 255)

    def test_the_largest_height_and_width_are_those_of_different_images_and_of_headers_alone(self, tmp_path):
        files = {"classes.txt": "a\nb"}
        for name, shape in {"a": (3, 20), "b": (9, 5), "c": (1, 1)}.items():
            files |= pairs(name, label=indices(*shape, classes=2))
        files["labels/train/a.png"] = files["labels/train/a.png"][:-30]
        files["labels/train/c.png"] = b"broken"
        assert LabelFolder(write(tmp_path, files), "train", 255).largest == (9, 20)


@pytest.fixture
def voc(tmp_path) -> Path:
    """VOC with three images to train and two to validate, SBD with six, of which three are VOC's."""
    lists = {"train": ("v2", "v1", "v3"), "val": ("w1", "w2")}
    files: dict[str, bytes | str] = {}
    for split, names in lists.items():
        files[f"VOC2012/ImageSets/Segmentation/{split}.txt"] = "\n".join(names) + "\n"
        for name in names:
            files[f"VOC2012/JPEGImages/{name}.jpg"] = jpeg()
            files[f"VOC2012/SegmentationClass/{name}.png"] = png(np.array([[0, 20, 255]], np.uint8))
    sbd = {"train": ("s1", "v1", "w2"), "val": ("s2", "s1", "v3")}
    for split, names in sbd.items():
        files[f"SBD/dataset/{split}.txt"] = "\n".join(names)
        for name in names:
            files[f"SBD/dataset/img/{name}.jpg"] = jpeg()
            mask = {
                "Boundaries": np.array([[scipy.sparse.csc_matrix(np.eye(2))]], object),
                "Segmentation": np.array([[0, 20, 7]], np.uint8),
                "CategoriesPresent": np.array([[7.0]]),
            }
            files[f"SBD/dataset/cls/{name}.mat"] = mat(GTcls=mask)
    return write(tmp_path, files)


class TestVoc:
    def test_with_sbd_it_is_the_published_union(self, voc):
        source = Voc(voc / "VOC2012", "train", voc / "SBD")
        assert [source[i].name.removeprefix(f"{voc}/") for i in range(len(source))] == [
            *(f"VOC2012/JPEGImages/{name}.jpg" for name in ("v2", "v1", "v3")),
            *(f"SBD/dataset/img/{name}.jpg" for name in ("s1", "s2")),
        ]
        assert source.notes == ["train: 3 images of VOC, 2 of SBD"]
        assert source[1].label.tolist() == [[0, 20, IGNORED]]
        assert source[3].label.tolist() == [[0, 20, 7]]

    def test_alone_and_to_validate_it_is_voc(self, voc):
        assert len(Voc(voc / "VOC2012", "train")) == 3
        val = Voc(voc / "VOC2012", "val", voc / "SBD")
        assert [Path(val[i].name).stem for i in range(len(val))] == ["w1", "w2"]
        assert val.largest == (6, 8)
        assert (val.num_classes, val.classes[0], val.classes[15], val.notes) == (
            21,
            "background",
            "person",
            [],
        )

    @pytest.mark.parametrize(
        ("path", "content", "why"),
        [
            ("VOC2012/JPEGImages/v1.jpg", None, r"^\S*/JPEGImages lacks 1 of 3 files: v1.jpg$"),
            ("VOC2012/SegmentationClass/v3.png", None, r"^\S*/SegmentationClass lacks 1 of 3 files: v3.png$"),
            ("SBD/dataset/cls/s2.mat", None, r"^\S*/SBD/dataset/cls lacks 1 of 2 files: s2.mat$"),
            (
                "VOC2012/ImageSets/Segmentation/train.txt",
                b" \n",
                r"^\S*train.txt is empty, and lists no image$",
            ),
            (
                "SBD/dataset/val.txt",
                None,
                r"^no file \S*dataset/val.txt; \S* is to be SBD's folder benchmark_R",
            ),
            (
                "VOC2012/ImageSets/Segmentation/train.txt",
                None,
                r"^no file .*train.txt; .* folder VOC2012 of VOCd",
            ),
        ],
    )
    def test_what_is_missing_is_named(self, voc, path, content, why):
        (voc / path).unlink()
        if content is not None:
            (voc / path).write_bytes(content)
        with pytest.raises((FileNotFoundError, ValueError), match=why):
            Voc(voc / "VOC2012", "train", voc / "SBD")

    def test_the_folder_around_it_is_told_from_it(self, voc):
        with pytest.raises(FileNotFoundError, match=r"did you mean --config.data.root=\S*/VOC2012\?$"):
            Voc(voc, "train")


class TestCocoStuff:
    @pytest.fixture
    def root(self, tmp_path) -> Path:
        files: dict[str, bytes | str] = {}
        for split in ("train", "test"):
            files[f"imageLists/{split}.txt"] = f"COCO_{split}\n"
            files[f"images/COCO_{split}.jpg"] = jpeg(3, 4)
            files[f"annotations/COCO_{split}.mat"] = mat(
                names=np.array([["unlabeled", "person"]], object),
                S=np.array([[0, 1, 92, 182]], np.uint8 if split == "train" else np.float64),
                captions=np.array([["a"]], object),
            )
        return write(tmp_path, files)

    def test_classes_begin_with_1_in_the_files_and_0_is_no_class(self, root):
        for split in ("train", "val"):
            assert CocoStuff(root, split)[0].label.tolist() == [[IGNORED, 0, 91, 181]]

    def test_the_test_images_validate(self, root):
        val = CocoStuff(root, "val")
        assert ([val[0].name], val.largest) == ([f"{root}/images/COCO_test.jpg"], (3, 4))

    def test_its_182_classes_are_91_things_and_the_stuff_by_name(self, root):
        names = class_names()
        assert (len(names), len(set(names)), CocoStuff(root, "train").num_classes) == (182, 182, 182)
        assert [names[i] for i in (0, 11, 25, 90, 91, 181)] == [
            "person",
            "street sign",
            "hat",
            "hair brush",
            "banner",
            "wood",
        ]
        assert names[91:] == sorted(names[91:])

    def test_a_class_beyond_them_is_refused(self, root):
        write(root, {"annotations/COCO_train.mat": mat(S=np.array([[183]], np.uint8))})
        with pytest.raises(
            ValueError, match=r"COCO_train.mat: S − 1 has 182 in row 0, column 0, which is no class"
        ):
            CocoStuff(root, "train")[0]


def compressed(content):
    """Return a file with one compressed variable of such content."""
    packed = zlib.compress(content, 9)
    return mat(S=1)[:128] + struct.pack("<II", 15, len(packed)) + packed


class TestMatFile:
    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.float32, np.float64, bool])
    def test_whole_numbers_of_any_type_are_those_that_scipy_wrote(self, compressed, dtype):
        numbers = indices(7, 5, classes=2 if dtype is bool else 200).astype(dtype)
        file = mat(compressed, other=np.eye(3), S=numbers, text="S")
        np.testing.assert_array_equal(read_matrix(file, ("S",), "a.mat"), numbers)
        within = mat(compressed, GT={"names": np.array([["a"]], object), "x": {"S": numbers, "T": 1}})
        np.testing.assert_array_equal(read_matrix(within, ("GT", "x", "S"), "a.mat"), numbers)

    @pytest.mark.parametrize(
        ("file", "path", "why"),
        [
            (b"", ("S",), "not a .mat of MATLAB 5 to 7"),
            (b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(99), ("S",), "not a .mat of .* with -v7"),
            (mat(T=1), ("S",), "has no variable S"),
            (mat(S=1), ("S", "T"), "S is no structure"),
            (mat(S={"U": 1}), ("S", "T"), "S has no field T"),
            (mat(S="text"), ("S",), "the label is no matrix of whole numbers"),
            (mat(S=np.array([[0.5]])), ("S",), "the label is no matrix of whole numbers"),
            (mat(S=np.array([[np.nan]])), ("S",), "the label is no matrix of whole numbers"),
            (mat(S=np.array([[1j]])), ("S",), "the label is no matrix of whole numbers"),
            (mat(S=np.zeros((2, 2, 2))), ("S",), "the label is no matrix of whole numbers"),
            (mat(S=np.zeros((0, 2))), ("S",), "the label is no matrix of whole numbers"),
            (compressed(b""), ("S",), "has no variable S"),
            (compressed(struct.pack("<II", 14, 99)), ("S",), "damaged, or cut short"),
        ],
    )
    def test_other_contents_are_refused_by_name(self, file, path, why):
        with pytest.raises(DecodeError, match=rf"^a\.mat: {why}[^\n]*$"):
            read_matrix(file, path, "a.mat")

    def test_a_file_that_unpacks_to_more_than_memory_is_refused(self):
        file = compressed(bytes(2**28 + 8))
        with pytest.raises(DecodeError, match=r"^a\.mat: has a variable of more than 268,435,456 bytes$"):
            read_matrix(file, ("S",), "a.mat")

    @settings(max_examples=300, deadline=None)
    @given(st.data(), st.booleans(), st.booleans())
    def test_whatever_is_wrong_with_a_file_it_is_said_in_a_line(self, data, compressed, nested):
        numbers, path = indices(5, 3), ("GT", "S") if nested else ("S",)
        file = bytearray(mat(compressed, GT={"T": 2, "S": numbers}) if nested else mat(compressed, S=numbers))
        for _ in range(data.draw(st.integers(0, 3))):
            file[data.draw(st.integers(116, len(file) - 1))] = data.draw(st.integers(0, 255))
        file = file[: data.draw(st.integers(0, 2 * len(file)))]
        found, said = None, ""
        try:
            found = read_matrix(bytes(file), path, "a.mat")
        except DecodeError as error:
            said = str(error)
        if found is None:
            assert said.startswith("a.mat: ")
            assert "\n" not in said
        else:
            assert found.ndim == 2
            assert found.dtype.kind in "iu"


class TestDigitMasks:
    def test_scenes_are_the_same_each_time_and_of_sizes_within_the_largest(self):
        source = DigitMasks("val")
        examples = [source[i] for i in range(48)]
        shapes = np.array([example.label.shape for example in examples])
        assert (len(source), len(DigitMasks("train"))) == (48, 160)
        assert source.largest == tuple(shapes.max(0))
        assert len(np.unique(shapes, axis=0)) > 30
        np.testing.assert_array_equal(source[5].image, examples[5].image)
        assert (len(source.classes), source.num_classes) == (11, 11)

    def test_each_class_is_there_with_edges_of_no_class(self):
        source = DigitMasks("train")
        found = np.unique(np.concatenate([source[i].label.ravel() for i in range(len(source))]))
        assert found.tolist() == [*range(11), IGNORED]

    def test_digits_are_brighter_than_the_background(self):
        image, label, _ = DigitMasks("val")[0]
        assert image[(label > 0) & (label != IGNORED)].max(-1).min() > image[label == 0].max()


def data_of(source: str, **said) -> ConfigDict:
    data = base.base().data
    data.update({"source": source, "image_size": 16} | said)
    return data


def rows_of(data: ConfigDict, split: str) -> tuple[Rows, np.ndarray]:
    """Return the rows of a split, and its blank label: a canvas of the largest size to evaluate."""
    source = open_source(data, split)
    train = split == "train"
    blank = np.full((16, 16), IGNORED, np.uint8) if train else np.full(source.largest, OUTSIDE, np.uint8)
    return Rows(source, segment, data, blank, train=train, seed=0), blank


def fill(rows: Rows, blank: np.ndarray, chosen: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    images = np.empty((len(chosen), 16, 16, 3), np.uint8)
    labels = np.empty((len(chosen), *blank.shape), np.uint8)
    where = np.empty(len(chosen), bool)
    return images, labels, where, rows.fill(images, labels, where, 1, np.array(chosen))


class TestRows:
    def test_a_training_asks_for_no_sizes_and_an_evaluation_for_the_largest(self, tmp_path):
        root = write(tmp_path, pairs("a", label=INDICES))
        data = data_of("label_folder", root=str(root))
        source = open_source(data, "train")
        assert Segmentation().blank_label(data, source, train=True).shape == (16, 16)
        assert "largest" not in vars(source)
        assert Segmentation().blank_label(data, source, train=False).shape == INDICES.shape

    def test_to_evaluate_a_label_lies_untouched_top_left_in_a_canvas_of_the_largest_size(self):
        rows, blank = rows_of(data_of("digit_masks"), "val")
        _, labels, where, _ = fill(rows, blank, [3, 0, -1])
        for label, index in zip(labels, (3, 0), strict=False):
            expected = rows.source[index].label
            height, width = expected.shape
            np.testing.assert_array_equal(label[:height, :width], expected)
            label[:height, :width] = OUTSIDE
            assert (label == OUTSIDE).all()
        assert (labels[2] == OUTSIDE).all()
        assert where.tolist() == [True, True, False]

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_processes_that_read_give_the_same_maps(self, split):
        rows, blank = rows_of(data_of("digit_masks"), split)
        chosen = [*range(9), -1]
        images, labels, where, _ = fill(rows, blank, chosen)
        workers = Workers(rows, Layout.of(AHEAD + HELD, 10, 16, blank), processes=1, threads=2)
        try:
            ((slot, skipped),) = workers.read(1, [np.array(chosen)])
            for got, expected in ((slot.image, images), (slot.label, labels), (slot.where, where)):
                np.testing.assert_array_equal(got, expected)
            assert skipped == {}
        finally:
            del slot
            workers.close()

    @pytest.mark.parametrize("broken", ["images/train/b.jpg", "labels/train/b.png"])
    def test_what_cannot_be_read_is_left_out_if_that_is_said_and_else_named(self, tmp_path, broken):
        root = write(tmp_path, pairs("a", "b", "c") | {broken: b"broken"})
        data = data_of("label_folder", root=str(root), skip_broken=True)
        rows, blank = rows_of(data, "train")
        _, labels, where, skipped = fill(rows, blank, [0, 1, 2])
        assert where.tolist() == [True, False, True]
        assert (labels[1] == IGNORED).all()
        assert skipped == {1: f"{root}/{broken}"}
        rows, blank = rows_of(data_of("label_folder", root=str(root)), "train")
        with pytest.raises(DecodeError, match=rf"^{root}/{broken}: not a"):
            fill(rows, blank, [0, 1, 2])

    def test_a_label_of_another_size_stops_the_run_with_the_images_path_even_so(self, tmp_path):
        root = write(tmp_path, pairs("a", label=INDICES))
        rows, blank = rows_of(data_of("label_folder", root=str(root), skip_broken=True), "train")
        with pytest.raises(
            ValueError, match=rf"^{root}/images/train/a.jpg: the image is 8 × 6 pixels, its label 4 × 3$"
        ):
            fill(rows, blank, [0])
