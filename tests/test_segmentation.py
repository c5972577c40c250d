"""Segmentation: that pixels of mixed image sizes are counted exactly, and a training up to its pictures."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from tat_jax import comparison, evaluate, networks, sharding, summary, tables, train
from tat_jax.batch import Batch
from tat_jax.configs import base
from tat_jax.data.digit_masks import DigitMasks
from tat_jax.data.label_maps import IGNORED, OUTSIDE
from tat_jax.data.pipeline import open_pipeline
from tat_jax.data.sources import Digits
from tat_jax.evaluate import jit_eval_step
from tat_jax.metrics import is_evaluation, read_rows
from tat_jax.networks.view import Outputs
from tat_jax.tasks.original_size import image_sizes, nearest
from tat_jax.tasks.segmentation import Segmentation
from tat_jax.usage import usage_of
from tat_jax.weights import folders
from tests import tiny
from tests.test_train import assert_same_run

CLASSES = 5
# Heights and widths of images: of one pixel, of one tile, of several, square, wide and high.
SIZES = [(1, 1), (1, 9), (70, 130), (64, 64), (33, 200), (129, 5)]
CANVAS = (140, 210)


def scenes(*sizes, classes=CLASSES, seed=0):
    """Return label maps of some sizes, with pixels that are ignored and pixels of no class."""
    rng = np.random.default_rng(seed)
    values = [*range(classes), IGNORED, classes, OUTSIDE - 1]
    return [rng.choice(values, size).astype(np.uint8) for size in sizes]


def on_canvas(maps, canvas=CANVAS):
    filled = np.full((len(maps), *canvas), OUTSIDE, np.uint8)
    for place, label in zip(filled, maps, strict=True):
        place[: label.shape[0], : label.shape[1]] = label
    return filled


def batch_of(maps, *, rows=None, canvas=CANVAS):
    """Return a batch of label maps, filled up to so many rows with some that do not count."""
    rows = rows or len(maps)
    labels = np.full((rows, *canvas), OUTSIDE, np.uint8)
    labels[: len(maps)] = on_canvas(maps, canvas)
    return Batch(np.zeros((rows, 1, 1, 3), np.uint8), labels, np.arange(rows) < len(maps))


def random_logits(count, side=17, classes=CLASSES, seed=1):
    return np.random.default_rng(seed).normal(size=(count, side, side, classes))


@jax.jit
def count(logits, batch):
    return Segmentation().count(Outputs(logits, {}), batch)


def tally(pairs, classes=CLASSES):
    """Return the confusion matrix [truth, prediction] of label maps and predictions, by NumPy alone."""
    counts = np.zeros((classes, classes), int)
    for truth, prediction in pairs:
        valid = truth < classes
        np.add.at(counts, (truth[valid], prediction[valid]), 1)
    return counts


def by_pytorch(logits, maps):
    """Count at the sizes of the maps, by PyTorch's interpolation to exactly those."""

    def interpolate(of_image, size):
        planes = torch.tensor(np.asarray(of_image)).permute(2, 0, 1)[None]
        return torch.nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=True)[0]

    return tally(
        (label, interpolate(of_image, label.shape).argmax(0).numpy())
        for of_image, label in zip(logits, maps, strict=True)
    )


def by_pillow(logits, maps):
    """Count at the size of the logits, to which Pillow resizes the maps."""
    size = logits.shape[2], logits.shape[1]
    return tally(
        (np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST)), of_image.argmax(-1))
        for of_image, label in zip(logits, maps, strict=True)
    )


