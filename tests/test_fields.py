"""Whatever a field of a config must not be is refused, with the field, the value and what is allowed."""

import functools
import math

import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tat_jax import evaluate, experiment, fields, study, train
from tat_jax.configs import (
    base,
    cifar100,
    compare,
    digits,
    finetune,
    imagenet_rivals,
    r18_r34,
    r18_r34_ce,
    r18_r34_kd,
    r18_r34_scratch,
    seg_coco_mobilenet,
    seg_coco_r18,
    seg_compare,
    seg_folder,
    seg_teacher,
    seg_voc_mobilenet,
    seg_voc_r18,
    supervised,
    unlabelled,
)
from tat_jax.losses import LOSSES, terms_of

TAPS = ("student_tap", "teacher_tap")
EXPERIMENTS = [cifar100, imagenet_rivals, r18_r34, r18_r34_kd, r18_r34_ce, r18_r34_scratch, supervised]
EXPERIMENTS += [seg_teacher, seg_coco_r18, seg_coco_mobilenet, seg_voc_r18, seg_voc_mobilenet, seg_folder]
NAMES = sorted(flatten_dict(base.base().to_dict(), sep="."))
TEXT = {"weights", "root", "sbd_root", "tfds_name", "student_tap", "teacher_tap"}
NONE = {"projected", "bn_group", "clip_norm", "labels_per_class", "image_size", "student_tap", "teacher_tap"}
NONE |= {"classes", "eval_resize", "grey_range", "processes", "sbd_root", "target_norm", "ema_decay"}
NONE |= {"mean", "std", "depth", "embed_dim", "position_grid", "stage_depth", "stem_width"}
NONE |= {"crop_padding"}
NOT_NONE = {"data.image_size", "probe.student_tap", "probe.teacher_tap"}
NOT_NONE |= {
    f"losses.{loss}.{tap}"
    for loss in ("catkd", "cc", "crd", "ickd", "pkt", "rkd", "simkd", "sp")
    for tap in TAPS
}
# Where 0 means something.
ZERO = {"seed", "steps_left_out", "checkpoint_minutes", "weight", "embedding_kernel", "weight_decay"}
ZERO |= {
    "ignore_label",
    "patch_weight",
    "anchor_weight",
    "momentum",
    "warmup_epochs",
    "minimum_rate",
    "threads",
    "processes",
    "mixup",
    "cutmix",
    "label_smoothing",
}


def last(name):
    return name.rsplit(".")[-1]


def changed(name, value):
    """Return a config with another value in a field, as a file of one's own could have it."""
    config = base.base().to_dict()
    *path, end = name.split(".")
    functools.reduce(dict.__getitem__, path, config)[end] = value
    return ConfigDict(config)


@pytest.mark.parametrize("module", EXPERIMENTS)
@pytest.mark.parametrize("argument", ["", "smoke"])
def test_every_config_passes(module, argument):
    experiment.check(module.get_config(argument))


def test_every_method_is_an_experiment_for_every_pair_and_every_network_learns_alone():
    for pair in cifar100.PAIRS.values():
        experiment.check(cifar100.get_config(pair.student))
        for method in cifar100.METHODS:
            config = cifar100.get_config(f"{pair.name},{method}")
            experiment.check(config)
            assert len(terms_of(config.losses)) == 2 - (method == "simkd")  # others beside cross-entropy
    for method in imagenet_rivals.METHODS:
        experiment.check(imagenet_rivals.get_config(f"{method},smoke"))
    with pytest.raises(ValueError, match="no method 'kdd'; there are kd, fitnet"):
        cifar100.get_config("resnet56-resnet20,kdd")
    with pytest.raises(ValueError, match="no pair 'resnet56-vgg8' of CIFAR-100; there are wrn_40_2-wrn_16_2"):
        cifar100.get_config("resnet56-vgg8,kd")


def test_every_field_of_the_base_is_declared_and_says_what_it_means():
    for name in NAMES:
        assert fields.find(experiment.FIELDS, name).meaning


def test_every_loss_can_be_switched_on_in_every_config():
    for module in EXPERIMENTS:
        for name, loss in LOSSES.items():
            config = module.get_config()
            entry = config.losses[name]
            tap = sorted(entry)[-1] if loss.compares_taps else None
            (entry[tap] if tap else entry).weight = 0.1
            experiment.check(config)
            switched_on = f"{name}_{tap}" if tap else name
            assert switched_on in [term.name for term in terms_of(config.losses)]


