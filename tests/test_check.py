"""What a training needs is found before it starts: each thing that is wrong, in one call, and named."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tat_jax import check, inspection, items, networks, quantities, train, trial
from tat_jax.buckets import Bucket
from tat_jax.configs import base
from tat_jax.data import sample
from tat_jax.data.pipeline import Pipeline, open_pipeline
from tat_jax.data.sample import Sample
from tat_jax.data.sources import Digits
from tat_jax.metrics import read_rows
from tat_jax.networks.view import normalize
from tat_jax.schedules import linear
from tat_jax.tasks.classification import Classification
from tat_jax.weights import store
from tests import test_segmentation
from tests.interpreter import children
from tests.tiny import Tiny

MAIN = Path(__file__).parents[1] / "main.py"
ITEMS = ["config", "folder", "devices", "training data", "training sample", "picture"]
ITEMS += [
    "validation data",
    "validation sample",
    "student",
    "teacher",
    "teacher's top-1",
    "task",
    "taps",
    "reading",
    "first look",
    "memory",
    "loss at step 0",
]
ITEMS += ["time", "check"]


def config_of(**changes):
    """Return a training of every term on digits."""
    config = base.base()
    config.update({"epochs": 1, "batch_size": 16, "log_every": 1})
    config.losses.cross_entropy.weight = 0.5
    config.losses.kd.update({"weight": 0.5, "temperature": 2.0})
    config.losses.tat = {"layer2": base.loss("tat", weight=0.25, heads=2)}
    config.data.update(
        {"source": "digits", "labels_per_class": 2, "image_size": 16, "eval_resize": 16, "threads": 1}
    )
    with config.ignore_type():
        config.update(changes)
    return config


@pytest.fixture
def find(tmp_path, monkeypatch, capsys):
    """Return a function that checks a training, and returns whether it holds and the finding of each item."""
    monkeypatch.chdir(tmp_path)

    def find(config, **own):
        before, picture = set(tmp_path.rglob("*")), tmp_path / "run" / "check.png"
        hold = check.run(config, tmp_path / "run", **({"student": tiny(4), "teacher": tiny(8)} | own))
        assert set(tmp_path.rglob("*")) - before <= {picture, picture.parent}
        return hold, findings(capsys.readouterr().out)

    return find


def tiny(width):
    return Tiny(width, classes=10, rngs=nnx.Rngs(width))


def findings(text):
    """Return the finding of each item; those of several lines are indented."""
    lines = re.sub(r"\n {18}", "⏎", text).splitlines()
    return {line[:18].strip(): line[18:].replace("⏎", "\n") for line in lines}


def failed(found):
    return [name for name, finding in found.items() if finding.startswith("FAILED")]


def left_out(found):
    return [name for name, finding in found.items() if finding.startswith("left out: needs")]


def narrow(weights):
    """Return the fields of a ResNet-18 of width 2."""
    return {"architecture": "resnet18", "weights": str(weights), "small_images": True, "width": 2}


def save_resnet(folder, *, classes, head="trained", change=lambda weights: weights):
    """Save a ResNet-18 of width 2, and return the fields that name it."""
    arguments = {"architecture": "resnet18", "num_classes": classes, "small_images": True, "width": 2}
    weights = store.network_weights(networks.construct(arguments, rngs=nnx.Rngs(0)))
    origin = {"head": head, "source": "a test"}
    store.save_network(folder, store.StoredNetwork(change(weights), arguments, origin))
    return narrow(folder)


def test_all_that_a_training_needs_is_found_and_its_first_step_is_the_training_s(find, tmp_path):
    hold, found = find(config_of())
    assert hold
    assert list(found) == ITEMS
    assert found["check"] == "all hold"
    assert found["devices"] == "8 × cpu, 2 images a step on each"
    assert found["training data"] == "20 images, 10 classes, 2 steps an epoch"
    of_16 = "16 × 16 pixels cut from a shorter side of 16 (data.eval_resize)"
    assert found["validation data"] == f"797 images, 10 classes, {of_16}"
    assert found["training sample"].startswith("20 images over the whole split, ")
    assert found["validation sample"].startswith("64 images over the whole split, ")
    taps = "tat_layer2: student layer2 4×4×8 → teacher layer2 4×4×16, 16 positions, "
    assert found["taps"].startswith(taps)
    assert "heads=2" in found["taps"]
    assert found["teacher"] == "Tiny from your own code, head trained, 1,586 parameters, all finite"
    assert re.search(r"2 steps in about \d+ s, without evaluations", found["time"])

    train.run(config_of(), tmp_path / "run", student=tiny(4), teacher=tiny(8))
    row = next(row for row in read_rows(tmp_path / "run") if "train/loss" in row)
    loss = row["train/loss"]
    assert found["loss at step 0"].splitlines() == [
        f"{loss:.4g}, gradient norm {row['train/gradient_norm']:.4g}",
        *(
            f"{weight:g}·{name} = {weight:g} · {row[f'train/{name}']:.4g}, "
            f"{weight * row[f'train/{name}'] / loss:.1%} of the loss"
            for name, weight in {"cross_entropy": 0.5, "kd": 0.5, "tat_layer2": 0.25}.items()
        ),
    ]


def test_a_training_without_a_teacher_holds_without_one(find):
    hold, found = find(config_of(losses={"kd": {"weight": 0.0}, "tat": {"layer2": {"weight": 0.0}}}))
    assert hold
    assert found["teacher"].startswith("none")
    assert found["teacher's top-1"] == "left out: there is no teacher"
    assert found["taps"].startswith("none")


def test_missing_weights_and_missing_images_are_found_in_one_call(find):
    config = config_of(student={"weights": "none18"}, teacher={"weights": "none34"})
    config.data.source, config.data.root = "imagefolder", "nowhere"
    hold, found = find(config, student=None, teacher=None)
    assert not hold
    assert failed(found) == ["training data", "validation data", "student", "teacher"]
    assert found["check"] == "4 FAILED: training data, validation data, student, teacher"
    assert "no folder nowhere; images belong in nowhere/train/<class>/" in found["training data"]
    for architecture, network in (("resnet18", "student"), ("resnet34", "teacher")):
        assert f"python -m tat_jax.convert {architecture} --to none" in found[network]
    assert found["training sample"] == "left out: needs training data"
    assert found["task"] == "left out: needs training data, student, teacher"
    assert found["devices"].startswith("8 × cpu")


def test_weights_are_read_where_the_images_are_missing(find, tmp_path):
    config = config_of(student=save_resnet(tmp_path / "student", classes=10))
    config.data.source = "imagefolder"
    _, found = find(config, student=None)
    assert failed(found) == ["training data", "validation data"]
    assert "head not known without the data, " in found["student"]
    assert "head trained, " in found["teacher"]


def image_folder(folder):
    """Return a training on images of ten classes: one cannot be read, and of those to validate two."""
    names = [f"{split}/{label}/0.jpg" for split in ("train", "val") for label in range(10)]
    root = folder(*names)
    (root / "train/3/0.jpg").write_bytes(b"no image")
    (root / "val/7/0.jpg").write_bytes((root / "val/7/0.jpg").read_bytes()[:200])
    (root / "val/8/0.jpg").write_bytes(b"")
    config = config_of()
    config.data.update({"source": "imagefolder", "root": str(root)})
    return config


def test_an_unreadable_image_is_named_by_its_path(find, folder):
    config = image_folder(folder)
    hold, found = find(config)
    assert not hold
    # The first batch has every image, so that training would stop there.
    assert failed(found) == ["training sample", "validation sample", "reading"]
    assert "1 of 10 images cannot be read; replace them" in found["training sample"]
    assert f"{config.data.root}/train/3/0.jpg: not an image" in found["training sample"]
    lines = found["validation sample"].splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [f"{config.data.root}/val/{i}/0.jpg" for i in (7, 8)]
    assert found["teacher's top-1"] == "left out: needs validation sample"
    assert found["taps"].startswith("tat_layer2: student")


def test_the_first_training_crops_are_drawn_with_their_classes_as_the_training_has_them(find, tmp_path):
    _, found = find(config_of())
    path = tmp_path / "run" / "check.png"
    assert found["picture"] == f"the first training crops with their labels: {path}"
    with Image.open(path) as opened:
        drawn = np.asarray(opened)
    assert drawn.shape == (18 + 96 + 18, 8 * (96 + 6), 3)
    for i, (image, _, _) in enumerate(open_pipeline(config_of(), "train").look(8)):
        crop = drawn[18 : 18 + 96, 3 + i * (96 + 6) :][:, :96]
        np.testing.assert_array_equal(crop[::6, ::6], image)
        assert (drawn[18 + 96 :, i * (96 + 6) :][:, : 96 + 6] < 128).any()  # its class


def test_a_picture_that_cannot_be_written_is_no_failure(find, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    hold, found = find(config_of())
    assert hold
    assert found["picture"].startswith("not drawn: No space left on device")
    assert not list((tmp_path / "run").iterdir())


def test_a_segmentation_is_checked_and_its_crops_are_drawn_with_their_label_maps(find):
    config = test_segmentation.config_of(batch_size=8)
    own = {"student": test_segmentation.student, "teacher": test_segmentation.teacher}
    hold, found = find(config, **own)
    assert hold
    assert list(found) == [name.replace("top-1", "mIoU") for name in ITEMS]
    assert "11 classes" in found["training data"]
    assert Path("run/check.png").is_file()


def test_a_run_in_a_bucket_is_checked_without_a_picture():
    text, _ = inspection.draw_crops(open_pipeline(config_of(), "train"), None, Bucket("s3://bucket/runs/a"))
    assert text == "not drawn: s3://bucket/runs/a is in a bucket"


def test_what_is_passed_over_is_counted_and_named(folder):
    config = image_folder(folder)
    (Path(config.data.root) / "train/3/a.gif").touch()
    (Path(config.data.root) / "val/3/link.jpg").symlink_to("nowhere")
    found = {split: sample.open_data(config, split)[0].splitlines() for split in ("train", "val")}
    (note,) = found["train"][1:]
    assert note.startswith("NOTE: train: passed over 1 .gif; read are ")
    (note,) = found["val"][1:]
    assert note == f"NOTE: val: passed over links that lead nowhere (1): {config.data.root}/val/3/link.jpg"


def test_an_unreadable_image_that_is_skipped_is_named_and_no_failure(find, folder):
    config = image_folder(folder)
    config.data.skip_broken = True
    hold, found = find(config)
    assert hold
    assert found["training sample"].endswith(
        f"\nskipped, for it is no image: {config.data.root}/train/3/0.jpg"
    )
    assert "on 8 images (2 unreadable skipped)" in found["teacher's top-1"]


def test_taps_that_do_not_fit_are_named(find, tmp_path):
    config = config_of(student=narrow("random"))
    config.data.processes = 2
    before = children()
    hold, found = find(config, student=None)
    assert not hold
    assert failed(found) == ["task"]
    assert "tat_layer2: the taps differ in positions" in found["task"]
    assert left_out(found) == ["taps", "first look", "memory", "loss at step 0", "time"]
    reading = r"[\d,]+ images/s with data.processes=2 of data.threads=1 each, in at most [\d.]+ MiB of memory"
    assert re.fullmatch(reading, found["reading"].strip())
    assert children() <= before


def test_a_teacher_of_other_classes_is_named(find, tmp_path):
    config = config_of(teacher=save_resnet(tmp_path / "teacher", classes=5))
    hold, found = find(config, teacher=None)
    assert not hold
    assert found["teacher's top-1"] == "left out: it knows 5 classes, the data 10"
    assert failed(found) == ["task"]
    assert "knows 5 classes, the data 10; kd compares its logits" in found["task"]


def test_a_teacher_whose_head_nobody_trained_is_not_measured(find, tmp_path):
    _, found = find(config_of(teacher=narrow("random")), teacher=None)
    assert "head random" in found["teacher"]
    assert found["teacher's top-1"] == "left out: its weights are random"
    config = config_of(teacher=save_resnet(tmp_path / "teacher", classes=10, head="fresh"))
    _, found = find(config, teacher=None)
    assert found["teacher's top-1"] == "left out: its head is not trained"
    assert "has no trained head, and kd compares its logits" in found["task"]


class Mute(Tiny):
    """A teacher that has taps and no logits."""

    def __call__(self, images, *, train=False, where=None):
        super().__call__(images, train=train, where=where)


def test_a_teacher_without_logits_may_be_compared_at_its_taps(find):
    teacher = Mute(8, classes=10, rngs=nnx.Rngs(1))
    hold, found = find(config_of(losses={"kd": {"weight": 0.0}}), teacher=teacher)
    assert hold
    assert found["teacher's top-1"] == "left out: it gives no logits"


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_weights_that_are_no_numbers_are_named(find, tmp_path, network):
    def poison(weights):
        return weights | {"fc.bias": weights["fc.bias"].at[3].set(jnp.nan)}

    config = config_of(**{network: save_resnet(tmp_path / "made", classes=10, change=poison)})
    hold, found = find(config, **{network: None})
    assert not hold
    assert failed(found) == [network]
    assert found[network].endswith(
        "made holds weights that are not finite; convert or train it anew: fc.bias"
    )


class Knowing(nnx.Module):
    """A teacher that knows the digits of the sample, each one's class or the one so many after it."""

    def __init__(self, after):
        sample, config = Sample(Digits("val")), config_of()
        data = Pipeline(
            sample, Classification(), config.data, batch_size=len(sample), train=False, seed=0, threads=0
        )
        (batch,) = data.epoch(0)
        self.images = nnx.Variable(jnp.asarray(normalize(batch.image)))
        self.labels = nnx.Variable(jnp.asarray(batch.label + after) % 10)

    def __call__(self, images, *, train=False, where=None):
        distances = jnp.abs(images[:, None] - self.images.get_value()[None]).sum((2, 3, 4))
        return jax.nn.one_hot(self.labels.get_value()[distances.argmin(1)], 10)


