"""Whatever a field of a config must not be is refused, with the field, the value and what is allowed."""

import functools
import math

import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import base, digits, r18_r34, r18_r34_ce, r18_r34_kd, r18_r34_scratch, supervised
from tat_jax import evaluate, fields, study, train

EXPERIMENTS = [r18_r34, r18_r34_kd, r18_r34_ce, r18_r34_scratch, supervised]
NAMES = sorted(flatten_dict(base.base().to_dict(), sep="."))
# Where 0 means something.
ZERO = {"seed", "steps_left_out", "checkpoint_minutes", "loss.alpha", "loss.beta", "optimizer.weight_decay"}
ZERO |= {"optimizer.momentum", "data.threads"}
ZERO |= {f"tat.layer{i}.{name}" for i in range(1, 5) for name in ("weight", "embedding_kernel")}
TEXT = {"student.weights", "teacher.weights", "data.root", "data.tfds_name"}
NONE = {"bn_group", "loss.beta", "optimizer.clip_norm", "data.labels_per_class"}


def changed(name, value):
    """Return a config with another value in a field, as a file of one's own could have it."""
    config = base.base().to_dict()
    *path, last = name.split(".")
    functools.reduce(dict.__getitem__, path, config)[last] = value
    return ConfigDict(config)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("argument", ["", "smoke"])
def test_every_config_passes(experiment, argument):
    fields.check(experiment.get_config(argument))


def test_every_field_has_a_rule():
    assert {fields._pattern(name) for name in NAMES} == set(fields.RULES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, "", [], [1, 2, 3], ("a", "b"), (2, 1), 1j])
def test_what_no_field_may_be_is_refused_with_its_name_and_value(name, value):
    if name == "optimizer.milestones" and value in ([], [1, 2, 3]):
        fields.check(changed(name, value))
        return
    with pytest.raises(ValueError, match="allowed is") as error:
        fields.check(changed(name, value))
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_zero_none_and_yes_are_taken_where_they_mean_something_only(name):
    taken = {
        0: name in ZERO,
        None: name in NONE,
        "x": name in TEXT,
        True: isinstance(flatten_dict(base.base().to_dict(), sep=".")[name], bool),
    }
    for value, accepted in taken.items():
        if accepted:
            fields.check(changed(name, value))
        else:
            with pytest.raises(ValueError, match="allowed is"):
                fields.check(changed(name, value))


def test_an_unknown_field_comes_with_the_one_that_may_be_meant():
    with pytest.raises(ValueError, match=r"optimizer.learning_rat is no field; did you mean optimizer.learn"):
        fields.check(changed("optimizer.learning_rat", 0.1))


def test_a_missing_field_is_named():
    config = base.base()
    with config.unlocked():
        del config.data.flip
    with pytest.raises(ValueError, match=r"data.flip is missing"):
        fields.check(config)


def test_nothing_is_written_before_every_run_of_a_study_has_been_checked(tmp_path):
    config = digits.get_config("smoke")
    config.study.students = {"kd": {"loss": {"temperature": -1.0}}}
    with pytest.raises(ValueError, match=r"loss.temperature=-1.0: allowed is a number greater than 0"):
        study.run(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", [train.run, lambda config, folder: evaluate.run(config, folder, "best")])
def test_a_run_and_an_evaluation_check_first(tmp_path, run):
    with pytest.raises(ValueError, match=r"batch_size=0: allowed is a whole number from 1 on"):
        run(changed("batch_size", 0), tmp_path)
    assert list(tmp_path.iterdir()) == []