class TestCount:
    def test_mixed_sizes_are_counted_as_pytorch_interpolates_and_pillow_squashes_each(self, x64):
        maps, logits = scenes(*SIZES), random_logits(len(SIZES))
        counts = count(logits, batch_of(maps))
        np.testing.assert_array_equal(counts["confusion"], by_pytorch(logits, maps))
        np.testing.assert_array_equal(counts["confusion_squashed"], by_pillow(logits, maps))
        assert counts["count"] == len(SIZES)

    def test_counts_do_not_depend_on_batches_devices_padding_and_canvas_nor_programs_on_sizes(self):
        maps = scenes(*SIZES, (20, 30), (2, 2))
        logits = random_logits(len(maps)).astype(np.float32)
        alone = [count(logits[i : i + 1], batch_of(maps[i : i + 1])) for i in range(len(maps))]
        expected = jax.tree.map(lambda *of: np.sum(of, axis=0), *alone)
        assert expected["confusion"].sum() == sum((label < CLASSES).sum() for label in maps)
        together = [count(logits, batch_of(maps)), count(logits, batch_of(maps, canvas=(129, 200)))]
        padded = np.concatenate([logits, np.full((3, *logits.shape[1:]), np.nan, np.float32)])
        together.append(count(padded, batch_of(maps, rows=len(maps) + 3)))
        mesh = sharding.make_mesh()
        (batch,) = sharding.put_batches([(logits, batch_of(maps, rows=len(maps)))], mesh)
        split = jax.jit(count, out_shardings=sharding.replicated(mesh))
        together.append(split(*batch))
        for counts in together:
            assert all((counts[name] == expected[name]).all() for name in expected)
        program = split.lower(*batch).compile().as_text()
        assert "all-gather" not in program
        assert "all-to-all" not in program

    def test_of_equal_logits_the_lower_class_comes_first(self):
        logits = np.zeros((1, 5, 5, CLASSES), np.float32)
        logits[..., 3:] = 1
        counts = count(logits, batch_of([np.full((9, 8), 3, np.uint8)]))
        assert counts["confusion"][3, 3] == 72
        assert counts["confusion_squashed"][3, 3] == 25

    @pytest.mark.parametrize("label", range(CLASSES))
    def test_pixels_of_logits_that_are_no_numbers_are_wrong_whatever_their_class(self, label):
        logits = np.zeros((1, 5, 5, CLASSES), np.float32)
        logits[..., label] = 1
        logits[0, 0, 0, 4] = np.nan
        counts = count(logits, batch_of([np.full((5, 5), label, np.uint8)]))
        for name in ("confusion", "confusion_squashed"):
            assert counts[name][label, label] == 24
            assert counts[name].sum() == 25

    def test_labels_are_squashed_to_the_pixels_that_pillow_takes_whatever_the_sizes(self):
        rng = np.random.default_rng(0)
        sizes = [(1, 640), (640, 2), (500, 375), (480, 640), *rng.integers(1, 640, (12, 2)).tolist()]
        maps = [rng.integers(0, 254, size).astype(np.uint8) for size in sizes]
        canvases = jnp.asarray(on_canvas(maps, (640, 640)))
        for height, width in ((64, 129), (513, 257)):
            squashed = jax.jit(nearest, static_argnums=(2, 3))(canvases, image_sizes(canvases), height, width)
            for label, found in zip(maps, squashed, strict=True):
                expected = Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST)
                np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        ("logits", "said"),
        [
            (None, "nothing to segment: no logits"),
            (jnp.zeros((1, 5)), "logits of 5 for an image, and segmentation takes height × width"),
        ],
        ids=["none", "of images"],
    )
    def test_a_network_that_does_not_segment_is_refused(self, logits, said):
        with pytest.raises(ValueError, match=said):
            Segmentation().count(Outputs(logits, {}), batch_of(scenes((5, 5))))

    def test_a_batch_of_more_pixels_than_32_bits_count_is_refused(self):
        def shapes(rows):
            return jax.eval_shape(
                Segmentation().count,
                Outputs(jax.ShapeDtypeStruct((rows, 5, 5, CLASSES), jnp.float32), {}),
                Batch(
                    jax.ShapeDtypeStruct((rows, 5, 5, 3), jnp.uint8),
                    jax.ShapeDtypeStruct((rows, 1024, 1024), jnp.uint8),
                    jax.ShapeDtypeStruct((rows,), bool),
                ),
            )

        assert shapes(2047)["confusion"].shape == (CLASSES, CLASSES)
        with pytest.raises(ValueError, match="2,147,483,648 pixels a batch are more than 32 bits count"):
            shapes(2048)

    def test_the_class_maps_that_are_drawn_are_those_that_are_counted(self, x64):
        maps, logits = scenes(*SIZES), random_logits(len(SIZES))
        batch = batch_of(maps)
        drawn = jax.jit(Segmentation().class_maps)(Outputs(logits, {}), batch.label)
        expected = count(logits, batch)["confusion"]
        np.testing.assert_array_equal(tally(zip(batch.label, drawn, strict=True)), expected)
        np.testing.assert_array_equal(drawn == OUTSIDE, batch.label == OUTSIDE)


def counts_of(confusion):
    confusion = np.asarray(confusion)
    return {"confusion": confusion, "confusion_squashed": confusion, "count": np.array(1)}


