"""A study: trainings in the order of the config, a table that is kept, a teacher trained or given."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tat_jax import evaluate, experiment, run_folder, study, train
from tat_jax.configs import base, compare, digits
from tat_jax.metrics import read_rows

KD = {"losses": {"cross_entropy": {"weight": 0.5}, "kd": {"weight": 0.5}}}
TEACHER = {"student": {"width": 2}}


def config_of(students, *, teacher=TEACHER, seeds=(0,)):
    """Return a study of narrow networks on twenty digits, two steps an epoch."""
    config = digits.get_config("smoke")
    config.student.width = config.teacher.width = 2
    config.data.update({"image_size": 8, "eval_resize": 8, "labels_per_class": 2})
    config.study = base.study(seeds, students, teacher)
    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Return the config, the folder and the table of a study of two ways and two seeds."""
    folder = tmp_path_factory.mktemp("study")
    config = config_of({"kd": KD, "alone": {}}, seeds=(0, 1))
    return config, folder, study.run(config, folder)


def last(folder):
    return read_rows(folder)[-1]["eval/top1"]


def test_the_table_is_that_of_the_runs_in_the_order_of_the_config_and_is_kept(done):
    _, folder, table = done
    title, teacher, *students = table.strip("\n").splitlines()
    assert title.split() == ["validation", "top-1,", "%", "(mean", "±", "standard", "deviation)"]
    assert teacher.split() == ["teacher", f"{100 * last(folder / 'teacher'):.2f}"]
    for line, name in zip(students, ("kd", "alone"), strict=True):
        seeds = [100 * last(folder / name / f"seed{seed}") for seed in (0, 1)]
        mean = f"{np.mean(seeds):.2f} ± {np.std(seeds, ddof=1):.2f}"
        assert line.split("(")[0].split() == [name, *mean.split()]
        assert line.endswith(f"({seeds[0]:.2f}, {seeds[1]:.2f})")
    assert (folder / "table.txt").read_text() == table.strip("\n") + "\n"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_student_may_say_a_field_that_was_replaced(tmp_path):
    config = config_of({"tat": {"losses": {"tat": {"layer4": {"per_teacher_position": True}}}}})
    (student,) = study.students_of(config, tmp_path)["tat"]
    assert student.losses.tat.layer4.asks == "teacher"


def test_a_student_s_network_evaluates_to_what_the_table_says(done):
    config, folder, _ = done
    evaluation = evaluate.run(study.config_of_training(config), folder / "kd" / "seed0", "last")
    assert (evaluation.measures["top1"], evaluation.images) == (last(folder / "kd" / "seed0"), 797)


def test_a_study_s_folder_is_answered_with_its_runs(done):
    config, folder, _ = done
    message = r"holds several runs; name one of them: .*alone/seed0, .*/kd/seed1, .*/teacher"
    with pytest.raises(FileNotFoundError, match=message):
        evaluate.run(study.config_of_training(config), folder, "best")


