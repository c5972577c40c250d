"""Predictions of a folder of images: what is written where, by whatever devices, and what goes wrong."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tat_jax import networks, predict, sharding
from tat_jax.configs import r18_r34
from tat_jax.data.transforms import decode
from tat_jax.signals import Interrupted
from tat_jax.tasks.classification import Classification
from tat_jax.weights import store
from tests.images import encode, photograph

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


def read(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def expected(weights, images, config):
    """Return the lines of the table, one image after the other."""
    view = networks.restore(weights).view
    lines = []
    for name in ORDER:
        image = decode((images / name).read_bytes(), name, exif_orientation=config.data.exif_orientation)
        pixels, _ = Classification().transform(image, None, None, config.data)
        probabilities = np.asarray(jax.nn.softmax(view(pixels[None]).logits))[0]
        five = np.argsort(-probabilities, kind="stable")[:5]
        lines.append((name, [CLASSES[value] for value in five], probabilities[five]))
    return lines


def assert_is_table(path, lines):
    header, *rows = read(path)
    assert header == ["path", *(f"{what}_{i}" for i in range(1, 6) for what in ("class", "probability"))]
    assert [(row[0], row[1::2]) for row in rows] == [(name, classes) for name, classes, _ in lines]
    for row, (_, _, probabilities) in zip(rows, lines, strict=True):
        np.testing.assert_allclose(np.array(row[2::2], float), probabilities, atol=2e-6)


@pytest.mark.parametrize(("devices", "batch_size", "readers"), [(1, 2, 0), (8, 16, 0), (8, 256, 2)])
def test_the_most_likely_classes_of_each_image_are_those_of_its_evaluation(
    weights, images, tmp_path, monkeypatch, devices, batch_size, readers
):
    monkeypatch.setattr(sharding, "make_mesh", lambda make=sharding.make_mesh: make(jax.devices()[:devices]))
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
    tables = {}
    for name, data in {
        "upright": {"exif_orientation": True},
        "turned": {},
        "other": {"eval_resize": 16},
    }.items():
        config = config_of(**data)
        predict.run(config, "nowhere", weights, images, tmp_path / name)
        assert_is_table(tmp_path / name / "predictions.csv", expected(weights, images, config))
        tables[name] = read(tmp_path / name / "predictions.csv")
    assert tables["upright"] != tables["turned"] != tables["other"]


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


def test_the_command_predicts_from_weights_alone_with_a_config(weights, images, tmp_path):
    (images / "broken.jpg").write_bytes(b"no image")
    process = subprocess.run(
        [
            sys.executable,
            MAIN,
            "--mode=predict",
            "--config=r18_r34:smoke",
            "--config.data.image_size=16",
            "--config.data.eval_resize=20",
            f"--checkpoint={weights}",
            f"--images={images}",
            f"--out={tmp_path / 'out'}",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("5 images (1 unreadable skipped), ")
    assert f"skipped: {images}/broken.jpg: not an image" in process.stderr
    assert_is_table(tmp_path / "out" / "predictions.csv", expected(weights, images, config_of()))