class TestMeasures:
    def test_they_are_those_of_the_published_code(self):
        truth = np.array([[0, 0, 1, 1], [2, IGNORED, 1, 0]], np.uint8)
        prediction = np.array([[0, 1, 1, 1], [2, 2, 0, 0]])
        measures = Segmentation().measures(counts_of(tally([(truth, prediction)], 4)), None)
        assert measures == pytest.approx(
            {
                "pixel_accuracy": 0.714285714,
                "class_accuracy": 0.777777778,
                "miou": 0.666666667,
                "miou_squashed": 0.666666667,
                "frequency_weighted_iou": 0.571428571,
                "iou/0": 1 / 2,
                "iou/1": 1 / 2,
                "iou/2": 1,
            },
            abs=1e-9,
        )

    def test_a_class_that_is_only_predicted_is_a_zero_and_one_that_does_not_occur_is_left_out(self):
        confusion = np.zeros((4, 4), int)
        confusion[0, 0], confusion[0, 2] = 6, 2
        measures = Segmentation().measures(counts_of(confusion), ["sky", "sea", "sun", "sea"])
        assert {name: v for name, v in measures.items() if "/" in name} == {"iou/sky": 0.75, "iou/sun": 0}
        assert (measures["miou"], measures["class_accuracy"]) == (0.375, 0.75)

    def test_classes_of_one_name_are_told_apart_by_their_numbers(self):
        measures = Segmentation().measures(counts_of(np.eye(3, dtype=int)), ["sea", "sky", "sea"])
        assert [name for name in measures if "/" in name] == ["iou/sea 0", "iou/sky", "iou/sea 2"]

    def test_where_no_pixel_has_a_class_there_is_nothing_to_measure(self):
        with pytest.raises(ValueError, match="no pixel has a class"):
            Segmentation().measures(counts_of(np.zeros((3, 3), int)), None)

    def test_the_table_has_the_classes_in_their_order_and_below_them_the_means(self):
        means = {"miou": 0.5, "miou_squashed": 0.25, "pixel_accuracy": 0.75, "class_accuracy": 0.6}
        means["frequency_weighted_iou"] = 0.7
        last = {**means, "iou/sky": 0.125, "iou/tree": 0.875}
        best = {**means, "miou": 0.55, "iou/sky": 0.2, "iou/boat": 0.0, "iou/tree": 0.875}
        assert Segmentation().table({"last": last, "best": best}) == (
            "IoU, %                    last    best\n"
            "sky                      12.50   20.00\n"
            "boat                         –    0.00\n"
            "tree                     87.50   87.50\n"
            "mIoU                     50.00   55.00\n"
            "mIoU squashed            25.00   25.00\n"
            "pixel accuracy           75.00   75.00\n"
            "class accuracy           60.00   60.00\n"
            "frequency-weighted IoU   70.00   70.00"
        )

    def test_a_guess_among_classes_of_one_size_reaches_chance(self):
        rng = np.random.default_rng(0)
        confusion = tally([rng.integers(0, CLASSES, (2, 200_000))])
        miou = Segmentation().measures(counts_of(confusion), None)["miou"]
        assert miou == pytest.approx(Segmentation().chance(CLASSES), abs=2e-3)


class TestTrainingStep:
    def test_it_reports_pixels_with_a_class_of_images_that_count(self):
        label = np.array([[[0, 1], [IGNORED, 1]], [[0, 0], [0, 0]]], np.uint8)
        batch = Batch(np.zeros((2, 2, 2, 3), np.uint8), jnp.asarray(label), np.array([True, False]))
        student, teacher = (
            Outputs(jax.nn.one_hot(np.array(seen), 3), {})
            for seen in ([[[0, 0], [1, 1]]] * 2, [[[0, 1], [2, 2]]] * 2)
        )
        measured = Segmentation().measure(student, batch, teacher)
        expected = {"train_pixel_accuracy": 2 / 3, "teacher_agreement": 1 / 3}
        assert measured == pytest.approx(expected)
        others = Outputs(jnp.zeros((2, 2, 2, 9)), {})
        for none in (None, Outputs(None, {}), others):
            assert set(Segmentation().measure(student, batch, none)) == {"train_pixel_accuracy"}
        ignored = batch._replace(label=np.full_like(label, IGNORED))
        assert Segmentation().measure(student, ignored, None) == {"train_pixel_accuracy": 0}


class TestLabels:
    def test_blank_ones_are_as_large_as_a_crop_and_to_evaluate_as_the_largest_image(self):
        class Source:
            largest = (40, 70)

        data = ConfigDict({"image_size": 65})
        train, val = (Segmentation().blank_label(data, Source(), train=train) for train in (True, False))
        assert (train.shape, train.dtype, np.unique(train)) == ((65, 65), np.uint8, IGNORED)
        assert (val.shape, val.dtype, np.unique(val)) == ((40, 70), np.uint8, OUTSIDE)

    def test_a_source_without_label_maps_is_refused_with_the_way_out(self):
        with pytest.raises(ValueError, match=r"take a data\.source of label maps, or task=classification"):
            Segmentation().blank_label(ConfigDict({"image_size": 8}), Digits("val"), train=True)


def config_of(**changes):
    """Return a training of one network under another on scenes of digits, two steps an epoch."""
    config = base.base()
    config.update({"task": "segmentation", "epochs": 2, "batch_size": 80, "log_every": 1})
    config.losses.cross_entropy.weight = 0.0
    config.losses.pixel_cross_entropy.weight = config.losses.kd.weight = 1.0
    config.data.update({"source": "digit_masks", "image_size": 33, "threads": 1})
    config.optimizer.milestones = ()
    config.update(changes)
    return config


