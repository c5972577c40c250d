"""Features measured: k-NN and ridge beside scikit-learn, every image once, and what stands in their place."""

import re

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier

from tat_jax import check, evaluate, networks, probe, representations, sharding, train
from tat_jax.configs import base, finetune, unlabelled
from tat_jax.data.pipeline import Pipeline
from tat_jax.metrics import read_rows
from tat_jax.networks.view import View
from tat_jax.representations import Labelled
from tat_jax.tasks.classification import Classification
from tests.images import encode, photograph
from tests.sources import Photographs
from tests.tiny import Tiny

CLASSES = 4


def labelled(count, seed, channels=6):
    """Return features that tell their classes about as well as trained ones do."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    centres = np.random.default_rng(0).normal(size=(CLASSES, channels))
    features = 3 + centres[labels] + rng.normal(size=(count, channels)) * np.linspace(0.2, 2, channels)
    return Labelled(features.astype(np.float32), labels)


def neighbours(k):
    """Return scikit-learn's k-NN by cosine, whose neighbours vote with exp(cosine / 0.07)."""
    return KNeighborsClassifier(
        k, weights=lambda distance: np.exp(-distance / 0.07), metric="cosine", algorithm="brute"
    )


def test_knn_counts_what_scikit_learn_s_counts_in_float64():
    there, asked = labelled(300, 1), labelled(1500, 2)
    reference = neighbours(20).fit(there.features.astype(float), there.labels)
    expected = int(np.sum(reference.predict(asked.features.astype(float)) == asked.labels))
    assert representations.knn_hits(there, asked, CLASSES) == expected
    assert 0.4 * 1500 < expected < 1500


def test_knn_without_a_second_split_asks_all_other_images():
    there = labelled(120, 3)
    hits = 0
    for i in range(120):
        others = np.arange(120) != i
        reference = neighbours(20).fit(there.features[others].astype(float), there.labels[others])
        hits += int(reference.predict(there.features[i : i + 1].astype(float))[0] == there.labels[i])
    assert representations.knn_hits(there, None, CLASSES) == hits


def test_the_linear_probe_is_scikit_learn_s_ridge_with_the_lambda_that_held_out_images_choose():
    there, asked = labelled(400, 4), labelled(600, 5)

    def hits(fitted, counted, scale):
        x = fitted.features.astype(float)
        penalty = scale * np.sum((x - x.mean(0)) ** 2) / x.shape[1]
        ridge = Ridge(alpha=penalty, solver="svd").fit(x, np.eye(CLASSES)[fitted.labels])
        return int(np.sum(ridge.predict(counted.features.astype(float)).argmax(1) == counted.labels))

    held = np.arange(400) % 5 == 4
    of_scales = [
        (hits(there.take(~held), there.take(held), scale), scale) for scale in 10.0 ** np.arange(-6, 3)
    ]
    assert len({found for found, _ in of_scales}) > 1
    expected = hits(there, asked, max(of_scales)[1])
    assert representations.probe_hits(there, asked, CLASSES) == expected
    assert 0.5 * 600 < expected < 600


def test_the_effective_rank_counts_directions_by_their_share():
    equal = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 5)))[0].astype(np.float32)
    assert representations.effective_rank(equal) == pytest.approx(5, rel=1e-6)
    assert representations.effective_rank(equal[:, :1] * np.ones((1, 5), np.float32)) == pytest.approx(
        1, rel=1e-5
    )
    shares = np.array([0.5, 0.25, 0.25])
    assert representations.effective_rank((equal[:, :3] * shares).astype(np.float32)) == pytest.approx(
        2**1.5, rel=1e-6
    )


def view():
    return nnx.split(View(Tiny(3, rngs=nnx.Rngs(0))))


def data_of(images=21, *, batch_size=8, files=None):
    config = base.base().data
    config.update({"image_size": 16, "eval_resize": 16, "skip_broken": True})
    source = Photographs(images, files)
    return Pipeline(source, Classification(), config, batch_size=batch_size, train=False, seed=0, threads=0)


def test_each_image_s_features_are_taken_once_and_in_order_whatever_batch_and_devices():
    found = {}
    for batch_size, devices in ((8, 1), (16, 2)):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        graph, state = view()
        state = sharding.put_whole(state, mesh, what="the weights")
        found[devices], skipped = probe.extract(
            (graph, state), "layer2", data_of(batch_size=batch_size), mesh
        )
        assert skipped == 0
    for of in found.values():
        assert of.features.shape == (21, 6)
        np.testing.assert_array_equal(of.labels, np.arange(21) % 7)
        np.testing.assert_allclose(of.features, found[1].features, rtol=1e-5, atol=1e-6)


def test_an_image_that_cannot_be_read_is_left_out_and_counted_as_skipped():
    mesh = sharding.make_mesh(jax.devices()[:1])
    found, skipped = probe.extract(view(), "layer2", data_of(files={3: b"no image"}), mesh)
    assert skipped == 1
    np.testing.assert_array_equal(found.labels, np.delete(np.arange(21), 3) % 7)


def test_a_tap_that_a_network_has_not_is_named_with_those_that_it_has():
    with pytest.raises(ValueError, match="no tap pooled: the network sows layer1, layer2"):
        probe.extract(view(), "pooled", data_of(), sharding.make_mesh(jax.devices()[:1]))


