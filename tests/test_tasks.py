"""Tasks: how classes are counted, and that labels may be integers, maps or absent, up to the measures."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from tat_jax import evaluate, sharding
from tat_jax.batch import Batch
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.sources import Example
from tat_jax.evaluate import Evaluation, Stopped
from tat_jax.networks.view import Outputs
from tat_jax.tasks import FIELD, TASKS
from tat_jax.tasks.classification import Classification
from tat_jax.tasks.task import Task
from tests.images import photograph

IGNORED = 255  # the label of pixels that do not count
SIDE = 6
CLASSES = 4


def crop(image, label, rng, size):
    """Cut the same part from image and label, from its corner or at random and mirrored."""
    top, left, step = 0, 0, 1
    if rng is not None:
        top, left = rng.integers(image.shape[0] - size + 1), rng.integers(image.shape[1] - size + 1)
        step = rng.choice([-1, 1])
    return tuple(
        None if x is None else x[top : top + size, left : left + size][:, ::step] for x in (image, label)
    )


@dataclass(frozen=True)
class Pixels(Task):
    """A class for each pixel, measured by one confusion matrix [truth, prediction]."""

    titles: ClassVar = {"right": "pixels"}

    def blank_label(self, data, source, *, train):
        return np.full((data.image_size, data.image_size), IGNORED, np.uint8)

    def transform(self, image, label, rng, data):
        return crop(image, label, rng, data.image_size)

    def count(self, outputs, batch):
        truth = jax.nn.one_hot(batch.label, CLASSES, dtype=jnp.int32)  # zero where it is ignored
        truth *= batch.where[:, None, None, None]
        prediction = jax.nn.one_hot(outputs.logits.argmax(-1), CLASSES, dtype=jnp.int32)
        confusion = jnp.einsum("b h w t, b h w p -> t p", truth, prediction)
        return {"count": batch.where.sum(), "confusion": confusion}

    def measures(self, counts, classes):
        confusion = counts["confusion"]
        cells = {f"{t} as {p}": float(n) for (t, p), n in np.ndenumerate(confusion)}
        return {"right": np.trace(confusion) / confusion.sum(), **cells}


@dataclass(frozen=True)
class Brightness(Task):
    """No label at all, measured by the mean of all pixels."""

    titles: ClassVar = {"brightness": "brightness"}

    def blank_label(self, data, source, *, train):
        return None

    def transform(self, image, label, rng, data):
        return crop(image, label, rng, data.image_size)

    def count(self, outputs, batch):
        pixels = batch.image.astype(jnp.int32).sum((1, 2, 3))
        return {"count": batch.where.sum(), "pixels": jnp.sum(pixels, where=batch.where)}

    def measures(self, counts, classes):
        return {"brightness": int(counts["pixels"]) / int(counts["count"]) / (SIDE * SIDE * 3 * 255)}


class Colour(nnx.Module):
    """See the class of each pixel, and a wrong one in every other column."""

    def __call__(self, images):
        assert images.dtype == jnp.uint8
        seen = (images[..., 0] // 64 + jnp.arange(images.shape[2], dtype=jnp.uint8)[None, None] % 2) % CLASSES
        return Outputs(jax.nn.one_hot(seen, CLASSES), {})


class First(nnx.Module):
    """See a class in the first pixel of an image."""

    def __call__(self, images):
        return Outputs(jax.nn.one_hot(images[:, 0, 0, 0] // 64, CLASSES), {})


class Painted:
    """So many images, whose pixels tell their labels; one for all of an image is wrong every other time."""

    num_classes = CLASSES

    def __init__(self, count, labels, *, broken=()):
        self.count, self.labels, self.broken = count, labels, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = photograph(SIDE + 3, SIDE + 5, seed=index)
        one = (int(image[0, 0, 0]) // 64 + index % 2) % CLASSES
        label = {"map": image[..., 0] // 64, "integer": one, "none": None}[self.labels]
        if self.labels == "map" and index % 3 == 0:
            label[2] = IGNORED
        return Example(b"broken" if index in self.broken else image, label, f"photograph {index}")


# For each kind of label a task and a network.
KINDS = {
    "integer": (Classification(), First()),
    "map": (Pixels(), Colour()),
    "none": (Brightness(), First()),
}
DATA = ConfigDict(
    {
        "image_size": SIDE,
        "eval_resize": SIDE,
        "crop_scale": (0.3, 1.0),
        "crop_ratio": (1.0, 1.0),
        "flip": True,
        "skip_broken": False,
        "exif_orientation": False,
        "grey_range": None,
    }
)


def make(kind, *, images=45, batch_size=8, train=False, threads=0, broken=(), task=None, **options):
    """Return a pipeline of so many images with labels of a kind."""
    data = DATA.copy_and_resolve_references()
    data.skip_broken = bool(broken)
    options = {"batch_size": batch_size, "train": train, "seed": 0, "threads": threads, **options}
    return Pipeline(Painted(images, kind, broken=broken), task or KINDS[kind][0], data, **options)


class Together(Pipeline):
    """The pipelines of several processes, with the whole batches that the devices have of them."""

    def __init__(self, kind, processes, **options):
        self.parts = [
            make(kind, process_index=i, process_count=processes, **options) for i in range(processes)
        ]
        self.source = self.parts[0].source

    @property
    def skipped(self):
        return {index: name for part in self.parts for index, name in part.skipped.items()}

    def epoch(self, index, start_step=0):
        for rows in zip(*(part.epoch(index, start_step) for part in self.parts), strict=True):
            yield jax.tree.map(lambda *rows: np.concatenate(rows), *rows)


def measure(kind, pipeline, devices=1) -> Evaluation:
    task, network = KINDS[kind]
    mesh = sharding.make_mesh(jax.devices()[:devices])
    state = jax.device_put(nnx.state(network), sharding.replicated(mesh))
    return evaluate.evaluate(nnx.graphdef(network), state, task, pipeline, mesh, show=False)


def numpy_measures(kind, images) -> dict[str, float]:
    """Return what comes of images and labels of a kind, one after the other."""
    task, network = KINDS[kind]
    totals = {}
    for index in images:
        example = Painted(index + 1, kind)[index]
        image, label = task.transform(example.image, example.label, None, DATA)
        seen = np.asarray(network(jnp.asarray(image)[None]).logits)[0].argmax(-1)
        if kind == "integer":
            found = {"top1": int(seen == label), "top5": 1}
        elif kind == "none":
            found = {"pixels": image.astype(int).sum()}
        else:
            found = {"confusion": np.zeros((CLASSES, CLASSES), int)}
            for cell in zip(label.ravel(), seen.ravel(), strict=True):
                if cell[0] != IGNORED:
                    found["confusion"][cell] += 1
        totals = {name: totals.get(name, 0) + value for name, value in found.items()}
    return task.measures({name: np.asarray(n) for name, n in (totals | {"count": len(images)}).items()}, None)


def assert_same(got, expected):
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def batch_of(labels, where=None) -> Batch:
    size = len(labels)
    return Batch(
        np.zeros((size, 1, 1, 3), np.uint8), np.array(labels), np.ones(size, bool) if where is None else where
    )


def logits_of(*classes) -> Outputs:
    return Outputs(jax.nn.one_hot(np.array(classes), 7), {})


class TestClassification:
    def test_evaluation_counts_as_a_stable_sort_does_ties_and_nan_included(self):
        rng = np.random.default_rng(0)
        logits = rng.integers(0, 4, (64, 8)).astype(np.float32)  # many ties
        logits[-1] = np.nan
        labels, where = rng.integers(0, 8, 64), np.arange(64) % 5 > 0
        counts = Classification().count(Outputs(jnp.asarray(logits), {}), batch_of(labels, where))
        order = np.argsort(-logits, axis=1, kind="stable")
        right = (order == labels[:, None]) & where[:, None] & np.isfinite(logits).all(1)[:, None]
        assert counts == {"count": where.sum(), "top1": right[:, :1].sum(), "top5": right[:, :5].sum()}

    def test_measures_are_fractions_of_the_images_and_a_line_says_them_in_percent(self):
        counts = {"count": np.array(797), "top1": np.array(663), "top5": np.array(774)}
        measures = Classification().measures(counts, None)
        assert measures == {"top1": 663 / 797, "top5": 774 / 797}
        assert Classification().describe(measures) == "top-1 83.19%  top-5 97.11%"
        evaluation = Evaluation(Classification(), measures, images=797, skipped=0)
        assert str(evaluation) == "top-1 83.19%  top-5 97.11%  on 797 images"
        skipped = evaluation._replace(images=1797, skipped=2)
        assert str(skipped).endswith("on 1,797 images (2 unreadable skipped)")

    def test_the_first_measure_decides_which_checkpoint_is_the_best(self):
        assert Classification().best == "top1"
        assert Classification().chance(1000) == 0.001

    def test_a_training_step_reports_rows_that_count_and_agreement_with_the_teacher(self):
        batch = batch_of([1, 2, 3, 4], np.array([True, True, True, False]))
        student, teacher = logits_of(1, 5, 5, 4), logits_of(1, 5, 3, 0)
        assert Classification().measure(student, batch, teacher) == {
            "train_top1": pytest.approx(1 / 3),
            "teacher_agreement": pytest.approx(2 / 3),
        }

    @pytest.mark.parametrize(
        "teacher",
        [None, Outputs(None, {}), Outputs(jnp.zeros((2, 9)), {})],
        ids=["no teacher", "no logits", "other classes"],
    )
    def test_there_is_no_agreement_with_a_teacher_that_knows_no_such_classes(self, teacher):
        measured = Classification().measure(logits_of(1, 2), batch_of([1, 2]), teacher)
        assert measured == {"train_top1": 1}

    def test_a_training_step_without_labels_or_logits_reports_what_is_left(self):
        unlabelled = batch_of([0, 0])._replace(label=None)
        agreement = Classification().measure(logits_of(1, 2), unlabelled, logits_of(1, 0))
        assert agreement == {"teacher_agreement": 0.5}
        assert Classification().measure(Outputs(None, {}), unlabelled, logits_of(1, 0)) == {}

    @pytest.mark.parametrize("lacks", ["logits", "labels"])
    def test_an_evaluation_without_labels_or_logits_says_which(self, lacks):
        outputs = Outputs(None, {}) if lacks == "logits" else logits_of(0)
        batch = batch_of([0]) if lacks == "logits" else batch_of([0])._replace(label=None)
        with pytest.raises(ValueError, match=f"no {lacks}"):
            Classification().count(outputs, batch)


class TestKindsOfLabels:
    def test_maps_keep_to_their_images_and_rows_without_image_are_blank(self):
        batches = list(make("map", train=True).epoch(0))
        assert len(batches) == 6
        for batch in batches:
            assert (batch.label.shape, batch.label.dtype) == ((8, SIDE, SIDE), np.uint8)
            counts = batch.where[:, None, None] & (batch.label != IGNORED)
            np.testing.assert_array_equal(batch.label[counts], batch.image[..., 0][counts] // 64)
            assert (batch.label[~batch.where] == IGNORED).all()
        assert sum(batch.where.sum() for batch in batches) == 45

    def test_where_there_are_no_labels_batches_have_none(self):
        assert {batch.label for batch in make("none", train=True).epoch(0)} == {None}

    @pytest.mark.parametrize("train", [True, False], ids=["train", "evaluate"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_threads_processes_and_resuming_change_nothing(self, kind, train):
        # 40 rows a process are read in two parts.
        whole = list(make(kind, images=201, batch_size=80, train=train).epoch(1))
        assert_same(make(kind, images=201, batch_size=80, train=train, threads=3).epoch(1), whole)
        assert_same(Together(kind, 2, images=201, batch_size=80, train=train).epoch(1), whole)
        assert_same(make(kind, images=201, batch_size=80, train=train).epoch(1, start_step=2), whole[2:])

    @pytest.mark.parametrize("devices", [1, 3, 8])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_image_counts_once_whatever_devices_processes_and_batches(self, kind, devices):
        expected = numpy_measures(kind, range(45))
        for size in (devices, 8 * devices, 48):
            for pipeline in (make(kind, batch_size=size), Together(kind, 2, batch_size=2 * size)):
                found = measure(kind, pipeline, devices)
                assert (found.measures, found.images, found.skipped) == (expected, 45, 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_images_that_cannot_be_read_do_not_count_whatever_their_labels(self, kind):
        found = measure(kind, Together(kind, 2, batch_size=16, broken=(0, 7, 44)), devices=8)
        expected = numpy_measures(kind, sorted({*range(45)} - {0, 7, 44}))
        assert (found.measures, found.images, found.skipped) == (expected, 42, 3)

    @pytest.mark.parametrize(
        ("kind", "task", "reason"),
        [
            ("none", Classification(), r"it has no label, and the task takes int32\[\]"),
            ("map", Classification(), r"it has a label of uint8\[9, 11\], and the task takes int32\[\]"),
            ("none", Pixels(), r"it has no label, and the task takes uint8\[6, 6\]"),
        ],
        ids=["integer", "map", "no map"],
    )
    def test_a_label_of_another_kind_is_an_error_with_the_name_of_its_image(self, kind, task, reason):
        with pytest.raises(ValueError, match=rf"^photograph 0: {reason}$"):
            next(make(kind, task=task).epoch(0))

    def test_an_integer_does_not_become_a_map(self):
        @dataclass(frozen=True)
        class Forgetful(Pixels):
            """Return the first pixel's label."""

            def transform(self, image, label, rng, data):
                image, label = super().transform(image, label, rng, data)
                return image, int(label[0, 0])

        with pytest.raises(
            ValueError, match=r"photograph 0: it has a label of int64\[\], and .* uint8\[6, 6\]"
        ):
            next(make("map", task=Forgetful()).epoch(0))

    def test_what_a_transform_refuses_has_the_name_of_the_image(self):
        class Wary(Brightness):
            """Refuse every image."""

            def transform(self, image, label, rng, data):
                raise ValueError("too dark")

        with pytest.raises(ValueError, match=r"^photograph 0: too dark$"):
            next(make("none", task=Wary()).epoch(0))