@pytest.mark.parametrize(("after", "accuracy"), [(0, "top-1 100.00%"), (1, "top-1 0.00%")])
def test_a_teacher_at_chance_is_remarked(find, after, accuracy):
    config = config_of(batch_size=12)  # no multiple of the devices, so that nothing is compiled
    _, found = find(config, teacher=Knowing(after))
    assert found["teacher's top-1"].startswith(accuracy)
    assert ("NOTE" in found["teacher's top-1"]) == bool(after)


class Steep(Tiny):
    """A student whose gradient is no number where its logits are."""

    def __call__(self, images, *, train=False, where=None):
        logits = super().__call__(images, train=train, where=where)
        return logits + jnp.sqrt(0 * logits)


class Lost(Tiny):
    """A student whose logits are no numbers."""

    def __call__(self, images, *, train=False, where=None):
        return super().__call__(images, train=train, where=where) * jnp.nan


@pytest.mark.parametrize(
    ("student", "terms"),
    [(Steep, "gradient_norm"), (Lost, "cross_entropy, gradient_norm, kd, loss")],
)
def test_a_first_step_that_is_no_number_is_named_by_its_terms(find, student, terms):
    hold, found = find(config_of(), student=student(4, classes=10, rngs=nnx.Rngs(0)))
    assert not hold
    assert failed(found) == ["loss at step 0"]
    assert f"not finite: {terms}; " in found["loss at step 0"]
    assert "0.25·tat_layer2 = 0.25 · " in found["loss at step 0"]
    assert left_out(found) == ["time"]


