"""The ready study of CIFAR-100: every pair and method, shared teachers, controls, published figures."""

import pytest

from tat_jax import experiment, variants
from tat_jax.configs import cifar100, compare_cifar100


def trainings(argument, folder):
    config = compare_cifar100.get_config(argument)
    variants.check(config)
    return config, variants.teachers_of(config), variants.students_of(config, folder)


def test_every_method_of_a_pair_is_a_training_under_its_own_teacher(tmp_path):
    _, teachers, students = trainings("vgg13-cifar_mobilenet_v2,vgg13-vgg8,resnet56-resnet20", tmp_path)
    for training in (*teachers.values(), *(first for first, *_ in students.values())):
        experiment.check(training)
    assert set(teachers) == {"vgg13", "resnet56"}
    assert len(students) == 3 * (len(cifar100.METHODS) + 1)
    (first, *_) = students["vgg13-cifar_mobilenet_v2, dkd"]
    assert first.teacher.weights == str(tmp_path / "vgg13")
    assert (first.student.architecture, first.optimizer.learning_rate) == ("cifar_mobilenet_v2", 0.01)
    assert teachers["vgg13"].optimizer.learning_rate == 0.05


def test_the_control_of_a_method_is_its_student_alone(tmp_path):
    config, _, students = trainings("vgg13-vgg8,wrn_40_2-wrn_16_2,kd", tmp_path)
    assert variants.controls(config, students) == {
        "vgg8, alone": "vgg8, alone",
        "vgg13-vgg8, kd": "vgg8, alone",
        "wrn_16_2, alone": "wrn_16_2, alone",
        "wrn_40_2-wrn_16_2, kd": "wrn_16_2, alone",
    }


def test_published_figures_are_named_with_their_epoch_and_only_where_there_are_any():
    published = compare_cifar100.get_config("resnet32x4-shufflenet_v2,ickd,crd,dkd").study.published.to_dict()
    assert published == {
        "alone": {"value": 71.82, "epoch": "last"},
        "crd": {"value": 75.65, "epoch": "last"},
        "dkd": {"value": 77.07, "epoch": "best"},
    }


def test_the_short_study_has_at_least_ten_methods_three_seeds_and_a_longer_teacher(tmp_path):
    config, teachers, students = trainings("short", tmp_path)
    assert len(students) > 10
    assert {len(seeds) for seeds in students.values()} == {3}
    assert teachers["resnet20"].epochs == 3 * config.epochs
    assert not config.study.published


def test_one_of_another_name_is_refused():
    with pytest.raises(ValueError, match="no method 'kdd'"):
        compare_cifar100.get_config("vgg13-vgg8,kdd")
    with pytest.raises(ValueError, match="no pair 'vgg13-vgg9'"):
        compare_cifar100.get_config("vgg13-vgg9,kd")
