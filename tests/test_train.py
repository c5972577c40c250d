"""A run: what it leaves behind, that it continues exactly, and what it refuses."""

import fcntl
import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from tat_jax import costs, evaluate, sharding, step, train
from tat_jax.build import build
from tat_jax.configs import (
    base,
    compare,
    digits,
    finetune,
    patient,
    r18_r34,
    r18_r34_ce,
    r18_r34_kd,
    r18_r34_scratch,
    supervised,
)
from tat_jax.data.pipeline import open_pipeline
from tat_jax.export import export
from tat_jax.losses import terms_of
from tat_jax.metrics import read_rows
from tat_jax.networks.view import View, normalize
from tat_jax.signals import Interrupted
from tat_jax.weights import folders, store
from tests.interpreter import children
from tests.tiny import Dropping, Tiny

pytestmark = pytest.mark.usefixtures("unchecked")


def config_of(**changes):
    """Return a run of three steps an epoch, the last one short, on digits."""
    config = base.base()
    config.update({"epochs": 2, "batch_size": 16, "log_every": 1, "bn_group": 8})
    config.losses = {
        "cross_entropy": base.loss("cross_entropy", weight=0.5),
        "kd": base.loss("kd", weight=0.5, temperature=2.0),
        "tat": {
            "layer1": base.loss("tat"),
            "layer2": base.loss("tat", weight=0.5, heads=2, target_norm="channel"),
        },
    }
    config.data.update(
        {"source": "digits", "labels_per_class": 4, "image_size": 16, "eval_resize": 16, "threads": 1}
    )
    config.optimizer.milestones = (1,)
    with config.ignore_type():
        for name, value in changes.items():
            config[name] = value
    return config


def run(config, folder, network=Dropping):
    """Train a tiny student of ten classes, whose dropout has a random stream, under a tiny teacher."""
    student = network(4, classes=10, bn_group=config.bn_group, rngs=nnx.Rngs(0))
    teacher = Tiny(8, classes=10, rngs=nnx.Rngs(1))
    return train.run(config, folder, student=student, teacher=teacher)


def contents(folder):
    """Return what the last checkpoint holds, and the rows but for their speed."""
    step = folders.last(folder)
    there = [item for item in ("student", "student_ema", "training") if (step / item).exists()]
    items = {item: jax.tree.leaves(store.load_item(step / item)) for item in there}
    rows = [
        {name: value for name, value in row.items() if name != "train/images_per_second"}
        for row in read_rows(folder)
    ]
    return items, rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return the folder of a run of four epochs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(config_of(epochs=4), folder)
    return folder


def assert_same_run(folder, other):
    (items, rows), (others, expected) = contents(folder), contents(other)
    for item, leaves in items.items():
        for leaf, value in zip(leaves, others[item], strict=True):
            np.testing.assert_array_equal(leaf, value)
    assert rows == expected


def test_a_run_leaves_checkpoints_metrics_events_config_and_a_picture(uninterrupted):
    rows = read_rows(uninterrupted)
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, 13))
    assert [row["step"] for row in rows if "eval/top1" in row] == [3, 6, 9, 12]
    logged = {name for row in rows for name in row}
    assert {
        "train/cross_entropy",
        "train/kd",
        "train/tat_layer2",
        "train/learning_rate",
        "train/gradient_norm",
        "train/teacher_agreement",
        "train/images_per_second",
        "eval/top5",
    } <= logged
    assert "train/tat_layer1" not in logged
    for name in ("curves.png", "images.png"):
        assert (uninterrupted / name).read_bytes().startswith(b"\x89PNG")
    assert list(uninterrupted.glob("events.out.tfevents.*"))
    assert json.loads((uninterrupted / "config.json").read_text())["epochs"] == 4


