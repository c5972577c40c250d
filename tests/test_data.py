"""The input pipeline: every image once, the same whatever reads it, and broken files named."""

import contextlib
import io
import resource
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from tat_jax.data.pipeline import Pipeline, open_pipeline
from tat_jax.data.sources import Digits, Example, ImageFolder, imagenet_classes, open_source
from tat_jax.data.transforms import (
    DecodeError,
    decode,
    eval_transform,
    random_resized_crop_box,
    train_transform,
)

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def photograph(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """Smooth noise, so that JPEG has something to encode everywhere."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, b"IDAT")
    )


def run_python(code: str, *options: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, in which nothing is imported and no warning filter is pytest's."""
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent,
        check=True,
    )


class TestDecode:
    @pytest.mark.filterwarnings("ignore:Palette images with Transparency")
    @pytest.mark.parametrize(
        ("mode", "kind", "options"),
        [
            ("RGB", "JPEG", {}),
            ("RGB", "JPEG", {"progressive": True}),
            ("L", "JPEG", {}),
            ("CMYK", "JPEG", {}),
            ("1", "PNG", {}),
            ("L", "PNG", {}),
            ("LA", "PNG", {}),
            ("P", "PNG", {}),
            ("P", "PNG", {"transparency": bytes(range(256))}),
            ("RGBA", "PNG", {}),
            ("I;16", "PNG", {}),
            ("RGB", "WEBP", {"lossless": True}),
            ("RGB", "BMP", {}),
            ("RGB", "PPM", {}),
            ("RGB", "TIFF", {}),
        ],
    )
    def test_every_mode_becomes_what_pillow_makes_of_it(self, mode, kind, options):
        image = Image.fromarray(photograph()).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        data = encode(image, kind, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        got = decode(data, "photo.JPEG")
        assert got.dtype == np.uint8
        assert got.shape == (40, 60, 3)
        np.testing.assert_array_equal(got, expected)

    def test_cmyk_inks_are_not_inverted(self):
        red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        assert np.abs(decode(encode(red), "red.JPEG").astype(int) - [255, 0, 0]).max() < 8

    def test_the_exif_orientation_is_not_applied(self):
        image = Image.fromarray(photograph(40, 60))
        exif = Image.Exif()
        exif[0x0112] = 6
        np.testing.assert_array_equal(decode(encode(image, exif=exif), "a"), decode(encode(image), "b"))

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "the file is empty"),
            (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", r"not an image; .*<!DOCTYPE"),
            (b"\0" * 5000, "not an image"),
            (encode(photograph())[100:], "not an image"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "not an image"),
            (encode(photograph())[:20], "not an image"),
        ],
        ids=["empty", "html", "zeros", "headless", "postscript", "header"],
    )
    def test_what_is_no_image_is_named(self, data, reason):
        with pytest.raises(DecodeError, match=rf"^/data/n01440764/broken\.JPEG: {reason}.*$"):
            decode(data, "/data/n01440764/broken.JPEG")

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"kind": "PNG"}], ids=str)
    @settings(deadline=None)
    @given(kept=st.floats(0, 1))
    def test_a_truncated_file_is_an_error_and_never_half_an_image(self, options, kept):
        data = encode(photograph(), **options)
        try:
            image = decode(data[: int(kept * len(data))], "cut.JPEG")
        except DecodeError:
            return
        np.testing.assert_array_equal(image, decode(data, "whole.JPEG"))

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"])
    @settings(deadline=None)
    @given(st.data())
    def test_whatever_is_wrong_with_a_file_the_error_is_ours(self, kind, data):
        bytes_ = bytearray(encode(photograph(12, 12), kind))
        for place in data.draw(st.lists(st.integers(0, len(bytes_) - 1), min_size=1, max_size=8)):
            bytes_[place] = data.draw(st.integers(0, 255))
        with contextlib.suppress(DecodeError):
            assert decode(bytes(bytes_), "x").dtype == np.uint8

    # Pillow itself only warns of the second.
    @pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (10_000, 10_000)])
    def test_a_decompression_bomb_is_refused_before_it_takes_memory(self, width, height):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DecodeError, match=r"bomb\.png: .*pixels"):
            decode(png_header(width, height), "bomb.png")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB

    def test_pillows_warnings_do_not_reach_the_user(self):
        done = run_python(
            """
            import io
            from PIL import Image
            from tat_jax.data.transforms import DecodeError, decode
            from tests.test_data import encode, png_header
            palette = Image.new("P", (8, 8))
            assert decode(encode(palette, "PNG", transparency=bytes(range(256))), "a").shape == (8, 8, 3)
            try:
                decode(png_header(10_000, 10_000), "bomb")
            except DecodeError as error:
                print(error)
            """
        )
        assert done.stdout.strip() == "bomb: 100,000,000 pixels, more than the 89,478,485 allowed"
        assert done.stderr == ""