class TestEvaluate:
    def test_sums_of_counts_are_exact_beyond_32_bits(self):
        class Many(Brightness):
            """Count as much of each batch as 32 bits hold."""

            def count(self, outputs, batch):
                return {"count": batch.where.sum(), "pixels": jnp.full((), 2**31 - 1)}

            def measures(self, counts, classes):
                return {"brightness": int(counts["pixels"])}

        network = First()
        mesh = sharding.make_mesh()
        found = evaluate.evaluate(*nnx.split(network), Many(), make("none"), mesh, show=False)
        assert found.measures == {"brightness": 6 * (2**31 - 1)}

    def test_counts_that_are_no_integers_are_refused(self):
        class Means(Brightness):
            """Count what rounds."""

            def count(self, outputs, batch):
                return {"count": batch.where.sum(), "pixels": batch.image.mean()}

        with pytest.raises(ValueError, match="Means counts `pixels` in float32"):
            evaluate.evaluate(*nnx.split(First()), Means(), make("none"), sharding.make_mesh(), show=False)

    def test_a_process_compiles_a_network_once_for_equal_tasks(self):
        traced = []

        class Noting(nnx.Module):
            """Note when it is traced."""

            def __call__(self, images):
                traced.append(images.shape)
                return Outputs(jnp.zeros((len(images), CLASSES)), {})

        graph, state = nnx.split(Noting())
        for task in (Classification(), Classification(), Brightness()):
            for _ in range(2):
                kind = "none" if isinstance(task, Brightness) else "integer"
                evaluate.evaluate(graph, state, task, make(kind), sharding.make_mesh(), show=False)
        assert len(traced) == 2

    def test_a_signal_stops_it_before_the_next_batch(self):
        asked = iter([0, 0, 15])
        with pytest.raises(Stopped) as stopped:
            evaluate.evaluate(
                *nnx.split(First()),
                Classification(),
                make("integer"),
                sharding.make_mesh(),
                show=False,
                stop_signal=lambda: next(asked),
            )
        assert stopped.value.args == (15,)

    def test_a_split_of_which_nothing_can_be_read_is_an_error(self):
        pipeline = make("none", images=3, broken=(0, 1, 2))
        with pytest.raises(ValueError, match="no image of the split could be read"):
            measure("none", pipeline)


def test_a_config_names_a_task_by_its_class():
    assert TASKS["classification"] is Classification
    assert FIELD.rule.holds("classification")
    assert not FIELD.rule.holds("clasification")


def test_the_measures_of_classification_stand_in_its_file_alone():
    package = Path(evaluate.__file__).parent
    found = [path for path in package.rglob("*.py") if re.search("top[15]", path.read_text())]
    assert found == [package / "tasks" / "classification.py"]