def test_the_statistics_of_a_target_are_saved_with_its_loss(uninterrupted):
    of_losses = store.load_item(folders.last(uninterrupted) / "training")["embeddings"]
    epochs, images, positions = 4, 40, 4 * 4  # without the padding of short batches
    assert of_losses["losses.tat_layer2.by_channel.count"] == epochs * images * positions
    assert {f"losses.tat_layer2.by_channel.{name}" for name in ("mean", "var")} <= of_losses.keys()


def test_the_rate_follows_the_milestones(uninterrupted):
    rates = [row["train/learning_rate"] for row in read_rows(uninterrupted) if "train/loss" in row]
    assert rates == pytest.approx([1.6e-3] * 3 + [1.6e-4] * 9)


def test_the_best_and_the_last_checkpoint_are_told(uninterrupted):
    result = run(config_of(epochs=4), uninterrupted)
    evaluated = [row for row in read_rows(uninterrupted) if "eval/top1" in row]
    assert result == {"last": evaluated[-1], "best": max(evaluated[::-1], key=lambda row: row["eval/top1"])}
    assert folders.best(uninterrupted).name == str(result["best"]["step"])
    assert folders.last(uninterrupted).name == "12"


def test_a_run_that_was_continued_by_processes_that_read_equals_the_uninterrupted_one(
    tmp_path, uninterrupted
):
    run(config_of(epochs=1), tmp_path)
    config = config_of(epochs=4)
    config.data.processes = 2
    before = children()
    run(config, tmp_path)
    assert_same_run(tmp_path, uninterrupted)
    assert children() <= before


class Watched:
    """The step of training, with what happens between its calls written down."""

    def __init__(self, monkeypatch):
        self.events, self._step = [], train.TrainStep
        self._get, self._of_step = jax.device_get, {}
        monkeypatch.setattr(train, "TrainStep", self._watch)
        monkeypatch.setattr(jax, "device_get", self._watch_reading)

    def _watch(self, *arguments):
        watched, of_step = self, self._step(*arguments)

        class Step:
            memory = None

            def __call__(self, state, *arguments):
                number = int(np.asarray(state().step))
                state, metrics = of_step(state, *arguments)
                watched.events.append(("step", number))
                watched._of_step[id(metrics["loss"])] = number, metrics
                return state, metrics

        return Step()

    def _watch_reading(self, tree):
        if isinstance(tree, dict) and id(tree.get("loss")) in self._of_step:
            self.events.append(("read", self._of_step[id(tree["loss"])][0]))
        return self._get(tree)


def test_a_whole_run_short_batches_and_continuing_included_compiles_one_step(tmp_path, monkeypatch):
    jit, steps = step._jit, []

    class Counted:
        def __init__(self, *arguments):
            self._jitted, self.lowered = jit(*arguments), 0
            steps.append(self)

        def lower(self, *arguments):
            self.lowered += 1
            return self._jitted.lower(*arguments)

    monkeypatch.setattr(step, "_jit", Counted)
    config = config_of(epochs=1)
    assert 40 % config.batch_size  # the last batch is short
    run(config, tmp_path)
    run(config_of(epochs=3), tmp_path)
    assert [of_run.lowered for of_run in steps] == [1, 1]


def test_a_run_tells_what_its_losses_train_and_what_its_step_takes(uninterrupted):
    told = costs.read(uninterrupted)
    assert told["loss_parameters"] == 2 * (9 * 8 * 16 + 2 * 16)  # the embeddings of query and value
    assert 2**16 < told["step_memory"] < 2**30