def test_a_batch_that_the_devices_cannot_share_is_named(find):
    hold, found = find(config_of(batch_size=12))
    assert not hold
    assert failed(found) == ["devices"]
    assert "batch_size=12 is not a multiple of the 8 devices" in found["devices"]
    assert left_out(found) == ["first look", "memory", "loss at step 0", "time"]
    assert found["task"].startswith("0.5·cross_entropy + 0.5·kd + 0.25·tat_layer2; adamw trains ")


def test_a_wrong_field_is_named(find):
    config = config_of()
    config.optimizer.learning_rate = -1.0
    hold, found = find(config)
    assert not hold
    assert failed(found) == ["config"]
    assert "optimizer.learning_rate=-1.0: allowed is a number greater than 0" in found["config"]
    assert found["task"] == "left out: needs config"
    assert "images/s with data.threads=1" in found["reading"]


def test_a_loss_that_is_none_is_named(find):
    weightless = {name: {"weight": 0.0} for name in ("cross_entropy", "kd")} | {
        "tat": {"layer2": {"weight": 0.0}}
    }
    _, found = find(config_of(losses=weightless))
    assert failed(found) == ["config", "teacher"]
    assert "every loss has weight 0" in found["config"]
    _, found = find(config_of(), losses={"kd": (1.0, len)})
    assert "a loss of your own cannot be called 'kd'" in found["config"]


