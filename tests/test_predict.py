"""Predictions of a folder of images: what is written where, by whatever devices, and what goes wrong."""

import csv
import functools
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from proofs.program import Layout, run_everywhere
from tat_jax import evaluate, networks, predict, sharding
from tat_jax.configs import base, r18_r34
from tat_jax.data.digit_masks import DigitMasks
from tat_jax.data.label_maps import IGNORED
from tat_jax.data.rows import decoding
from tat_jax.data.transforms import decode
from tat_jax.overlays import overlay, palette
from tat_jax.signals import Interrupted
from tat_jax.tasks.classification import Classification
from tat_jax.weights import store
from tests.images import encode, photograph

COLOURS = np.random.default_rng(0).integers(0, 256, (11, 3)).astype(np.uint8)
MAIN = Path(__file__).parents[1] / "main.py"
CLASSES = ["ant", "bee", "cat, tame", "d\u00f6g", "e\udce9l", "f"]
PATHS = ["b/1.jpg", "b/a/2.png", "c d/\u00fc.jpeg", "3.JPG", 'z/"x",\n\udce9.jpg']
ORDER = ["3.JPG", "b/1.jpg", "b/a/2.png", "c d/\u00fc.jpeg", 'z/"x",\n\udce9.jpg']


def config_of(**data):
    config = r18_r34.get_config("smoke")
    config.data.update({"image_size": 16, "eval_resize": 20, "threads": 1} | data)
    return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Gives a narrow ResNet-18 of six classes."""
    folder = tmp_path_factory.mktemp("weights") / "r18"
    arguments = {"architecture": "resnet18", "num_classes": len(CLASSES), "small_images": True, "width": 2}
    found = store.network_weights(networks.construct(arguments, rngs=nnx.Rngs(0)))
    usage = {"num_classes": len(CLASSES), "classes": CLASSES}
    store.save_network(
        folder, store.StoredNetwork(found, arguments, {"head": "trained", "source": "a test"}, usage)
    )
    return str(folder)


@pytest.fixture
def images(tmp_path):
    """Gives a folder of images of several sizes and kinds, in folders."""
    for i, name in enumerate(PATHS):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photograph(20 + 5 * i, 40 - 5 * i, seed=i), "PNG" if i == 1 else "JPEG"))
    return tmp_path / "in"


def scenes_config():
    config = base.base()
    config.task, config.batch_size = "segmentation", 16
    config.data.update({"source": "digit_masks", "image_size": 65, "threads": 1})
    return config


def use_devices(monkeypatch, count):
    monkeypatch.setattr(sharding, "make_mesh", lambda make=sharding.make_mesh: make(jax.devices()[:count]))


def read(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


@functools.cache
def network(weights):
    graph, state = nnx.split(networks.restore(weights).view)
    return jax.jit(lambda images: jax.nn.softmax(nnx.merge(graph, state)(images).logits))


def expected(weights, images, config):
    """Return the lines of the table, of a network that sees the images as the evaluation does."""
    files = [decode((images / name).read_bytes(), name, **decoding(config.data)) for name in ORDER]
    pixels = [Classification().transform(image, None, None, config.data)[0] for image in files]
    lines = []
    for name, probabilities in zip(ORDER, np.asarray(network(weights)(np.stack(pixels))), strict=True):
        five = np.argsort(-probabilities, kind="stable")[:5]
        lines.append((name, [CLASSES[value] for value in five], probabilities[five]))
    return lines


def assert_is_table(path, lines):
    header, *rows = read(path)
    assert header == ["path", *(f"{what}_{i}" for i in range(1, 6) for what in ("class", "probability"))]
    assert [(row[0], row[1::2]) for row in rows] == [(name, classes) for name, classes, _ in lines]
    for row, (_, _, probabilities) in zip(rows, lines, strict=True):
        np.testing.assert_allclose(np.array(row[2::2], float), probabilities, atol=2e-6)


@pytest.mark.parametrize(("devices", "batch_size", "readers"), [(1, 2, 0), (8, 256, 2)])
def test_the_most_likely_classes_of_each_image_are_those_of_its_evaluation(
    weights, images, tmp_path, monkeypatch, devices, batch_size, readers
):
    use_devices(monkeypatch, devices)
    config = config_of(processes=readers)
    config.batch_size = batch_size
    found = predict.run(config, "nowhere", weights, images, tmp_path / "out")
    assert (found.images, found.skipped) == (5, [])
    assert_is_table(tmp_path / "out" / "predictions.csv", expected(weights, images, config))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]


def test_images_are_transformed_as_the_config_says(weights, images, tmp_path):
    turned = photograph(24, 30, seed=9)
    (images / "3.JPG").write_bytes(
        encode(turned, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    )
    config = config_of(exif_orientation=True, eval_resize=16)
    predict.run(config, "nowhere", weights, images, tmp_path / "out")
    assert_is_table(tmp_path / "out" / "predictions.csv", expected(weights, images, config))
    with pytest.raises(AssertionError):
        assert_is_table(tmp_path / "out" / "predictions.csv", expected(weights, images, config_of()))


def test_files_that_are_no_images_are_left_out_and_each_is_told(weights, images, tmp_path):
    (images / "a.jpg").write_bytes(b"no image")
    (images / "b" / "cut.jpg").write_bytes((images / "3.JPG").read_bytes()[:200])
    (images / "b" / "empty.png").touch()
    (images / "gone.jpg").symlink_to("3.JPG")
    (images / "notes.txt").touch()
    found = predict.run(config_of(), "nowhere", weights, images, tmp_path / "out")
    assert found.images == 6
    assert [line.split(": ")[0] for line in found.skipped] == [
        str(images / name) for name in ("a.jpg", "b/cut.jpg", "b/empty.png")
    ]
    assert "not an image" in found.skipped[0]
    assert str(found).startswith("6 images (3 unreadable skipped), ")
    assert [row[0] for row in read(tmp_path / "out" / "predictions.csv")[1:]] == sorted(
        [*ORDER, "gone.jpg"], key=os.path.split
    )


def test_where_nothing_can_be_read_nothing_is_written(weights, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(FileNotFoundError, match=r"^no images in .*/in \(\.jpg "):
        predict.run(config_of(), "nowhere", weights, tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"^none of the 1 image in .*/in could be read: .*/a.jpg: not an image"
    ):
        predict.run(config_of(), "nowhere", weights, tmp_path / "in", tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_what_lies_in_the_folder_already_stays_but_for_the_table(weights, images, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("predictions.csv", "mine.txt"):
        (out / name).write_text("mine")
    predict.run(config_of(), "nowhere", weights, images, out)
    assert (out / "mine.txt").read_text() == "mine"
    assert len(read(out / "predictions.csv")) == 6


@pytest.mark.parametrize("out", ["in", "in/out", "in/b", "link/out", "."])
def test_predictions_do_not_go_among_the_images(weights, images, tmp_path, out):
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(ValueError, match="lie in each other: name a folder beside"):
        predict.run(config_of(), "nowhere", weights, images, tmp_path / out)
    assert not list(tmp_path.rglob("predictions.csv"))


def test_a_folder_that_cannot_be_written_is_told_and_nothing_half_written_stays(
    weights, images, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^cannot write in .*file/out: Not a directory$"):
        predict.run(config_of(), "nowhere", weights, images, tmp_path / "file" / "out")

    def fail(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=r"^cannot write .*/predictions.csv: No space left on device$"):
        predict.run(config_of(), "nowhere", weights, images, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_signal_ends_it_in_a_line(weights, images, tmp_path, monkeypatch):
    config = config_of()
    config.batch_size = 8
    for i in range(20):
        (images / f"{i}.jpg").write_bytes((images / "3.JPG").read_bytes())
    write = predict.WRITERS["classification"].write

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(predict.WRITERS["classification"], "write", interrupted)
    with pytest.raises(
        Interrupted, match="stopped after 8 of 25 images; the same command begins anew"
    ) as stopped:
        predict.run(config, "nowhere", weights, images, tmp_path / "out")
    assert stopped.value.signal == signal.SIGTERM
    assert not list((tmp_path / "out").iterdir())


def test_a_head_that_nobody_trained_predicts_nothing(images, tmp_path):
    arguments = {"architecture": "resnet18", "num_classes": 6, "small_images": True, "width": 2}
    found = store.network_weights(networks.construct(arguments, rngs=nnx.Rngs(0)))
    store.save_network(
        tmp_path / "fresh", store.StoredNetwork(found, arguments, {"head": "fresh", "source": "a test"})
    )
    with pytest.raises(ValueError, match="a head that was never trained"):
        predict.run(config_of(), "nowhere", str(tmp_path / "fresh"), images, tmp_path / "out")


@pytest.fixture(scope="module")
def deeplab(tmp_path_factory):
    """Gives a narrow DeepLabV3+ of random weights: what matters is what becomes of its logits."""
    folder = tmp_path_factory.mktemp("weights") / "deeplab"
    arguments = {"architecture": "deeplab_resnet18", "num_classes": 11, "width": 2}
    found = store.network_weights(networks.construct(arguments, rngs=nnx.Rngs(0)))
    usage = {"num_classes": 11, "classes": DigitMasks("val").classes, "colours": COLOURS.tolist()}
    store.save_network(
        folder, store.StoredNetwork(found, arguments, {"head": "trained", "source": "a test"}, usage)
    )
    return str(folder)


@pytest.fixture
def scenes(tmp_path):
    """Gives a folder of the scenes to validate."""
    found = DigitMasks("val")
    for i in range(len(found)):
        path = tmp_path / "in" / f"{i % 3}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(found[i].image).save(path)
    return tmp_path / "in"


def test_label_maps_are_those_that_the_evaluation_measures_at_the_sizes_of_the_images(
    deeplab, scenes, tmp_path
):
    predicted = predict.run(scenes_config(), "nowhere", deeplab, scenes, tmp_path / "out")
    assert str(predicted).startswith("48 images, ")
    truths, confusion = DigitMasks("val"), np.zeros((11, 11), int)
    for i in range(len(truths)):
        name = f"{i % 3}/{i:03}"
        with Image.open(tmp_path / "out" / "labels" / f"{name}.png") as opened:
            assert (opened.mode, opened.getpalette()) == ("P", palette(11, COLOURS).ravel().tolist())
            found = np.asarray(opened)
        image, truth, _ = truths[i]
        assert found.shape == truth.shape
        np.add.at(confusion, (truth[truth != IGNORED], found[truth != IGNORED]), 1)
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg") as opened:
            drawn = np.asarray(opened).astype(int)
        assert np.abs(drawn - overlay(image, found, palette(11, COLOURS))).mean() < 12  # of JPEG
    evaluated = evaluate.run(scenes_config(), "nowhere", deeplab)
    np.testing.assert_array_equal(confusion, evaluated.confusion)
    assert (confusion.sum(0) > 0).sum() > 1  # not one class for all


def test_label_maps_of_all_sizes_lie_where_they_lay_and_keep_their_endings_where_they_need_them(
    deeplab, tmp_path, monkeypatch
):
    use_devices(monkeypatch, 1)
    sizes = {"a.png": (1, 1), "a.jpg": (3, 130), "b/c.png": (130, 3), "b/\udce9.jpg": (20, 30)}
    for name, (height, width) in sizes.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photograph(height, width), "PNG" if name.endswith("png") else "JPEG"))
    (tmp_path / "in" / "b" / "broken.png").write_bytes(b"no image")
    found = predict.run(scenes_config(), "nowhere", deeplab, tmp_path / "in", tmp_path / "out")
    assert (found.images, len(found.skipped)) == (4, 1)
    for name, (height, width) in sizes.items():
        for picture in (f"labels/{name}.png", f"overlays/{name}.jpg"):
            with Image.open(tmp_path / "out" / picture) as opened:
                assert opened.size == (width, height)
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 8


def test_a_full_disk_is_told_in_a_line_and_leaves_only_whole_files(deeplab, scenes, tmp_path, monkeypatch):
    write = Path.write_bytes

    def fail_at_the_tenth(path, data):
        write(path, data[:10])
        if len(list((tmp_path / "out" / "labels").rglob("*.png"))) > 10:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail_at_the_tenth)
    with pytest.raises(OSError, match=r"^cannot write .*\.(png|jpg): No space left on device$"):
        predict.run(scenes_config(), "nowhere", deeplab, scenes, tmp_path / "out")
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert 10 < len(left) < 96
    for path in left:
        with Image.open(path) as opened:
            opened.load()


def test_a_network_of_another_task_is_named(deeplab, scenes, tmp_path):
    config = scenes_config()
    config.task = "classification"
    config.data.eval_resize = 65
    with pytest.raises(ValueError, match=r"logits of an image are \[65, 65, 11\], not one for each class"):
        predict.run(config, "nowhere", deeplab, scenes, tmp_path / "out")


def command(layout, weights, images, out, *options):
    """Run the command in every process of a layout, and return what each printed."""
    fields = (f"--config.data.{name}" for name in ("image_size=16", "eval_resize=20"))
    of_folders = (f"--checkpoint={weights}", f"--images={images}", f"--out={out}")
    arguments = ("--mode=predict", "--config=r18_r34:smoke", *fields, *of_folders, *options)
    return run_everywhere(layout, [sys.executable, str(MAIN), *arguments])


def test_the_command_predicts_from_weights_alone_with_a_config(weights, images, tmp_path):
    (images / "broken.jpg").write_bytes(b"no image")
    (printed,) = command(Layout(1, 1), weights, images, tmp_path / "out")
    assert "5 images (1 unreadable skipped), " in printed
    assert f"skipped: {images}/broken.jpg: not an image" in printed
    assert_is_table(tmp_path / "out" / "predictions.csv", expected(weights, images, config_of()))


def test_the_table_of_two_processes_is_that_of_one(weights, images, tmp_path):
    (images / "broken.jpg").write_bytes(b"no image")
    first, second = command(Layout(2, 2), weights, images, tmp_path / "out")
    assert "5 images (1 unreadable skipped), " in first
    assert "images" not in second
    assert_is_table(tmp_path / "out" / "predictions.csv", expected(weights, images, config_of()))


def test_two_processes_write_the_label_maps_of_one(deeplab, scenes, tmp_path):
    (scenes / "0" / "broken.png").write_bytes(b"no image")
    fields = ("task=segmentation", "data.source=digit_masks", "data.image_size=65")
    options = (f"--config.{field}" for field in fields)
    first, _ = command(Layout(2, 2), deeplab, scenes, tmp_path / "out", *options)
    assert "48 images (1 unreadable skipped), " in first
    predict.run(scenes_config(), "nowhere", deeplab, scenes, tmp_path / "alone")
    of_both, of_one = [label_maps(tmp_path / folder) for folder in ("out", "alone")]
    assert of_both.keys() == of_one.keys()
    differ = [np.mean(of_both[name] != of_one[name]) for name in of_one]
    assert np.mean(differ) < 1e-3  # of another order of sums


def label_maps(out):
    """Return the label maps that were written, by name."""
    found = {}
    for path in (out / "labels").rglob("*.png"):
        with Image.open(path) as opened:
            found[str(path.relative_to(out))] = np.asarray(opened)
    return found