class TestRandomResizedCrop:
    @given(
        height=st.integers(1, 600),
        width=st.integers(1, 600),
        seed=st.integers(0, 2**32),
        low=st.floats(0.01, 1),
    )
    def test_a_crop_lies_in_the_image_and_in_the_ranges(self, height, width, seed, low):
        rng = np.random.default_rng(seed)
        top, left, crop_height, crop_width = random_resized_crop_box(height, width, rng, (low, 1), RATIO)
        assert 0 <= top <= top + crop_height <= height
        assert 0 <= left <= left + crop_width <= width
        assert crop_height > 0
        assert crop_width > 0
        # Each side is rounded by up to half a pixel.
        assert (crop_width - 0.5) / (crop_height + 0.5) <= RATIO[1] + 1e-9
        assert (crop_width + 0.5) / (crop_height - 0.5) >= RATIO[0] - 1e-9

    @pytest.mark.parametrize(
        ("height", "width", "box"),
        [
            (10, 1000, (0, 493, 10, 13)),
            (1000, 10, (493, 0, 13, 10)),
            (1, 1000, (0, 499, 1, 1)),
            (100, 110, (0, 0, 100, 110)),
        ],
    )
    def test_what_never_fits_becomes_the_central_crop(self, height, width, box):
        # Four times the area of the image fits nowhere.
        rng = np.random.default_rng(0)
        assert random_resized_crop_box(height, width, rng, (4, 4), RATIO) == box

    def test_the_whole_area_of_a_square_is_the_square(self):
        assert random_resized_crop_box(64, 64, np.random.default_rng(0), (1, 1), (1, 1)) == (0, 0, 64, 64)


