"""A study: trainings in the order of the config, a table that is kept, a teacher trained or given."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tat_jax import evaluate, experiment, run_folder, study, train, variants
from tat_jax.configs import base, compare, digits
from tat_jax.metrics import read_rows

pytestmark = pytest.mark.usefixtures("unchecked")

KD = {"losses": {"cross_entropy": {"weight": 0.5}, "kd": {"weight": 0.5}}}
TEACHER = {"student": {"architecture": "resnet8"}}


def config_of(students, *, teacher=TEACHER, seeds=(0,), **further):
    """Return a study of shallow networks on twenty digits, two steps an epoch."""
    config = digits.get_config("smoke")
    config.student, config.teacher = (base.network("resnet8", "random") for _ in range(2))
    config.data.update({"image_size": 8, "eval_resize": 8, "labels_per_class": 2})
    config.study = base.study(seeds, students, teacher, **further)
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
    (student,) = variants.students_of(config, tmp_path)["tat"]
    assert student.losses.tat.layer4.asks == "teacher"


def test_a_student_s_network_evaluates_to_what_the_table_says(done):
    config, folder, _ = done
    evaluation = evaluate.run(variants.config_of_training(config), folder / "kd" / "seed0", "last")
    assert (evaluation.measures["top1"], evaluation.images) == (last(folder / "kd" / "seed0"), 797)


def test_a_study_s_folder_is_answered_with_its_runs(done):
    config, folder, _ = done
    message = r"holds several runs; name one of them: .*alone/seed0, .*/kd/seed1, .*/teacher"
    with pytest.raises(FileNotFoundError, match=message):
        evaluate.run(variants.config_of_training(config), folder, "best")


def test_a_study_of_before_is_not_done_again_and_gets_what_was_not_written_then(done, capsys):
    config, folder, table = done
    costs = list(folder.rglob("costs.json"))
    tables = [*folder.glob("table.[mcj]*"), folder / "comparison.png"]
    assert (len(costs), len(tables)) == (5, 4)
    for path in (*costs, *tables):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoints/*")}
    assert study.run(config, folder) == table
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoints/*")} == before
    assert all(path.exists() for path in (*costs, *tables))
    kd = json.loads((folder / "table.json").read_text())["methods"][0]
    assert (kd["loss_parameters"], kd["step_memory"]) == (0, None)  # nothing was compiled for it
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
        train.run(variants.config_of_training(config), folder)


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


def test_each_of_several_teachers_is_trained_once_and_teaches_those_that_name_it(tmp_path, capsys):
    def under(teacher):
        return {**KD, "teacher": {"weights": teacher}}

    teachers = {"a": TEACHER, "b": {**TEACHER, "seed": 1}}
    students = {"kd of a": under("a"), "kd of b": under("b")}
    config = config_of(students, teacher=None, teachers=teachers, control="kd of b")
    table = study.run(config, tmp_path)
    assert [line[:8].strip() for line in table.strip("\n").splitlines()[1:]] == ["a", "b", *students]
    said = capsys.readouterr().out
    assert [said.count(f"{tmp_path / name}: starts") for name in ("a", "b")] == [1, 1]
    for name in "ab":
        kept = run_folder.read_config(tmp_path / f"kd of {name}" / "seed0", experiment.FIELDS)
        assert kept.teacher.weights == str(tmp_path / name)
    said = json.loads((tmp_path / "table.json").read_text())
    assert [method["control"] for method in said["methods"]] == ["kd of b", "kd of b"]
    kept = run_folder.read_config(tmp_path, experiment.FIELDS)
    assert list(kept.study.students) == list(students)
    assert json.loads(kept.to_json()) == json.loads(config.to_json())


def test_a_student_that_reads_one_of_several_teachers_says_which(tmp_path):
    config = config_of({"alone": {}, "kd": KD}, teacher=None, teachers={"a": TEACHER, "b": TEACHER})
    with pytest.raises(ValueError, match=r"study, kd/seed0: which of study.teachers teaches\? Name one"):
        study.run(config, tmp_path)
    assert list(tmp_path.iterdir()) == []
    config.teacher.weights = "b"
    students = variants.students_of(config, tmp_path)
    assert [of_seeds[0].teacher.weights for of_seeds in students.values()] == [str(tmp_path / "b")] * 2


def test_each_variant_is_compared_with_the_control_of_its_architecture():
    def controls(*names, **said):
        students = {name: {"student": {"architecture": name.split()[0]}} for name in names}
        config = config_of(students, **said)
        return list(variants.controls(config, variants.students_of(config, Path("x"))).values())

    names = ("resnet18 ce", "resnet34 ce", "resnet18 kd", "resnet34 kd")
    assert controls(*names) == ["resnet18 ce", "resnet34 ce"] * 2
    assert controls(*names, control="resnet18 kd") == ["resnet18 kd", "resnet34 ce"] * 2
    assert controls(*names, control=("resnet34 kd", "resnet18 kd")) == ["resnet18 kd", "resnet34 kd"] * 2


_WORKER = """
import sys
from tests.test_study import KD, config_of
from tat_jax import study
print(study.run(config_of({"kd": KD, "alone": {}}), sys.argv[1]))
"""
_HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_processes_share_a_study_and_end_with_one_table(done, tmp_path, capfd):
    here = Path(__file__).parent.parent
    command = [sys.executable, "-W", "error", "-c", _WORKER, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(here)}
    with subprocess.Popen(command, cwd=here, env=env, stdout=subprocess.PIPE, text=True) as other:
        table = study.run(config_of({"kd": KD, "alone": {}}), tmp_path)
        said, _ = other.communicate()
    assert other.returncode == 0
    assert table in said
    said += capfd.readouterr().out
    places = ("teacher", "kd/seed0", "alone/seed0")
    assert [said.count(f"{tmp_path / place}: starts") for place in places] == [1] * 3
    assert "continues" not in said
    assert [last(tmp_path / place) for place in places] == [last(done[1] / place) for place in places]


def test_a_run_of_another_process_is_passed_over_and_taken_up_when_that_is_killed(
    done, tmp_path, monkeypatch
):
    _, folder, _ = done
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    config = config_of({"kd": KD, "alone": {}})
    (tmp_path / "kd" / "seed0").mkdir(parents=True)
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "kd" / "seed0" / "lock")]
    asked, begun, seen = [], [], []
    look, begin = run_folder.is_busy, train.run

    def is_busy(place):
        asked.append(place)
        return look(place) and asked.count(place) != 2  # the second time, it is taken in between

    def begin_and_note(config, place):
        begun.append(str(place.relative_to(tmp_path)))
        return begin(config, place)

    def kill(seconds):
        seen.append(list(begun))
        holder.kill()
        holder.wait()

    monkeypatch.setattr(run_folder, "is_busy", is_busy)
    monkeypatch.setattr(train, "run", begin_and_note)
    monkeypatch.setattr(study.time, "sleep", kill)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        study.run(config, tmp_path)
    assert seen == [["teacher", "alone/seed0", "kd/seed0"]]
    assert last(tmp_path / "kd" / "seed0") == last(folder / "kd" / "seed0")


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
        ({"teachers": {"a/b": {}}}, r"study.teachers=.*: allowed is by names without /"),
        ({"teachers": {"a": {}}}, "study.teacher is the only one: put it among study.teachers, by a name"),
        ({"control": "kd"}, "study.control: 'kd' is none of study.students"),
        ({"control": 3}, "study.control=3: allowed is the name of a student, or several names"),
        (
            {"published": {"alone": {"value": 70.0, "epoch": "first"}}},
            "study.published.alone.epoch='first'",
        ),
        (
            {"published": {"kd": {"value": 70.0, "epoch": "best"}}},
            "study.published: 'kd' is none of",
        ),
        ({"studens": {}}, "study.studens is no field; did you mean study.students?"),
        ({"students": {"kd": {"seed": 3}}}, "study, kd: its seed does nothing, study.seeds are"),
        (
            {"students": {"kd": {"teacher": {"weights": "runs/other"}}}},
            "study, kd: teacher.weights='runs/other' is none of the teachers that the study trains, teacher",
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
    assert variants.teachers_of(config)["teacher"].student.architecture == "resnet34"
    students = variants.students_of(config, Path("runs/compare"))
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
    assert train.run(variants.teachers_of(config)["teacher"], teacher)["last"]["eval/top1"] == measured