def _may_be(name, value):
    return (
        (last(name), value) in [("milestones", []), ("milestones", [1, 2, 3]), ("rates", [])]
        or (last(name) in ("mean", "std") and value == [1, 2, 3])
        or (last(name) in ("patches", "anchors") and value == (2, 1))
        or (last(name) in ("student_taps", "teacher_taps") and value == ("a", "b"))
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_no_field_may_be_is_refused_with_its_name_and_value(name):
    for value in (-1, -0.5, math.nan, math.inf, "", [], [1, 2, 3], ("a", "b"), (2, 1), 1j):
        if _may_be(name, value):
            experiment.check(changed(name, value))
            continue
        with pytest.raises(ValueError, match="allowed is") as error:
            experiment.check(changed(name, value))
        assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_zero_none_and_yes_are_taken_where_they_mean_something_only(name):
    taken = {
        0: last(name) in ZERO,
        None: (last(name) in NONE or name == "probe.source") and name not in NOT_NONE,
        "x": last(name) in TEXT,
        True: isinstance(flatten_dict(base.base().to_dict(), sep=".")[name], bool),
    }
    for value, accepted in taken.items():
        if accepted:
            experiment.check(changed(name, value))
        else:
            with pytest.raises(ValueError, match="allowed is"):
                experiment.check(changed(name, value))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("losses.kd.temprature", "losses.kd.temperature"),
        ("losses.tat.layer4.wieght", "losses.tat.layer4.weight"),
        ("losses.kdd", "losses.kd"),
    ],
)
def test_an_unknown_field_comes_with_the_one_that_may_be_meant(name, meant):
    with pytest.raises(ValueError, match=rf"{name} is no field; did you mean {meant}\?"):
        experiment.check(changed(name, 0.1))


def test_an_unknown_field_that_is_like_none_comes_with_those_there_are():
    with pytest.raises(ValueError, match=r"optimizer.lr is no field; optimizer has name, learning_rate, "):
        experiment.check(changed("optimizer.lr", 0.1))


@pytest.mark.parametrize("name", ["data.root", "student.weights", "teacher.weights"])
def test_images_and_weights_may_lie_in_a_bucket(name):
    experiment.check(changed(name, "gs://bucket/x"))
    experiment.check(changed(name, "s3://bucket/x"))


@pytest.mark.parametrize("name", ["data.root", "student.weights", "teacher.weights"])
@pytest.mark.parametrize("address", ["hdfs:/x", "file:///x", "gs:/x", "gs://", "az://x/y"])
def test_an_address_of_another_kind_is_no_folder(name, address):
    with pytest.raises(
        ValueError, match=f"{name}='{address}': allowed is a folder on a disk of this machine"
    ):
        experiment.check(changed(name, address))


def test_a_field_that_was_replaced_is_answered_with_the_one_now():
    with pytest.raises(ValueError, match=r"asks has replaced it, 'student' for False or 'teacher' for True"):
        experiment.check(changed("losses.tat.layer4.per_teacher_position", True))


def test_what_configs_of_before_say_of_a_replaced_field_is_taken_as_the_one_now():
    config = changed("losses.tat.layer4.per_teacher_position", True)
    config.losses.tat.layer3.per_teacher_position = False
    fields.renew(experiment.FIELDS, config)
    experiment.check(config)
    assert (config.losses.tat.layer4.asks, config.losses.tat.layer3.asks) == ("teacher", "student")


def test_a_missing_field_is_named():
    config = base.base()
    with config.unlocked():
        del config.data.flip
    with pytest.raises(ValueError, match=r"data.flip is missing"):
        experiment.check(config)


def test_a_value_in_the_place_of_several_fields_is_named():
    with pytest.raises(ValueError, match=r"optimizer='adamw': it has fields of its own, name, "):
        experiment.check(changed("optimizer", "adamw"))


def test_options_of_a_loss_that_are_not_said_are_its_defaults():
    config = base.base().to_dict()
    config["losses"] = {"tat": {"layer3": {"weight": 0.1}}}
    experiment.check(ConfigDict(config))


def test_nothing_is_written_before_every_run_of_a_study_has_been_checked(tmp_path):
    config = digits.get_config("smoke")
    config.study.students = {"kd": {"losses": {"kd": {"temperature": -1.0}}}}
    with pytest.raises(ValueError, match=r"losses.kd.temperature=-1.0: allowed is a number greater than 0"):
        study.run(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", [train.run, lambda config, folder: evaluate.run(config, folder, "best")])
def test_a_run_and_an_evaluation_check_first(tmp_path, run):
    with pytest.raises(ValueError, match=r"batch_size=0: allowed is a whole number from 1 on"):
        run(changed("batch_size", 0), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "beside", "read_where"),
    [
        ("data.labels_per_class", 5, "data.source is 'imagefolder'", "'digits'"),
        (
            "data.exif_orientation",
            True,
            "data.source is 'digits'",
            "'imagefolder' or 'images' or 'webdataset' or 'tfds' or 'voc' or 'cocostuff' or 'label_folder'",
        ),
        ("optimizer.momentum", 0.8, "optimizer.name is 'adamw'", "'sgd'"),
        ("optimizer.minimum_rate", 1e-5, "optimizer.schedule is 'multistep'", "'cosine'"),
        ("losses.kd.temperature", 4.0, "losses.kd.weight is 0.0", "other than 0"),
        ("losses.tat.layer4.heads", 2, "losses.tat.layer4.weight is 0.0", "other than 0"),
    ],
)
def test_a_field_that_nothing_reads_is_told_with_what_makes_it_read(name, value, beside, read_where):
    config = changed(name, value)
    if "'digits'" in beside:
        config.data.source = "digits"
    assert list(experiment.notes(config)) == [
        f"{name}={value!r} does nothing, as {beside}: it is read where that is {read_where}"
    ]


@pytest.mark.parametrize("module", [*EXPERIMENTS, digits, finetune, compare, seg_compare, unlabelled])
@pytest.mark.parametrize("argument", ["", "smoke"])
def test_no_config_sets_what_nothing_reads(module, argument):
    assert list(experiment.notes(module.get_config(argument))) == []
