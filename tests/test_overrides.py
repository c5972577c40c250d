"""`--config.FIELD=VALUE`: the field's rule says what is taken; all else is answered with a line."""

import re
from pathlib import Path

import pytest

from tat_jax import experiment, losses, overrides, variants
from tat_jax.configs import base, digits, r18_r34
from tat_jax.schedules import linear


def said(config, *arguments):
    others, of_config = overrides.split(arguments, experiment.FIELDS)
    assert others == []
    overrides.apply(config.lock(), of_config, experiment.FIELDS)
    return config


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--config.epochs=3"], "epochs", 3),
        (["--config.epochs", "3"], "epochs", 3),
        (["-config.epochs=3"], "epochs", 3),
        (["--config.epochs=3", "--config.epochs=4"], "epochs", 4),
        (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
        (["--config.optimizer.learning_rate=1e-3"], "optimizer.learning_rate", 1e-3),
        (["--config.optimizer.name=sgd"], "optimizer.name", "sgd"),
        (["--config.optimizer.name='sgd'"], "optimizer.name", "sgd"),
        (["--config.data.root=2024"], "data.root", "2024"),
        (["--config.data.root=a=b"], "data.root", "a=b"),
        (["--config.data.flip"], "data.flip", True),
        (["--noconfig.data.flip"], "data.flip", False),
        (["--config.data.flip=false"], "data.flip", False),
        (["--config.data.flip=1"], "data.flip", True),
        (["--config.optimizer.milestones=(1, 2)"], "optimizer.milestones", (1, 2)),
        (["--config.optimizer.milestones=1,2"], "optimizer.milestones", (1, 2)),
        (["--config.optimizer.milestones=[1,2]"], "optimizer.milestones", (1, 2)),
        (["--config.optimizer.milestones=5"], "optimizer.milestones", (5,)),
        (
            ["--config.optimizer.milestones=1", "--config.optimizer.milestones=2"],
            "optimizer.milestones",
            (1, 2),
        ),
        (["--config.losses.kd.weight=0.5"], "losses.kd.weight", 0.5),
        (["--config.losses.tat.layer3.weight=1"], "losses.tat.layer3.weight", 1.0),
    ],
)
def test_a_value_is_taken_in_every_way_it_can_be_said(arguments, name, value):
    config = said(r18_r34.get_config(), *arguments)
    for part in name.split("."):
        config = config[part]
    assert (config, type(config)) == (value, type(value))


@pytest.mark.parametrize(
    ("argument", "asks"),
    [
        ("--config.losses.tat.layer4.per_teacher_position", "teacher"),
        ("--config.losses.tat.layer4.per_teacher_position=true", "teacher"),
        ("--noconfig.losses.tat.layer4.per_teacher_position", "student"),
    ],
)
def test_a_field_that_was_replaced_may_be_said_as_before(argument, asks):
    assert said(r18_r34.get_config(), argument).losses.tat.layer4.asks == asks


def test_of_a_field_that_was_replaced_as_much_is_allowed_as_before():
    argument = "--config.losses.tat.layer4.per_teacher_position=yes"
    with pytest.raises(ValueError, match="per_teacher_position=yes: allowed is True or False"):
        said(r18_r34.get_config(), argument)


@pytest.mark.parametrize("nothing", ["None", "none"])
@pytest.mark.parametrize(
    "name", ["bn_group", "optimizer.clip_norm", "student.image_size", "data.labels_per_class"]
)
def test_a_field_that_may_be_none_is_unset(name, nothing):
    number = said(r18_r34.get_config(), f"--config.{name}=7")
    unset = said(number, f"--config.{name}={nothing}")
    experiment.check(unset)
    for part in name.split("."):
        unset = unset[part]
    assert unset is None


