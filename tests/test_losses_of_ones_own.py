"""A loss that somebody brings along is trained, logged, drawn and continued like the package's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tat_jax import pictures, train
from tat_jax.losses import Loss
from tat_jax.metrics import read_rows
from tat_jax.schedules import linear
from tat_jax.weights import folders, store
from tests.test_train import config_of
from tests.tiny import Tiny

pytestmark = pytest.mark.usefixtures("unchecked")


class Regression(Loss):
    """The squared error of the teacher's second tap, predicted from the student's by a linear layer."""

    def __init__(self, student_features, teacher_features, *, rngs):
        self.predict = nnx.Linear(student_features, teacher_features, rngs=rngs)

    def __call__(self, student, teacher, batch, *, train):
        error = self.predict(student.taps["layer2"]) - teacher.taps["layer2"]
        return (error**2).mean((1, 2, 3))


def run(config, folder, weight=0.1, **losses):
    """Train under a tiny teacher with a regression of one's own."""
    losses = losses or {"mine": (weight, Regression(8, 16, rngs=nnx.Rngs(2)))}
    student = Tiny(4, classes=10, bn_group=config.bn_group, rngs=nnx.Rngs(0))
    teacher = Tiny(8, classes=10, rngs=nnx.Rngs(1))
    return train.run(config, folder, student=student, teacher=teacher, losses=losses)


def trained(folder):
    """Return what the last checkpoint holds besides the student."""
    return store.load_item(folders.last(folder) / "training")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of two epochs."""
    folder = tmp_path_factory.mktemp("whole")
    run(config_of(), folder)
    return folder


def test_its_value_is_logged_and_its_parameters_are_trained(whole):
    rows = [row for row in read_rows(whole) if "train/loss" in row]
    assert len(rows) == 6
    for row in rows:
        terms = 0.5 * row["train/cross_entropy"] + 0.5 * row["train/kd"]
        terms += 0.5 * row["train/tat_layer2"] + 0.1 * row["train/mine"]
        assert row["train/loss"] == pytest.approx(terms, rel=1e-5)
    start = Regression(8, 16, rngs=nnx.Rngs(2)).predict.kernel.get_value()
    kernel = trained(whole)["embeddings"]["losses.mine.predict.kernel"]
    assert not np.allclose(kernel, start)


def test_it_is_drawn_with_the_others(whole, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "plot_run", lambda rows, path, terms, task: drawn.append(terms))
    run(config_of(), whole)  # is finished, and only drawn again
    assert drawn == [["cross_entropy", "kd", "tat_layer2", "mine"]]


def test_a_run_with_it_continues_to_the_same_end(whole, tmp_path):
    run(config_of(epochs=1), tmp_path)
    run(config_of(), tmp_path)
    for ours, expected in zip(
        jax.tree.leaves(trained(tmp_path)), jax.tree.leaves(trained(whole)), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_its_weight_may_be_a_schedule(tmp_path):
    run(config_of(log_every=3), tmp_path, weight=linear(0.0, 0.5, end=1))
    rows = [row for row in read_rows(tmp_path) if "train/loss" in row]
    assert [row["train/mine_weight"] for row in rows] == [0.0, 0.5]


def test_a_function_will_do(tmp_path):
    def mine(student, teacher, batch):
        return jnp.abs(student.logits - teacher.logits).mean(1)

    run(config_of(epochs=1), tmp_path, mine=(0.1, mine))
    assert all(row["train/mine"] > 0 for row in read_rows(tmp_path) if "train/loss" in row)


def test_one_of_weight_0_is_no_term(tmp_path):
    run(config_of(epochs=1), tmp_path, mine=(0, Regression(8, 16, rngs=nnx.Rngs(2))))
    assert not any("train/mine" in row for row in read_rows(tmp_path))


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"kd": (1.0, len)}, "cannot be called 'kd'"),
        ({"no word": (1.0, len)}, "cannot be called 'no word'"),
        ({"mine": (-1.0, len)}, "the weight of the loss mine is -1.0"),
    ],
)
def test_a_name_or_a_weight_that_is_not_allowed_is_named(losses, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(config_of(), tmp_path, **losses)
