"""A run goes on with the classes and the teacher with which it began; classes are compared where known."""

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from tat_jax import check, evaluate, provenance, sharding, summary, train
from tat_jax.build import build
from tat_jax.configs import base
from tat_jax.export import export
from tat_jax.networks import Network, own
from tat_jax.usage import other_classes
from tat_jax.weights import store
from tests.images import encode, photograph
from tests.tiny import Tiny

pytestmark = pytest.mark.usefixtures("unchecked")

NOW = {"classes": ["cat", "dog"], "teacher": "1" * 64, "versions": {"jax": "2"}}


def changes(folder="runs/mine", **before):
    return provenance.changes({**NOW, **before}, NOW, folder)


def test_what_did_not_change_is_not_told():
    assert changes() == []


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (["a_dog", "cat"], "label 0 was 'a_dog', it is 'cat' now"),
        (["cat", "cow"], "label 1 was 'cow', it is 'dog' now"),
        (["cat", "dog", "fox"], "3 there, 2 now"),
        (["cat"], "1 there, 2 now"),
    ],
)
def test_other_classes_are_refused_by_the_first_that_differs(classes, told):
    with pytest.raises(ValueError, match=rf"runs/mine was trained on other classes: {told}; .*--workdir"):
        changes(classes=classes)


def test_another_teacher_is_refused_by_the_digest_of_its_weights():
    message = r"under another teacher: the SHA-256 of its weights was 22222222…, it is 11111111… now"
    with pytest.raises(ValueError, match=message):
        changes(teacher="2" * 64)


def test_another_version_of_the_code_is_told():
    assert changes(versions={"jax": "1"}) == ["jax: 1 there, 2 now"]


def test_other_images_to_validate_are_told():
    now = {**NOW, "to_validate": 8}
    (line,) = provenance.changes({**NOW, "to_validate": 6}, now, "runs/mine")
    assert line == "images to validate: 6 there, 8 now, and `best` compares accuracies on both"
    assert provenance.changes(now, now, "runs/mine") == provenance.changes(NOW, now, "runs/mine") == []


@pytest.mark.parametrize(
    "before", [{}, {"classes": None, "teacher": None}, {"classes": NOW["classes"], "teacher": None}]
)
def test_what_was_not_remembered_hinders_nothing(before):
    assert provenance.changes(before, NOW, "runs/mine") == []


def test_the_teacher_is_known_by_its_arrays_alone():
    def known(change):
        state = nnx.state(Tiny(2, rngs=nnx.Rngs(0)), nnx.Param)
        state.fc.bias[...] = state.fc.bias[...] + jnp.float32(change)
        return store.digest(store.flatten(state))

    assert known(0) == known(0) != known(1e-7)


def network(**usage) -> Network:
    return own(Tiny(2, rngs=nnx.Rngs(0)), num_classes=5, seed=0)._replace(usage=usage)


@pytest.mark.parametrize(
    ("usage", "told"),
    [
        ({"num_classes": 2, "classes": ["cat", "dog"]}, ""),
        ({"num_classes": 2, "classes": None}, ""),
        ({}, ""),
        ({"num_classes": 3, "classes": ["cat", "dog", "fox"]}, "it knows 3 classes, the data 2"),
        ({"num_classes": 2, "classes": ["dog", "cat"]}, "its class 0 is 'dog', and that of the data 'cat'"),
    ],
)
def test_classes_are_compared_as_far_as_they_are_known(usage, told):
    assert other_classes(network(**usage), 2, ["cat", "dog"]) == told
    assert not other_classes(network(num_classes=2, classes=usage.get("classes")), 2, None)


def config_of(root, **changes):
    """Return a training of a step an epoch on a folder of images, compared with a teacher's logits."""
    config = base.base()
    config.update({"epochs": 1, "batch_size": 8, "log_every": 1})
    config.losses = {
        "cross_entropy": base.loss("cross_entropy", weight=0.5),
        "kd": base.loss("kd", weight=0.5),
    }
    config.data.update({"root": str(root), "image_size": 16, "threads": 0})
    config.update(changes)
    return config


def student(*, num_classes, rngs):
    return Tiny(4, classes=num_classes, rngs=rngs)


def train_under(teacher, root, **changes):
    return train.run(config_of(root, **changes), root / "run", student=student, teacher=teacher)


def teacher_of(seed):
    return Tiny(4, classes=3, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder of images of three classes that has a run of one epoch in it."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for i, name in enumerate(("cat", "dog", "fox")):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.jpg").write_bytes(encode(photograph(16, 16, seed=i)))
    train_under(teacher_of(0), root)
    return root