def folder_of(root, **counts):
    """Make images of two classes, so many of each in a split, and return the root."""
    for split, count in counts.items():
        for name in ("dark", "bright"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = photograph(16, 16, seed=i) // 3 + (150 if name == "bright" else 0)
                (root / split / name / f"{i:02}.jpg").write_bytes(encode(pixels.astype(np.uint8)))
    return root


def tiny(*, num_classes, rngs):
    return Tiny(2, rngs=rngs)


def matching(student, teacher, batch):
    return ((student.taps["layer2"] - teacher.taps["layer2"]) ** 2).mean((1, 2, 3))


def config_of(root, labelled=None, **changes):
    config = base.base()
    config.task = "features"
    config.update({"epochs": 1, "batch_size": 8, "log_every": 1})
    config.data.update(
        {"source": "images", "root": str(root), "image_size": 16, "eval_resize": 16, "threads": 0}
    )
    config.losses.cross_entropy.weight = 0.0
    config.probe.student_tap = config.probe.teacher_tap = "layer2"
    if labelled is not None:
        config.probe.update({"source": "imagefolder", "root": str(labelled)})
    config.update(changes)
    return config


def run(config, folder):
    losses = {"matching": (1.0, matching)}
    return train.run(config, folder, student=tiny, teacher=tiny, losses=losses)


def test_a_training_without_labels_is_measured_by_labelled_images_beside_it_its_teacher_too(tmp_path):
    labels = folder_of(tmp_path / "labelled", train=15, val=4)
    ends = run(config_of(labels / "train", labels, epochs=2), tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run") if "eval/knn" in row]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert all(8 * row[f"eval/{name}"] == round(8 * row[f"eval/{name}"]) for name in ("knn", "probe"))
        assert row["eval/teacher_knn"] == 1.0  # dark and bright are told apart by any features
        assert row["eval/teacher_probe"] == 1.0
    assert ends["best"]["eval/knn"] == max(row["eval/knn"] for row in rows)
    assert not any("top1" in name for row in read_rows(tmp_path / "run") for name in row)


def test_without_labelled_images_the_least_loss_of_those_held_out_is_the_best(tmp_path):
    images = folder_of(tmp_path / "images", all=10) / "all"
    ends = run(config_of(images, epochs=2), tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run") if "eval/minus_loss" in row]
    for row in rows:
        assert row["eval/minus_loss"] == -row["eval/loss_matching"] <= 0
        assert 1 <= row["eval/effective_rank"] <= 4
    assert rows[0]["eval/loss_matching"] == 0 > rows[-1]["eval/minus_loss"]  # it begins as its teacher
    assert ends["best"]["eval/loss_matching"] == min(row["eval/loss_matching"] for row in rows)
    stopped = tmp_path / "stopped"
    run(config_of(images, epochs=1), stopped)
    run(config_of(images, epochs=2), stopped)
    again = [row for row in read_rows(stopped) if "eval/minus_loss" in row]
    assert again == rows


def test_labelled_images_in_one_split_alone_are_classified_by_all_others(tmp_path):
    labels = folder_of(tmp_path, train=15)
    found = probe.Probe(config_of(labels, labels), sharding.make_mesh(jax.devices()[:1]))
    measured = found.measure(view(), None, show=False, listen=lambda: None)
    assert measured.images == 30
    assert measured.measures == {"knn": 1.0, "probe": 1.0}


def test_labelled_images_fewer_than_neighbours_are_refused(tmp_path):
    labels = folder_of(tmp_path, train=10)
    with pytest.raises(ValueError, match=r"^probe: .* has 20 images in train, and k-NN takes more than 20$"):
        probe.Probe(config_of(labels, labels), sharding.make_mesh(jax.devices()[:1]))


def test_labelled_images_whose_classes_differ_between_train_and_val_are_refused(tmp_path):
    labels = folder_of(tmp_path, train=15, val=4)
    (labels / "val" / "bright").rename(labels / "val" / "white")
    with pytest.raises(ValueError, match=r"^probe: .*val has classes that train lacks: white$"):
        probe.Probe(config_of(labels, labels), sharding.make_mesh(jax.devices()[:1]))


def test_the_miniature_without_labels_is_measured_again_as_it_was_and_then_gets_a_head(tmp_path):
    config = unlabelled.get_config("smoke")
    tuned = finetune.get_config("smoke")
    for miniature in (config, tuned):
        miniature.data.update({"image_size": 16, "eval_resize": 16})
        miniature.student.update({"small_images": True, "width": 2})
    config.teacher.update({"architecture": "resnet18", "small_images": True, "width": 2})
    last = train.run(config, tmp_path / "unlabelled")["last"]
    measured = evaluate.run(config, tmp_path / "unlabelled", "last")
    assert measured.measures == {name: last[f"eval/{name}"] for name in ("knn", "probe")}
    assert measured.images == 797
    assert networks.restore(tmp_path / "unlabelled").origin["head"] == "none"
    tuned.student.weights = str(tmp_path / "unlabelled")
    assert train.run(tuned, tmp_path / "tuned")["last"]["eval/top1"] > 0


def test_a_check_says_how_many_directions_the_teacher_s_features_have(tmp_path, capsys):
    images = folder_of(tmp_path / "images", all=10) / "all"
    losses = {"matching": (1.0, matching)}
    assert check.run(config_of(images), tmp_path / "run", student=tiny, teacher=tiny, losses=losses)
    printed = capsys.readouterr().out
    assert "NOTE: 1 of 20 images, evenly spaced, are held out (data.held_out=0.05)" in printed
    assert re.search(r"teacher's rank +layer2: 4 channels, effective rank 1.0 on 1 images", printed)