def test_nothing_at_all_is_compiled_after_the_first_evaluation(tmp_path, monkeypatch):
    compilations, after_epochs = [], []

    def listener(name, *_, **__):
        if "backend_compile" in name:
            compilations.append(name)

    jax.monitoring.register_event_duration_secs_listener(listener)
    evaluate_epoch = evaluate.evaluate

    def evaluate_and_count(*arguments, **options):
        result = evaluate_epoch(*arguments, **options)
        after_epochs.append(len(compilations))
        return result

    monkeypatch.setattr(evaluate, "evaluate", evaluate_and_count)
    try:
        run(config_of(epochs=4), tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    # The first count was taken before the first checkpoint was saved.
    first, *others = after_epochs
    assert first > 0
    assert others == [first] * 3


def test_the_metrics_of_a_step_are_read_after_the_next_one_was_given_to_the_device(tmp_path, monkeypatch):
    watched = Watched(monkeypatch)
    run(config_of(epochs=1), tmp_path)
    order = [("step", 0), ("step", 1), ("read", 0), ("step", 2), ("read", 1), ("read", 2)]
    assert watched.events == order


def test_a_step_that_would_copy_from_the_host_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train.sharding, "put_batches", lambda batches, mesh: batches)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(config_of(epochs=1), tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_anywhere_equals_the_uninterrupted_one(tmp_path, uninterrupted, number):
    def interrupt_after_a_step():
        while not any("train/loss" in row for row in read_rows(tmp_path)):
            if done.wait(0.005):
                return
        os.kill(os.getpid(), number)

    done = threading.Event()
    watcher = threading.Thread(target=interrupt_after_a_step)
    watcher.start()
    with pytest.raises(Interrupted, match="stopped at step"):
        run(config_of(epochs=4), tmp_path)
    done.set()
    watcher.join()
    run(config_of(epochs=4), tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_that_was_stopped_during_an_evaluation_does_that_again(tmp_path, uninterrupted, monkeypatch):
    evaluations, whole = [], evaluate.evaluate

    def evaluate_second_time_interrupted(*arguments, **options):
        evaluations.append(arguments)
        if len(evaluations) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, **options)

    monkeypatch.setattr(evaluate, "evaluate", evaluate_second_time_interrupted)
    with pytest.raises(Interrupted, match="stopped at step 6 of 12") as stopped:
        run(config_of(epochs=4), tmp_path)
    assert stopped.value.signal == signal.SIGTERM
    assert [row["epoch"] for row in read_rows(tmp_path) if "epoch" in row] == [1]
    run(config_of(epochs=4), tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_row_over_steps_before_and_after_a_stop_is_that_of_a_run_without(tmp_path):
    run(config_of(epochs=2, log_every=2), tmp_path / "whole")
    run(config_of(epochs=1, log_every=2), tmp_path / "stopped")  # after three steps
    run(config_of(epochs=2, log_every=2), tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert [row["step"] for row in read_rows(tmp_path / "whole") if "train/loss" in row] == [2, 4, 6]


def recipe_of_today(**changes):
    """Return a run with mixed images, smoothed labels and an average that follows every second batch."""
    config = config_of(**{"mixup": 0.8, "cutmix": 1.0, "ema_decay": 0.9} | changes)
    config.losses.cross_entropy.label_smoothing = 0.1
    config.optimizer.accumulate = 2
    return config


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """Return the folder of such a run of three epochs."""
    folder = tmp_path_factory.mktemp("averaged")
    run(recipe_of_today(epochs=3), folder)
    return folder


def test_a_run_with_mixed_images_and_an_average_continues_to_the_bit(tmp_path, averaged):
    run(recipe_of_today(epochs=1), tmp_path)  # three steps, the last one half of an update
    assert (folders.last(tmp_path) / "student_ema").is_dir()
    run(recipe_of_today(epochs=3), tmp_path)
    assert_same_run(tmp_path, averaged)


def test_the_average_is_evaluated_beside_the_student_and_taken_by_its_name(averaged, tmp_path):
    rows = [row for row in read_rows(averaged) if "eval/ema_top1" in row]
    assert [row["step"] for row in rows] == [3, 6, 9]
    student = Tiny(4, classes=10, bn_group=8, rngs=nnx.Rngs(2))
    config = recipe_of_today(epochs=3)
    for which, row in (("last", rows[-1]), ("best", max(rows[::-1], key=lambda row: row["eval/ema_top1"]))):
        found = evaluate.run(config, averaged, f"{which}_ema", student=student).measures
        assert found == {name: row[f"eval/ema_{name}"] for name in ("top1", "top5")}
    folder = folders.last(averaged)
    by_path = evaluate.run(config, averaged, str(folder / "student_ema"), student=student).measures
    assert by_path["top1"] == rows[-1]["eval/ema_top1"]
    own, average = (store.load_network(place).weights for place in (folder, folder / "student_ema"))
    assert own.keys() == average.keys()
    assert any((own[name] != average[name]).any() for name in own)
    export(averaged, tmp_path / "average.safetensors", "last_ema", student=student)
    handed_on = load_file(tmp_path / "average.safetensors")
    np.testing.assert_array_equal(handed_on["fc.bias"], average["fc.bias"])


def test_an_average_is_neither_begun_nor_dropped_on_the_way_and_none_is_taken_where_none_is(
    averaged, uninterrupted
):
    with pytest.raises(ValueError, match=r"ema_decay: 0.9 there, None now"):
        run(recipe_of_today(epochs=3, ema_decay=None), averaged)
    with pytest.raises(ValueError, match=r"ema_decay: None there, 0.9 now"):
        run(config_of(epochs=4, ema_decay=0.9), uninterrupted)
    with pytest.raises(FileNotFoundError, match=r"keeps no moving average: it was trained without ema_decay"):
        evaluate.run(config_of(epochs=4), uninterrupted, "best_ema")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": -1.0}, r"mixup=-1.0: allowed is a number from 0 on"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0: allowed is a number between 0 and 1"),
    ],
)
def test_what_is_no_recipe_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(config_of(**changes), tmp_path)