def test_a_study_that_is_done_is_not_done_again(done, capsys):
    config, folder, table = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoints/*")}
    assert study.run(config, folder) == table
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoints/*")} == before
    said = capsys.readouterr().out
    assert said.count("is finished, all 2 steps of it") == 5
    assert "continues" not in said


def test_a_study_continues_by_the_config_in_its_folder(done):
    config, folder, _ = done
    kept = run_folder.read_config(folder, experiment.FIELDS)
    assert list(kept.study.students) == ["kd", "alone"]
    assert json.loads(kept.to_json()) == json.loads(config.to_json())


def test_a_study_and_a_run_do_not_go_into_each_other_s_folder(done):
    config, folder, _ = done
    with pytest.raises(ValueError, match=r"teacher holds a run, and a study goes into a folder of its own"):
        study.run(config, folder / "teacher")
    with pytest.raises(ValueError, match=r"holds a run of another config; choose another --workdir"):
        train.run(study.config_of_training(config), folder)


def test_students_of_another_teacher_are_not_mixed_with_those_of_before(done):
    config, folder, _ = done
    other = config_of({"kd": KD, "alone": {}}, teacher=TEACHER | {"seed": 1}, seeds=(0, 1))
    with pytest.raises(ValueError, match=r"study, teacher: .* holds a run of another config"):
        study.run(other, folder)
    kept = run_folder.read_config(folder, experiment.FIELDS)
    assert json.loads(kept.to_json()) == json.loads(config.to_json())
    (folder / "teacher").rename(folder / "before")
    message = r"study, kd/seed0: .*was trained under another teacher: the SHA-256"
    with pytest.raises(ValueError, match=message):
        study.run(other, folder)
    shutil.rmtree(folder / "teacher")
    (folder / "before").rename(folder / "teacher")


def test_a_teacher_that_exists_teaches_and_is_measured(done, tmp_path):
    _, folder, _ = done
    given = config_of({"kd": KD}, teacher=None)
    given.teacher.weights = str(folder / "teacher")
    teacher, student = study.run(given, tmp_path).strip("\n").splitlines()[1:]
    assert teacher.split() == ["teacher", f"{100 * last(folder / 'teacher'):.2f}"]
    assert f"{100 * last(folder / 'kd' / 'seed0'):6.2f}" in student  # the same training as there


def test_a_study_of_students_that_need_no_teacher_has_none(done, tmp_path):
    _, folder, _ = done
    config = config_of({"alone": {}}, teacher=None)
    config.teacher.weights = str(folder / "teacher")
    table = study.run(config, tmp_path)
    assert [line.split()[0] for line in table.strip("\n").splitlines()[1:]] == ["alone"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"seeds": ()}, r"study.seeds=\(\): allowed is one or more whole numbers from 0 on, each once"),
        ({"seeds": (1, 1)}, r"study.seeds=\(1, 1\): allowed"),
        ({"students": {}}, r"study.students=\{\}: allowed is by names"),
        ({"students": {"teacher": {}}}, r"study.students=.*: allowed is by names"),
        ({"students": {"a/b": {}}}, r"study.students=.*: allowed is by names"),
        ({"studens": {}}, "study.studens is no field; did you mean study.students?"),
        ({"students": {"kd": {"seed": 3}}}, "study, kd: its seed does nothing, study.seeds are"),
        (
            {"students": {"kd": {"teacher": {"weights": "runs/other"}}}},
            "study, kd: its teacher.weights do nothing, as study.teacher is trained",
        ),
    ],
)
def test_what_a_study_may_not_say_is_named(tmp_path, said, message):
    config = config_of({"alone": {}})
    config.study = {**config.study.to_dict(), **said}
    with pytest.raises(ValueError, match=message):
        study.run(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("students", "teacher", "message"),
    [
        (
            {"alone": {}, "kd": {"losses": {"kd": {"temperature": -1.0}}}},
            TEACHER,
            "study, kd/seed0: in the config, ",
        ),
        (
            {"kd": {"optimiser": {"lr": 1}}},
            TEACHER,
            "study, kd/seed0: .*optimiser is no field; did you mean optimizer",
        ),
        (
            {"alone": {"teacher": 3}},
            TEACHER,
            "study, alone: of {'teacher': 3}, a value stands where a config has",
        ),
        ({"alone": {}}, {"losses": "kd"}, "study, teacher: of {'losses': 'kd'}, a value stands where"),
        ({"alone": {}}, {"epochs": "many"}, "study, teacher: .*epochs='many': allowed is a whole number"),
    ],
)
def test_every_training_is_checked_before_the_first_one_begins(tmp_path, students, teacher, message):
    with pytest.raises(ValueError, match=message):
        study.run(config_of(students, teacher=teacher), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_on_a_small_folder_fine_tunes_with_one_recipe():
    config = compare.get_config()
    assert study.teacher_of(config).student.architecture == "resnet34"
    students = study.students_of(config, Path("runs/compare"))
    assert list(students) == ["cross-entropy", "kd", "tat", "kd and tat"]
    (both, _) = students["kd and tat"]
    assert (both.losses.kd.weight, both.losses.tat.layer4.weight) == (1.0, 0.2)
    assert both.teacher.weights == "runs/compare/teacher"
    json.loads(both.to_json())


def test_a_run_whose_log_was_removed_is_evaluated_again(done):
    config, folder, _ = done
    teacher = folder / "teacher"
    measured = last(teacher)
    (teacher / "metrics.jsonl").unlink()
    assert train.run(study.teacher_of(config), teacher)["last"]["eval/top1"] == measured