def test_a_task_that_there_is_not_is_named(find):
    hold, found = find(config_of(task="juggling"))
    assert not hold
    assert failed(found) == ["config", "training data", "validation data"]
    assert "task='juggling': allowed is 'classification'" in found["config"]


def mine(student, teacher, batch):
    """Compare the logits by a loss of one's own."""
    return jnp.abs(student.logits - teacher.logits).mean(1)


def test_a_loss_of_one_s_own_is_shown_with_the_others_and_a_schedule_by_its_weight_at_step_0(find):
    hold, found = find(config_of(), losses={"mine": (linear(0.0, 0.5, end=1), mine)})
    assert hold
    assert " + (0…0.5)·mine; adamw trains " in found["task"]
    assert re.search(r"^0·mine = 0 · [0-9.]+, 0\.0% of the loss$", found["loss at step 0"], re.MULTILINE)


def test_a_loss_that_begins_with_nothing_holds(find):
    config = config_of()
    config.losses = {"cross_entropy": base.loss("cross_entropy", weight=linear(0.0, 1.0, end=1))}
    hold, found = find(config)
    assert hold
    assert found["loss at step 0"].startswith("0, gradient norm 0\n0·cross_entropy = 0 · ")


def test_less_memory_than_the_step_needs_is_named(find, monkeypatch):
    device = SimpleNamespace(platform="cpu", memory_stats=lambda: {"bytes_limit": 1000})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    hold, found = find(config_of())
    assert not hold
    assert failed(found) == ["memory"]
    assert "it has 0 MiB: lower batch_size, set dtype=bfloat16 or take more devices" in found["memory"]