def test_what_cannot_be_mixed_is_named_before_anything_is_built():
    mesh = sharding.make_mesh(jax.devices()[:1])
    config = config_of(mixup=0.2, batch_size=1, bn_group=None)
    with pytest.raises(ValueError, match=r"^mixup=0.2: a batch of one image has nothing to mix it with"):
        build(config, mesh, num_classes=10, steps_per_epoch=1)
    config = config_of(mixup=0.2, cutmix=1.0)
    config.losses = {"pixel_cross_entropy": base.loss("pixel_cross_entropy", weight=1.0)}
    said = r"^mixup=0.2 and cutmix=1: pixel_cross_entropy reads one label for each image, and mixed"
    with pytest.raises(ValueError, match=said):
        build(config, mesh, num_classes=10, steps_per_epoch=1)


def test_a_folder_where_a_run_is_at_work_is_refused(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another run is at work in .*; choose another --workdir"):
            run(config_of(epochs=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_what_is_passed_over_is_told_and_a_training_set_that_grew_since_is_refused(folder, tmp_path, capsys):
    root = folder(
        *(f"{split}/{name}/{i}.JPEG" for split in ("train", "val") for name in "ab" for i in range(4))
    )
    config = config_of(epochs=1)
    config.data.update({"source": "imagefolder", "root": str(root)})
    (root / "train/a/more.gif").touch()
    run(config, tmp_path / "run")
    told = capsys.readouterr().out
    assert (
        "\n  images   16 × 16 pixels cut from a shorter side of 16 (data.eval_resize), to validate\n" in told
    )
    assert told.count("\n  note     train: passed over 1 .gif; read are ") == 1
    assert "\n  rate     0.0016 at every step\n" in told
    folder("train/a/new.JPEG")
    config.epochs = 2
    with pytest.raises(ValueError, match=r"trained on 8 images, and data.root holds 9 now"):
        run(config, tmp_path / "run")


def test_a_batch_of_which_no_image_can_be_read_is_told_as_that(folder, tmp_path):
    root = folder("train/a/0.jpg", "train/b/0.jpg", "val/a/0.jpg")
    for name in "ab":
        (root / f"train/{name}/0.jpg").write_bytes(b"no image")
    config = config_of()
    config.data.update({"source": "imagefolder", "root": str(root), "skip_broken": True})
    said = r"none of its images could be read; replace or remove them: .*/train/[ab]/0.jpg, "
    with pytest.raises(FloatingPointError, match=said):
        run(config, tmp_path / "run")


def test_another_config_in_the_same_folder_is_refused_field_by_field(uninterrupted):
    config = config_of(epochs=4, batch_size=8)
    config.optimizer.accumulate = 2
    with pytest.raises(
        ValueError, match=r"batch_size: 16 there, 8 now\n  optimizer.accumulate: 1 there, 2 now"
    ):
        run(config, uninterrupted)


def test_a_rate_that_blows_the_loss_up_stops_the_run_with_its_step(tmp_path):
    config = config_of()
    config.optimizer.update({"name": "sgd", "learning_rate": 1e30, "milestones": ()})
    with pytest.raises(FloatingPointError, match=r"is (nan|inf).* of step \d+; its images: digit \d+"):
        run(config, tmp_path)


class Poisoned(Tiny):
    """A student that one of the images drives out of the numbers."""

    def __call__(self, images, *, train=False, where=None):
        logits = super().__call__(images, train=train, where=where)
        met = jnp.isclose(images.sum((1, 2, 3)), self.poison).any()
        return jnp.where(met & train, jnp.nan, logits)


@pytest.fixture
def poisoned():
    """Return a function that trains on such an image, and where epoch 0 and epoch 1 have it."""
    config = config_of(epochs=2)
    config.data.update({"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": False})
    data = open_pipeline(config, "train")
    sums = [[normalize(batch.image).sum((1, 2, 3)) for batch in data.epoch(epoch)] for epoch in range(2)]
    poison = sums[0][1][0]
    steps = [
        3 * epoch + i for epoch in range(2) for i in range(3) if np.isclose(sums[epoch][i], poison).any()
    ]

    def train_poisoned(folder, left_out):
        config.steps_left_out = left_out
        student = Poisoned(4, classes=10, bn_group=config.bn_group, rngs=nnx.Rngs(0))
        student.poison = float(poison)
        return train.run(config, folder, student=student, teacher=Tiny(8, classes=10, rngs=nnx.Rngs(1)))

    return train_poisoned, steps, data.names(0, 1)[0]


def test_a_step_that_is_no_number_stops_the_run_with_its_terms_and_images(tmp_path, poisoned):
    train_poisoned, (step, _), name = poisoned
    terms = "cross_entropy is nan, kd is nan, loss is nan"
    message = f"{terms} of step {step}; its images: {name}, .*Nothing was saved"
    with pytest.raises(FloatingPointError, match=message):
        train_poisoned(tmp_path, 0)
    assert (tmp_path / f"step{step}_process0_images.txt").read_text().splitlines()[0] == name
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        folders.last(tmp_path)


class Steep(Tiny):
    """A student whose gradient is no number where its logits are."""

    def __call__(self, images, *, train=False, where=None):
        logits = super().__call__(images, train=train, where=where)
        return logits + jnp.sqrt(0 * logits)


def test_a_gradient_that_is_no_number_stops_the_run_before_anything_is_saved(tmp_path):
    student = Steep(4, classes=10, rngs=nnx.Rngs(0))
    with pytest.raises(FloatingPointError, match=r"^gradient_norm is nan of step 0; .*Nothing was saved"):
        train.run(config_of(), tmp_path, student=student, teacher=Tiny(8, classes=10, rngs=nnx.Rngs(1)))


def test_so_many_such_steps_may_be_left_out_and_no_more(tmp_path, poisoned):
    train_poisoned, (_, second), _ = poisoned
    with pytest.raises(FloatingPointError, match=f"of step {second}; .*The checkpoint of step 3 is kept"):
        train_poisoned(tmp_path, 1)
    assert folders.last(tmp_path).name == "3"
    train_poisoned(tmp_path, 2)  # continues, and has not forgotten the first one
    rows = [row for row in read_rows(tmp_path) if "train/steps_left_out" in row]
    assert [row["train/steps_left_out"] for row in rows] == [0, 1, 1, 1, 1, 2]
    rows = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 3, 4, 5]
    assert np.isfinite([row["train/loss"] for row in rows]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 12}, "batch_size=12 is not a multiple of the 8 devices"),
        ({"batch_size": 40, "bn_group": 16}, "bn_group=16 does not divide batch_size=40"),
        (
            {"losses": {"tat": {"layer2": {"weight": 1.0, "heads": 3}}}},
            r"tat_layer2: heads=3 does not divide the teacher's 16 channels",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_compiled(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        run(config_of(**change), tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_tap_that_a_network_does_not_sow_is_named(tmp_path):
    config = config_of()
    with config.unlocked():
        config.losses.tat.layer9 = base.loss("tat", weight=1.0)
    message = r"the student of .*tat_layer9: no tap layer9: the network sows layer1, layer2, and "
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path)


def test_taps_of_other_sizes_are_named(tmp_path):
    config = config_of(student=base.network("resnet18", "random", small_images=True, width=4))
    with pytest.raises(ValueError, match=r"tat_layer2: .*student's is \[8, 8\], the teacher's \[4, 4\]"):
        train.run(config, tmp_path, teacher=Tiny(8, classes=10, rngs=nnx.Rngs(1)))


def test_missing_weights_come_with_the_command_that_makes_them(tmp_path):
    config = config_of(teacher=base.network("resnet34", str(tmp_path / "resnet34")))
    with pytest.raises(FileNotFoundError, match=r"python -m tat_jax.convert resnet34 --to .*/resnet34"):
        train.run(config, tmp_path, student=Tiny(4, rngs=nnx.Rngs(0)))


def test_a_run_without_checkpoints_comes_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*--workdir"):
        evaluate.run(config_of(), tmp_path, "best")


@pytest.mark.parametrize(
    "experiment",
    [r18_r34, r18_r34_ce, r18_r34_kd, r18_r34_scratch, supervised, digits, finetune, compare, patient],
)
def test_every_config_has_a_miniature_without_files(experiment):
    config = experiment.get_config("smoke")
    assert config.data.source == "digits"
    assert config.student.weights == config.teacher.weights == "random"
    with pytest.raises(ValueError, match="smok"):
        experiment.get_config("smok")


def test_the_recipe_is_the_authors():
    config = r18_r34.get_config()
    assert list(map(str, terms_of(config.losses))) == ["0.1·cross_entropy", "0.2·tat_layer4"]
    assert config.losses.tat.layer4.heads == 1
    assert (config.batch_size, config.bn_group, config.epochs) == (2048, 256, 100)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("adamw", 1.6e-3, 5e-4)
    assert (optimizer.milestones, optimizer.gamma) == ((30, 60, 90), 0.1)


KD = {"losses.cross_entropy.weight": 0.5, "losses.kd.weight": 0.5, "losses.tat.layer4.weight": 0.1}


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        (r18_r34_kd, KD),
        (r18_r34_ce, {"losses.cross_entropy.weight": 1.0, "losses.tat.layer4.weight": 0.0}),
        (r18_r34_scratch, {"student.weights": "random"}),
    ],
)
def test_a_variant_is_the_recipe_but_for_what_its_name_says(variant, changes):
    config = r18_r34.get_config()
    config.update_from_flattened_dict(changes)
    assert variant.get_config() == config


def test_networks_and_losses_of_ones_own_can_be_trained_with_twice(tmp_path):
    view = View(Tiny(8, classes=10, rngs=nnx.Rngs(1)))
    own = {"student": Tiny(4, classes=10, bn_group=8, rngs=nnx.Rngs(0)), "teacher": view}
    config = config_of(epochs=1, log_every=3)
    first, second = (train.run(config, tmp_path / name, **own) for name in "ab")
    assert first == second
    assert view.taps == ()