@pytest.mark.parametrize(
    ("argument", "allowed"),
    [
        ("epochs=ten", "a whole number from 1 on"),
        ("epochs=1.5", "a whole number from 1 on"),
        ("epochs=", "a whole number from 1 on"),
        ("epochs=None", "a whole number from 1 on"),
        ("epochs=True", "a whole number from 1 on"),
        ("bn_group=None.", "a whole number from 1 on, or None"),
        ("losses.kd.weight=None", "a number from 0 on, or a schedule"),
        ("student.weights=None", "a folder on a disk of this machine, or in a bucket, as gs://bucket/folder"),
        ("data.root=", "a folder on a disk"),
        ("data.root=gs:/bucket/images", "a folder on a disk of this machine, or in a bucket"),
        ("student.weights=s3:/bucket/run", "a folder on a disk of this machine, or in a bucket"),
        ("teacher.weights=hdfs:/run", "a folder on a disk of this machine, or in a bucket"),
        ("data.flip=maybe", "True or False"),
        ("optimizer.learning_rate=nan", "a number greater than 0"),
        ("optimizer.milestones=(1,2", "rising epochs, each a whole number from 1 on"),
        ("optimizer.milestones=(2,1)", "rising epochs, each a whole number from 1 on"),
        ("optimizer.name=adm", "'adamw' or 'sgd'"),
    ],
)
def test_what_a_field_may_not_be_is_answered_with_field_value_and_what_is_allowed(argument, allowed):
    with pytest.raises(ValueError, match=re.escape(f"--config.{argument}: allowed is {allowed}")) as error:
        said(r18_r34.get_config(), f"--config.{argument}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "answer"),
    [
        ("batch_sise=3", r"batch_sise is no field; did you mean batch_size\?"),
        ("losses.tat.layer4.wieght=3", r"did you mean losses.tat.layer4.weight\?"),
        ("learning_rate=3", r"learning_rate is no field; did you mean optimizer.learning_rate\?"),
        ("optimizer.lr=0.1", "optimizer.lr is no field; optimizer has .*learning_rate, .*name"),
        ("lr=0.1", "lr is no field; the config has .*task"),
        ("losses.tatt.layer4.weight=1", r"losses.tatt is no field; did you mean losses.tat\?"),
        ("losses.tat.block11.wieght=1", r"did you mean losses.tat.block11.weight\?"),
        ("losses.tat.block11=1", "losses.tat.block11=1: it has fields of its own, weight, student_tap"),
        ("losses.tat..weight=1", "is no field"),
        ("losses.tat.=1", "is no field"),
        ("student=resnet18", "student=resnet18: it has fields of its own, .*architecture, .*weights"),
        ("epochs.x=1", "epochs=100 has no fields of its own"),
        ("=1", "is no field"),
        ("optimizer.=1", "is no field"),
        ("epochs..x=1", "epochs=100 has no fields"),
    ],
)
def test_a_field_that_is_not_there_is_answered_with_those_that_are(argument, answer):
    with pytest.raises(ValueError, match=answer) as error:
        said(r18_r34.get_config(), f"--config.{argument}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [["--config.epochs"], ["--noconfig.epochs"]])
def test_a_value_that_is_missing_is_missed(arguments):
    with pytest.raises(ValueError, match=r"--config.epochs"):
        said(r18_r34.get_config(), *arguments)


def test_a_loss_takes_taps_that_the_config_does_not_list():
    config = said(
        r18_r34.get_config(),
        "--config.losses.tat.block11.weight=0.2",
        "--config.losses.tat.block11.asks=teacher",
        "--config.losses.tat.block11.scale=1/sqrt(d)",
        "--config.losses.resized.blocks.weight=1",
        "--config.losses.resized.blocks.teacher_tap=norm",
    )
    experiment.check(config)
    terms = {term.name: term for term in losses.terms_of(config.losses)}
    assert terms.keys() == {"cross_entropy", "tat_layer4", "tat_block11", "resized_blocks"}
    tat = {"student_tap": "block11", "teacher_tap": "block11", "asks": "teacher", "scale": "1/sqrt(d)"}
    assert terms["tat_block11"][1:] == (losses.LOSSES["tat"], 0.2, tat)
    assert terms["resized_blocks"].options == {"student_tap": "blocks", "teacher_tap": "norm"}


def test_a_config_may_lack_a_loss_and_an_option_that_the_command_line_sets():
    config = r18_r34.get_config()
    config.losses = {"tat": {"layer4": {"weight": 0.2}}}
    said(config, "--config.losses.kd.weight=1", "--config.losses.tat.layer4.heads=2")
    experiment.check(config)
    assert (config.losses.kd.to_dict(), config.losses.tat.layer4.heads) == ({"weight": 1.0}, 2)


def test_what_follows_two_dashes_says_nothing_of_the_config():
    arguments = ["main.py", "--workdir", "x", "--config=y", "--", "--config.epochs=3"]
    assert overrides.split(arguments, experiment.FIELDS) == (arguments, [])


def test_a_schedule_of_a_file_gives_way_to_a_number_and_a_field_of_a_study_is_read_like_what_it_was():
    config = digits.get_config()
    config.losses.kd = base.loss("kd", weight=linear(0.0, 0.5, end=20))
    said(
        config,
        "--config.losses.kd.weight=0.25",
        "--config.study.seeds=(4,5)",
        "--config.study.teacher.epochs=9",
    )
    assert (config.losses.kd.weight, config.study.seeds, config.study.teacher.epochs) == (0.25, (4, 5), 9)
    with pytest.raises(ValueError, match=r"study.teacher.epochs=ten: allowed is a value like 9"):
        said(config, "--config.study.teacher.epochs=ten")


def test_a_study_may_be_made_on_the_command_line_of_any_config():
    config = r18_r34.get_config("smoke").lock()
    said = [
        "--config.study.seeds=0,1,2",
        "--config.study.teachers.wide.student.width=16",
        "--config.study.students.tat.losses.tat.layer4.weight=0.2",
        "--config.study.students.kd and tat.losses.kd.weight=1",
        "--config.study.students.kd and tat.data.flip",
        "--config.study.control=tat",
        "--config.study.published.tat.value=70.5",
    ]
    arguments, found = overrides.split(said, variants.OVERRIDES)
    overrides.apply(config, found, variants.OVERRIDES)
    assert arguments == []
    assert list(config.study.students) == ["tat", "kd and tat"]
    students = variants.students_of(config, Path("runs"))
    (student, _, _), (both, _, last) = students.values()
    assert (student.losses.tat.layer4.weight, both.losses.kd.weight, last.seed) == (0.2, 1.0, 2)
    assert both.teacher.weights == "runs/wide"
    with pytest.raises(ValueError, match=r"study.students.tat.losses.tat.layer4.weight=much: allowed is a"):
        overrides.apply(config, [(found[2].name, "much")], variants.OVERRIDES)
    with pytest.raises(
        ValueError, match=r"study.students.tat.epoch is no field; did you mean study.students.tat.epochs"
    ):
        overrides.apply(config, [("study.students.tat.epoch", "3")], variants.OVERRIDES)