@pytest.fixture
def root(trained, tmp_path):
    """Return a copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "images"))


def rename(root, was, name):
    for split in ("train", "val"):
        (root / split / was).rename(root / split / name)


def test_a_run_does_not_go_on_where_a_class_has_another_label(root):
    rename(root, "dog", "a_dog")
    with pytest.raises(ValueError, match="trained on other classes: label 0 was 'cat', it is 'a_dog' now"):
        train_under(teacher_of(0), root, epochs=2)
    config = json.loads((root / "run" / "config.json").read_text())
    assert config["epochs"] == 1  # what is refused changes nothing


def test_a_run_does_not_go_on_under_another_teacher(root):
    with pytest.raises(ValueError, match="trained under another teacher"):
        train_under(teacher_of(1), root, epochs=2)
    train_under(teacher_of(0), root, epochs=2)


def test_a_check_finds_it_before(root, capsys):
    rename(root, "dog", "a_dog")
    networks = {"student": student, "teacher": teacher_of(0)}
    assert not check.run(config_of(root), root / "run", **networks)
    assert "FAILED" in capsys.readouterr().out.split("trained on other classes")[0].splitlines()[-1]


def test_an_evaluation_is_of_the_network_s_own_classes(root):
    def evaluated():
        return evaluate.run(config_of(root), root / "run", "last", student=student)

    assert evaluated().images == 3
    rename(root, "cat", "cow")
    with pytest.raises(
        ValueError, match="its class 0 is 'cat', and that of the data 'cow'; name data of its own"
    ):
        evaluated()
    shutil.copytree(root / "train" / "cow", root / "train" / "yak")
    with pytest.raises(ValueError, match="it knows 3 classes, the data 4; name data of its own"):
        evaluated()


def test_an_evaluation_at_another_size_than_the_network_was_trained_for_says_so(root, capsys):
    config = config_of(root)
    evaluate.run(config, root / "run", "last", student=student)
    assert "note" not in capsys.readouterr().err
    config.data.eval_resize = config.data.image_size + 4
    evaluate.run(config, root / "run", "last", student=student)
    said = r"note: .* was trained for shorter_side 18, centre 16; its images have shorter_side 20, centre 16 "
    assert re.search(said, capsys.readouterr().err)


def test_a_teacher_s_logits_are_compared_where_its_classes_are_the_data_s(trained):
    network = own(teacher_of(0), num_classes=3, seed=0)
    network = network._replace(usage={"num_classes": 3, "classes": ["ant", "bee", "cow"]})
    message = r"the teacher from .* is one of other classes: its class 0 is 'ant'.*; kd compares its logits"
    with pytest.raises(ValueError, match=message):
        build(
            config_of(trained),
            sharding.make_mesh(),
            num_classes=3,
            steps_per_epoch=1,
            classes=["cat", "dog", "fox"],
            student=student,
            teacher=network,
        )


def test_exports_of_a_run_share_what_is_said_of_its_use_and_no_other_s(root, tmp_path):
    export(root / "run", tmp_path / "s.safetensors", student=student)
    export(root / "run", tmp_path / "s.pth", student=student)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"other\.json exists already"):
        export(root / "run", tmp_path / "other.pth", student=student)
    assert not (tmp_path / "other.pth").exists()


def test_a_finished_run_keeps_the_config_that_it_was_trained_with(root):
    before = (root / "run" / "config.json").read_text()
    config = config_of(root)
    config.optimizer.learning_rate = 0.5
    train.run(config, root / "run", student=student, teacher=teacher_of(0))
    assert (root / "run" / "config.json").read_text() == before


def test_a_finished_run_keeps_what_is_asked_for(root):
    whole = {path.name for path in (root / "run" / "checkpoints" / "1").iterdir()}
    expected = evaluate.run(config_of(root), root / "run", "best", student=student)
    train_under(teacher_of(0), root, keep="networks")
    assert whole - {path.name for path in (root / "run" / "checkpoints" / "1").iterdir()} == {"training"}
    assert evaluate.run(config_of(root), root / "run", "best", student=student) == expected
    assert train_under(teacher_of(0), root, keep="networks")["last"]["eval/top1"] == expected.measures["top1"]
    with pytest.raises(
        ValueError, match=r"kept its networks alone .* cannot go on; choose another --workdir"
    ):
        train_under(teacher_of(0), root, keep="networks", epochs=2)


def kill(*_, **__):
    raise KeyboardInterrupt


def kill_while_writing(_, folder, **__):
    (folder / "metadata").write_text("{")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "kill"),
    [("orbax.checkpoint.JsonCheckpointHandler.save", kill_while_writing), ("shutil.rmtree", kill)],
)
def test_a_kill_while_the_training_is_dropped_damages_no_checkpoint(root, monkeypatch, where, kill):
    expected = evaluate.run(config_of(root), root / "run", "best", student=student)
    with monkeypatch.context() as patch:
        patch.setattr(where, kill)
        with pytest.raises(KeyboardInterrupt):
            train_under(teacher_of(0), root, keep="networks")
    assert evaluate.run(config_of(root), root / "run", "best", student=student) == expected
    train_under(teacher_of(0), root, keep="networks")
    assert not (root / "run" / "damaged").exists()
    assert not (root / "run" / "checkpoints" / "1" / "training").exists()


def test_what_changes_of_a_finished_run_is_said_to_have_trained_nothing(root, capsys):
    train_under(teacher_of(0), root, log_every=3)
    assert re.search(r"changed  log_every: .*\n +and nothing was trained with it\n", capsys.readouterr().out)
    train_under(teacher_of(0), root, epochs=2, log_every=3)
    said = capsys.readouterr().out
    assert "changed  log_every: " in said
    assert "nothing was trained" not in said


def test_batches_that_are_too_few_for_an_update_are_told():
    config = base.base()
    config.epochs, config.optimizer.accumulate = 5, 4
    (line,) = summary.left_over(config, 3)
    assert line.startswith("the last 3 of 15 batches train nothing, as they are fewer than the optimizer.acc")
    config.epochs = 4
    assert summary.left_over(config, 3) == []


def test_more_batches_an_update_than_there_are_would_train_nothing(trained):
    config = config_of(trained)
    config.optimizer.accumulate = 2
    with pytest.raises(
        ValueError, match=r"optimizer.accumulate=2 batches are more than the 1 of the training"
    ):
        train.run(config, trained / "new", student=student, teacher=teacher_of(0))


def test_float64_is_refused_where_jax_computes_in_float32(trained):
    with pytest.raises(ValueError, match=r"dtype='float64' needs JAX_ENABLE_X64=1 in the environment"):
        train_under(teacher_of(0), trained, dtype="float64")