def test_reading_that_is_slower_than_the_steps_sets_the_pace(find, monkeypatch):
    epoch = Pipeline.epoch

    def slow(self, index, start_step=0):
        time.sleep(2 if self.steps_per_epoch == 2 else 0)
        return epoch(self, index, start_step)

    monkeypatch.setattr(Pipeline, "epoch", slow)
    config = config_of(epochs=3600 * 50)
    hold, found = find(config)
    assert hold
    days = re.search(
        r"reading is slower and sets the pace: 360,000 steps in about (\d+) days ", found["time"]
    )
    assert int(days[1]) >= 8  # two seconds a batch


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99, "99 s"), (150, "2 min"), (5_900, "98 min"), (7_300, "2 h"), (200_000, "2 days 8 h")],
)
def test_a_duration_is_readable(seconds, words):
    assert quantities.duration(seconds) == words


def test_a_large_batch_is_looked_at_in_small_first(find):
    hold, found = find(config_of(batch_size=64))
    assert hold
    assert re.fullmatch(r"16 images: loss [0-9.]+, 0 s; 64 would take about 0 s", found["first look"])
    assert found["loss at step 0"].count(" images alone") == 0
    _, found = find(config_of())
    assert found["first look"] == "left out: a batch is as small"


def test_a_step_that_would_take_too_long_is_reckoned_from_the_first_look(find, monkeypatch):
    monkeypatch.setattr(trial, "_LIMIT", 0.0)
    hold, found = find(config_of(batch_size=64))
    assert hold
    loss = re.search(r"loss ([0-9.]+), ", found["first look"])[1]
    assert found["loss at step 0"].startswith(f"{loss}, gradient norm ")
    assert ", of 16 images alone, as a step of all takes long\n" in found["loss at step 0"]
    assert re.search(r"\d+ ms a step, .* 1 steps in about ", found["time"])