class TestTransforms:
    @given(seed=st.integers(0, 2**32))
    def test_training_crops_first_and_then_resizes_with_antialias(self, seed):
        image = photograph()
        got = train_transform(
            image, np.random.default_rng(seed), size=16, scale=SCALE, ratio=RATIO, flip=False
        )
        top, left, height, width = random_resized_crop_box(40, 60, np.random.default_rng(seed), SCALE, RATIO)
        crop = Image.fromarray(image).crop((left, top, left + width, top + height))
        np.testing.assert_array_equal(got, np.asarray(crop.resize((16, 16), Image.Resampling.BILINEAR)))

    def test_half_of_the_images_are_mirrored(self):
        image = photograph(16, 16)
        rng = np.random.default_rng(0)
        mirrored = 0
        for _ in range(400):
            got = train_transform(image, rng, size=16, scale=(1, 1), ratio=(1, 1), flip=True)
            is_mirrored = np.array_equal(got, image[:, ::-1])
            assert is_mirrored or np.array_equal(got, image)
            mirrored += is_mirrored
        assert 160 < mirrored < 240

    @pytest.mark.parametrize(
        ("height", "width", "top", "left"),
        # Halves are rounded to the even neighbour: 58.5 to 58, 59.5 to 60.
        [(256, 341, 16, 58), (256, 343, 16, 60), (341, 256, 58, 16), (256, 256, 16, 16)],
    )
    def test_evaluation_takes_the_centre(self, height, width, top, left):
        image = photograph(height, width)
        expected = image[top : top + 224, left : left + 224]
        np.testing.assert_array_equal(eval_transform(image, resize=256, size=224), expected)

    def test_evaluation_resizes_the_shorter_side_and_cuts_off_the_fraction_of_the_longer(self):
        image = photograph(300, 500)
        resized = np.asarray(Image.fromarray(image).resize((426, 256), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(eval_transform(image, resize=256, size=224), resized[16:240, 101:325])

    @given(height=st.integers(1, 80), width=st.integers(1, 80), margin=st.integers(0, 9))
    def test_evaluation_gives_its_size_for_every_image(self, height, width, margin):
        image = np.zeros((height, width, 3), np.uint8)
        assert eval_transform(image, resize=20 + margin, size=20).shape == (20, 20, 3)

    def test_a_centre_larger_than_the_image_is_an_error(self):
        with pytest.raises(ValueError, match=r"224 pixels .* 200$"):
            eval_transform(photograph(), resize=200, size=224)


@pytest.fixture
def folder(tmp_path):
    """Return a function that makes small images at the paths given, below a root, and returns the root."""

    def make(*paths: str) -> Path:
        for i, path in enumerate(paths):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(encode(photograph(12, 16, seed=i)))
        return tmp_path

    return make


class TestImageFolder:
    def test_examples_come_in_torchvisions_order_with_sorted_labels(self, folder):
        root = folder(
            "train/dog/b.JPEG",
            "train/dog/a.png",
            "train/dog/deep/er/c.jpg",
            "train/cat/z.WebP",
            "val/dog/v.jpeg",
        )
        (root / "train/dog/notes.txt").write_text("no image")
        source = ImageFolder(root, "train")
        assert source.num_classes == 2
        assert [(example.name, example.label) for example in map(source.__getitem__, range(len(source)))] == [
            (f"{root}/train/cat/z.WebP", 0),
            (f"{root}/train/dog/a.png", 1),
            (f"{root}/train/dog/b.JPEG", 1),
            (f"{root}/train/dog/deep/er/c.jpg", 1),
        ]
        assert source[1].image == (root / "train/dog/a.png").read_bytes()

    def test_imagenets_ids_have_imagenets_labels_even_if_some_are_missing(self, folder):
        root = folder("train/n13133613/a.JPEG", "train/n01440764/b.JPEG", "val/n15075141/c.JPEG")
        train, val = ImageFolder(root, "train"), ImageFolder(root, "val")
        assert (train.num_classes, [train[0].label, train[1].label]) == (1000, [0, 998])
        assert (val.num_classes, val[0].label) == (1000, 999)

    def test_the_1000_ids_are_sorted_and_distinct(self):
        assert len(imagenet_classes()) == 1000
        assert imagenet_classes() == sorted(set(imagenet_classes()))

    def test_validation_has_the_labels_of_training_even_if_it_lacks_classes(self, folder):
        root = folder("train/ant/1.jpg", "train/bee/1.jpg", "train/cat/1.jpg", "val/cat/1.jpg")
        val = ImageFolder(root, "val")
        assert (val.num_classes, val[0].label) == (3, 2)

    def test_one_strange_folder_makes_both_splits_number_the_folders_of_train(self, folder):
        root = folder(
            "train/n01440764/a.jpg", "train/n15075141/a.jpg", "train/extra/a.jpg", "val/n15075141/a.jpg"
        )
        train, val = ImageFolder(root, "train"), ImageFolder(root, "val")
        assert train.num_classes == val.num_classes == 3
        assert train[2].label == val[0].label == 2

    def test_a_class_that_training_lacks_is_an_error(self, folder):
        root = folder("train/ant/1.jpg", "val/ant/1.jpg", "val/bee/1.jpg")
        with pytest.raises(ValueError, match=r"val has classes that train lacks: bee$"):
            ImageFolder(root, "val")

    def test_symbolic_links_to_splits_classes_and_folders_within_work(self, folder):
        root = folder("elsewhere/ant/1.jpg", "elsewhere/more/2.jpg", "train/bee/1.jpg")
        (root / "train/ant").symlink_to(root / "elsewhere/ant")
        (root / "train/bee/more").symlink_to(root / "elsewhere/more")
        (root / "val").symlink_to(root / "train")
        source = ImageFolder(root, "val")
        assert [source[i].label for i in range(len(source))] == [0, 1, 1]

    def test_hidden_files_and_folders_are_passed_over(self, folder):
        root = folder("train/ant/1.jpg", "train/ant/._1.jpg", "train/.ipynb_checkpoints/1.jpg")
        assert (len(ImageFolder(root, "train")), ImageFolder(root, "train").num_classes) == (1, 1)

    @pytest.mark.parametrize(
        ("paths", "split", "error", "message"),
        [
            (
                ["train/a/1.jpg"],
                "val",
                FileNotFoundError,
                r"no folder .*/val; images belong in .*/val/<class>/",
            ),
            (["val/a/1.jpg"], "train", FileNotFoundError, r"no folder .*/train; images belong in"),
            (
                ["val/a/1.jpg"],
                "val",
                FileNotFoundError,
                r"no class folders in .*/train to number those of val",
            ),
            (
                ["train/1.jpg", "train/2.jpg"],
                "train",
                ValueError,
                r"/train has no class folders; images belong",
            ),
            (
                ["train/a/1.jpg", "train/b/1.txt"],
                "train",
                FileNotFoundError,
                r"no images in .*/train/b \(\.jpg ",
            ),
        ],
        ids=["no val", "no train", "val alone", "flat", "empty class"],
    )
    def test_what_is_missing_is_named(self, folder, paths, split, error, message):
        root = folder(*paths)
        with pytest.raises(error, match=message) as caught:
            ImageFolder(root, split)
        assert "\n" not in str(caught.value)

    def test_a_missing_root_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder .*/nowhere; images belong"):
            ImageFolder(tmp_path / "nowhere", "train")


class TestDigits:
    def test_the_splits_are_apart_and_whole(self):
        train, val = Digits("train"), Digits("val")
        assert (len(train), len(val), train.num_classes) == (1000, 797, 10)
        names = {source[i].name for source in (train, val) for i in range(len(source))}
        assert len(names) == 1797

    def test_every_class_has_the_same_share_of_both(self):
        train, val = (
            np.bincount([source[i].label for i in range(len(source))])
            for source in map(Digits, ("train", "val"))
        )
        np.testing.assert_allclose(train / (train + val), 1000 / 1797, atol=0.01)

    def test_images_are_grey_and_use_the_whole_range(self):
        source = Digits("train")
        images = np.stack([source[i].image for i in range(100)])
        assert (images.shape, images.dtype) == ((100, 8, 8, 3), np.uint8)
        assert (images.min(), images.max()) == (0, 255)
        assert (images[..., :1] == images).all()

    def test_few_labels_are_the_first_of_each_class(self):
        every, few = Digits("train"), Digits("train", labels_per_class=5)
        assert len(few) == 50
        first = {label: [] for label in range(10)}
        for i in range(len(every)):
            first[every[i].label].append(every[i].name)
        assert {few[i].name for i in range(50)} == {name for names in first.values() for name in names[:5]}
        assert len(Digits("val", labels_per_class=5)) == 797

    def test_no_labels_are_an_error(self):
        with pytest.raises(ValueError, match="labels_per_class=0"):
            Digits("train", labels_per_class=0)


class TestOpenSource:
    def test_an_unknown_source_is_answered_with_the_known(self):
        with pytest.raises(ValueError, match="'webdataset'; there are imagefolder, tfds, digits"):
            open_source(ConfigDict({"source": "webdataset"}), "train")

    def test_an_unknown_split_is_answered_with_the_known(self):
        with pytest.raises(ValueError, match="'test'; there are train, val"):
            open_source(ConfigDict({"source": "digits"}), "test")


class Photographs:
    """So many different images in memory; `files` replaces some by files, and `read` notes what was read."""

    num_classes = 7

    def __init__(self, count: int, files: dict[int, bytes] | None = None):
        self.count = count
        self.files = files or {}
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        self.read.append(index)
        image = self.files.get(index, photograph(10, 12, seed=index))
        return Example(image, index % self.num_classes, f"photograph {index}")


def make(source, *, batch_size=8, train=True, seed=0, threads=0, skip_broken=False, **options) -> Pipeline:
    data = ConfigDict(
        {
            "image_size": 8,
            "eval_resize": 10,
            "crop_scale": SCALE,
            "crop_ratio": RATIO,
            "flip": True,
            "skip_broken": skip_broken,
        }
    )
    return Pipeline(source, data, batch_size=batch_size, train=train, seed=seed, threads=threads, **options)


def assert_same(got, expected) -> None:
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        for key in ("image", "label", "where"):
            np.testing.assert_array_equal(a[key], b[key])


counts = st.integers(1, 150)
batch_sizes = st.sampled_from([4, 8, 36, 100])


class TestPipeline:
    @settings(deadline=None, max_examples=15)
    @given(count=counts, batch_size=batch_sizes, train=st.booleans(), threads=st.sampled_from([1, 4]))
    def test_the_number_of_threads_changes_nothing(self, count, batch_size, train, threads):
        source = Photographs(count)
        expected = make(source, batch_size=batch_size, train=train, threads=0).epoch(3)
        assert_same(make(source, batch_size=batch_size, train=train, threads=threads).epoch(3), expected)

    @settings(deadline=None, max_examples=15)
    @given(count=counts, batch_size=batch_sizes, train=st.booleans(), processes=st.sampled_from([2, 4]))
    def test_processes_hold_consecutive_rows_of_the_same_batches(self, count, batch_size, train, processes):
        source = Photographs(count)
        local = [
            make(source, batch_size=batch_size, train=train, process_index=i, process_count=processes).epoch(
                1
            )
            for i in range(processes)
        ]
        joined = [
            {key: np.concatenate([rows[key] for rows in step]) for key in step[0]}
            for step in zip(*local, strict=True)
        ]
        assert_same(joined, make(source, batch_size=batch_size, train=train).epoch(1))

    @settings(deadline=None, max_examples=15)
    @given(st.data(), counts, batch_sizes, st.sampled_from([0, 2]))
    def test_a_resumed_epoch_is_the_uninterrupted_one(self, data, count, batch_size, threads):
        whole = make(Photographs(count), batch_size=batch_size, threads=threads)
        start = data.draw(st.integers(0, whole.steps_per_epoch))
        resumed = make(Photographs(count), batch_size=batch_size, threads=threads)
        assert_same(resumed.epoch(2, start_step=start), list(whole.epoch(2))[start:])

    def test_resuming_reads_nothing_of_what_was_before(self):
        source = Photographs(100)
        list(make(source, batch_size=8).epoch(0, start_step=12))
        assert len(source.read) == 4

    @settings(deadline=None, max_examples=15)
    @given(count=counts, batch_size=batch_sizes, train=st.booleans())
    def test_an_epoch_has_every_image_exactly_once(self, count, batch_size, train):
        source = Photographs(count)
        batches = list(make(source, batch_size=batch_size, train=train, threads=2).epoch(0))
        assert len(batches) == -(-count // batch_size)
        assert sorted(source.read) == list(range(count))
        assert sum(batch["where"].sum() for batch in batches) == count
        for batch in batches:
            assert batch["image"].shape == (batch_size, 8, 8, 3)
            assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
            assert batch["where"].dtype == bool
            assert not batch["image"][~batch["where"]].any()
            assert not batch["label"][~batch["where"]].any()

    def test_evaluation_keeps_the_order_and_changes_no_image(self):
        source = Photographs(20)
        rows = [
            (image, label)
            for batch in make(source, train=False).epoch(0)
            for image, label, where in zip(batch["image"], batch["label"], batch["where"], strict=True)
            if where
        ]
        for i, (image, label) in enumerate(rows):
            np.testing.assert_array_equal(image, eval_transform(photograph(10, 12, i), resize=10, size=8))
            assert label == i % 7

    @pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}], ids=str)
    def test_another_epoch_or_seed_has_another_order_and_other_crops(self, other):
        def images_by_label(epoch=0, seed=0):
            source = Photographs(7)
            (batch,) = make(source, seed=seed).epoch(epoch)
            return source.read, batch["image"][np.argsort(batch["label"][:7])]

        order, images = images_by_label()
        other_order, other_images = images_by_label(**other)
        assert order != other_order
        assert all((images[i] != other_images[i]).any() for i in range(7))

    @pytest.mark.parametrize("threads", [0, 1, 4])
    def test_a_broken_file_stops_the_epoch_at_its_batch_with_its_name(self, threads):
        whole = encode(photograph())
        source = Photographs(200, {150: whole[: len(whole) // 2]})
        batches = make(source, train=False, threads=threads).epoch(0)
        start = time.monotonic()
        for _ in range(150 // 8):
            next(batches)
        with pytest.raises(DecodeError, match=r"^photograph 150: .*truncated[^\n]*$"):
            next(batches)
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize("threads", [0, 3])
    def test_broken_files_can_be_skipped_and_are_counted(self, threads):
        broken = {3: b"", 40: b"<html>", 41: encode(photograph())[:300]}
        images = make(Photographs(60, broken), train=False, threads=threads, skip_broken=True)
        for _ in range(2):
            where = np.concatenate([batch["where"] for batch in images.epoch(0)])
            assert set(np.flatnonzero(~where[:60])) == {3, 40, 41}
        assert images.skipped == {i: f"photograph {i}" for i in broken}

    def test_a_file_that_cannot_be_read_is_no_broken_image(self, folder):
        root = folder("train/ant/1.jpg", "train/ant/2.jpg")
        source = ImageFolder(root, "train")
        (root / "train/ant/2.jpg").unlink()
        with pytest.raises(FileNotFoundError, match=r"ant/2\.jpg"):
            list(make(source, threads=2, skip_broken=True).epoch(0))

    def test_an_abandoned_epoch_does_not_keep_the_process(self):
        done = run_python(
            """
            import time
            from tests.test_data import Photographs, make
            class Slow(Photographs):
                def __getitem__(self, index):
                    time.sleep(0.01)
                    return super().__getitem__(index)
            closed, kept = (make(Slow(100_000), threads=4).epoch(0) for _ in range(2))
            next(closed), next(kept)
            closed.close()
            print("done")
            """
        )
        assert done.stdout.strip() == "done"

    def test_files_and_arrays_give_the_same(self):
        arrays = Photographs(5)
        files = Photographs(5, {i: encode(photograph(10, 12, seed=i), "PNG") for i in range(5)})
        assert_same(make(files).epoch(0), make(arrays).epoch(0))

    def test_a_batch_that_processes_cannot_share_is_an_error(self):
        with pytest.raises(ValueError, match="batch_size=10 is not a multiple of the 4 processes"):
            make(Photographs(20), batch_size=10, process_count=4)

    def test_an_evaluation_that_cannot_crop_fails_before_it_starts(self):
        data = ConfigDict({"image_size": 64, "eval_resize": 60})
        with pytest.raises(ValueError, match=r"eval_resize=60 is less than image_size=64"):
            Pipeline(Photographs(1), data, batch_size=1, train=True, seed=0, threads=0)

    def test_a_config_opens_both_splits(self):
        from configs import digits

        config = digits.get_config()
        config.data.threads = 1
        train, val = open_pipeline(config, "train"), open_pipeline(config, "val")
        assert (len(train.source), train.steps_per_epoch) == (50, 1)
        assert (len(val.source), val.steps_per_epoch) == (797, 16)
        assert next(val.epoch(0))["image"].shape == (50, 16, 16, 3)