def student(*, rngs, **_):
    return tiny.Segmenter(4, classes=11, rngs=rngs)


def teacher(*, rngs, **_):
    return tiny.Segmenter(8, classes=11, rngs=rngs)


run = functools.partial(train.run, student=student, teacher=teacher)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a run of two epochs, and what it returned."""
    folder = tmp_path_factory.mktemp("segmentation")
    return folder, run(config_of(), folder)


class TestTraining:
    def test_a_run_logs_every_measure_and_draws_its_pictures(self, trained):
        folder, _ = trained
        rows = read_rows(folder)
        assert [row["epoch"] for row in rows if is_evaluation(row)] == [1, 2]
        logged = {name for row in rows for name in row}
        assert {"train/train_pixel_accuracy", "train/teacher_agreement", "eval/iou/background"} <= logged
        measures = ("miou", "miou_squashed", "pixel_accuracy", "class_accuracy", "frequency_weighted_iou")
        assert {f"eval/{name}" for name in measures} <= logged
        for name in ("curves.png", "images.png", "predictions.png", "confusion.png"):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")

    def test_a_run_that_was_continued_equals_the_uninterrupted_one_and_draws_again(self, tmp_path, trained):
        run(config_of(epochs=1), tmp_path)
        (tmp_path / "predictions.png").unlink()
        run(config_of(), tmp_path)
        assert_same_run(tmp_path, trained[0])
        drawn = [(folder / "predictions.png").read_bytes() for folder in (tmp_path, trained[0])]
        assert drawn[0] == drawn[1]

    def test_an_evaluation_measures_the_same_whatever_the_batch_by_one_program_and_ends_with_a_table(
        self, trained
    ):
        folder, ends = trained
        expected = {n.removeprefix("eval/"): v for n, v in ends["last"].items() if n.startswith("eval/")}
        for batch_size in (80, 40):
            found = evaluate.run(config_of(batch_size=batch_size), folder, "last", student=student)
            assert (found.measures, found.images) == (expected, 48)
        assert found.report().startswith(f"{found}\nIoU, %\nbackground ")
        report = summary.report(config_of(), ends).splitlines()
        assert [line.split()[0] for line in report[:4]] == ["last", "best", "IoU,", "background"]
        assert report[-5].split() == ["mIoU", *(f"{100 * ends[w]['eval/miou']:.2f}" for w in ends)]

    def test_images_of_many_sizes_are_evaluated_by_one_program(self, trained):
        network = networks.restore(folders.last(trained[0]), network=student)
        mesh, data = sharding.make_mesh(), open_pipeline(config_of(), "val")
        assert len({example.label.shape for example in map(data.source.__getitem__, range(48))}) > 30
        graph, state = nnx.split(network.view)
        compiled = jit_eval_step(mesh)._cache_size()
        evaluate.evaluate(graph, jax.device_put(state), Segmentation(), data, mesh, show=False)
        assert jit_eval_step(mesh)._cache_size() <= compiled + 1

    def test_what_whoever_calls_the_network_needs_is_kept_colours_included(self, trained):
        usage = json.loads((trained[0] / "usage.json").read_text())
        assert usage["classes"] == ["background", *map(str, range(10))]
        assert usage["image"] == {"size": 33}
        source = DigitMasks("val")
        source.colours = np.arange(33, dtype=np.uint8).reshape(11, 3)
        network = networks.restore(folders.last(trained[0]), network=student)
        assert usage_of(config_of(), network, source)["colours"] == source.colours.tolist()


def test_the_study_s_table_has_both_measures_last_and_best():
    def row(step, miou, squashed):
        return {"step": step, "eval/miou": miou, "eval/miou_squashed": squashed}

    seeds = [[row(1, 0.5, 0.41), row(2, 0.4, 0.43)], [row(1, 0.1, 0.2), row(2, 0.2, 0.3)]]
    runs = [comparison.Run(rows, 16, {}) for rows in seeds]
    methods = [comparison.Method("alone", "alone", runs)]
    found = comparison.compare(Segmentation(), (0, 1), {"teacher": row(2, 0.6, 0.61)}, methods)
    table = tables.text(found).splitlines()
    assert [" ".join(line.split()) for line in table] == [
        "validation, % (mean ± standard deviation)",
        "mIoU, last mIoU, best mIoU squashed, last mIoU squashed, best (mIoU, last of each seed)",
        "teacher 60.00 60.00 61.00 61.00",
        "alone 30.00 ± 14.14 35.00 ± 21.21 36.50 ± 9.19 35.50 ± 7.78 (40.00, 20.00)",
    ]