def test_an_item_that_takes_long_gives_signs_of_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(items, "_BEAT", 0.05)
    assert check.run(config_of(), tmp_path / "run", student=tiny(4), teacher=tiny(8))
    assert re.search(r"^memory … 0 s$", capsys.readouterr().err, re.MULTILINE)


def test_every_training_of_a_study_is_checked_under_a_random_teacher(tmp_path, capsys):
    config = config_of(teacher=narrow("weights/not_yet_trained"))
    config.losses = {"cross_entropy": base.loss("cross_entropy", weight=1.0), "kd": base.loss("kd")}
    config.study = {
        "seeds": (0,),
        "teacher": {"batch_size": 12},  # no multiple of the devices
        "students": {
            "alone": {"optimizer": {"learning_rate": -1.0}},
            "kd": {"losses": {"kd": {"weight": 0.5}}},
        },
    }
    assert not check.run(config, tmp_path / "run", student=tiny(4))
    _, *parts = re.split(r"study, (.*):\n", capsys.readouterr().out)
    trainings = dict(zip(parts[::2], map(findings, parts[1::2]), strict=True))
    assert list(trainings) == ["teacher", "alone", "kd"]
    assert [failed(found) for found in trainings.values()] == [["devices"], ["config"], []]
    assert all("folder" not in found for found in trainings.values())
    assert trainings["teacher"]["task"].startswith("1·cross_entropy; ")
    assert trainings["kd"]["task"].startswith("1·cross_entropy + 0.5·kd; ")
    assert trainings["kd"]["teacher"].startswith("resnet18 from random weights")


def test_a_folder_says_what_would_continue_and_one_of_another_run_fails(tmp_path, capsys):
    def networks():
        return {"student": tiny(4), "teacher": tiny(8)}

    train.run(config_of(), tmp_path, **networks())
    assert check.run(config_of(epochs=2), tmp_path, **networks())
    found = findings(capsys.readouterr().out)["folder"]
    assert re.search(r"continues from step 2; .* free\nchanged: epochs: 1 there, 2 now$", found)
    assert not check.run(config_of(batch_size=8), tmp_path, **networks())
    found = findings(capsys.readouterr().out)
    assert failed(found) == ["folder"]
    assert "batch_size: 16 there, 8 now" in found["folder"]


@pytest.mark.parametrize(
    ("config", "code", "last"),
    [
        ("r18_r34_ce.py:smoke", 0, "all hold"),
        ("r18_r34.py", 1, "4 FAILED: training data, validation data, student, teacher"),
    ],
)
def test_the_exit_code_says_whether_all_holds_and_a_picture_is_all_that_is_written(
    tmp_path, config, code, last
):
    arguments = ["--mode=check", f"--config={MAIN.parent}/configs/{config}", "--workdir=run"]
    process = subprocess.run(
        [sys.executable, MAIN, *arguments],
        cwd=tmp_path,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == code, process.stderr
    found = findings(process.stdout)
    assert list(found) == ITEMS
    assert found["check"] == last
    assert list(tmp_path.rglob("*.*")) == ([] if code else [tmp_path / "run" / "check.png"])
