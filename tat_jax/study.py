"""A teacher, its students in several variants, each over several seeds, and the table that compares them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tat_jax import buckets, evaluate, experiment, pictures, run_folder, train
from tat_jax.buckets import Bucket, Place
from tat_jax.build import all_terms, read_teacher
from tat_jax.fields import Field, Fields, Rule, renew, whole, wrong
from tat_jax.metrics import is_evaluation, last_and_best, read_rows
from tat_jax.tasks import task_of
from tat_jax.tasks.task import Task

_TEACHER = "teacher"  # its folder, and its line of the table


def _are_seeds(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and 0 < len(value) == len(set(value))
        and all(map(whole(0).holds, value))
    )


def _are_students(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(changes, Mapping) for changes in value.values())
        and not any("/" in name or name in (_TEACHER, ".", "..") for name in value)
    )


FIELDS: Fields = {
    "seeds": Field(
        (0,), Rule("one or more whole numbers from 0 on, each once", _are_seeds), "of each student"
    ),
    "teacher": Field(
        {},
        Rule("what differs from the rest of the config", lambda value: isinstance(value, Mapping)),
        "trained first; a study without takes the config's teacher.weights",
        optional=True,
    ),
    "students": Field(
        {},
        Rule(
            f"by names without / other than {_TEACHER}, what differs from the rest of the config",
            _are_students,
        ),
        "the variants",
    ),
}


def run(config: ConfigDict, folder: str | Place) -> str:
    """Train the teacher and every student of `config.study` below `folder`, and return the table.

    A student's measure is that after its last epoch, so that no run is chosen by the images that it is judged
    by; the teacher's is that of the weights that teach, the best ones of its run. Runs that are finished are
    not repeated; an interrupted one continues.

    Args:
        config: with `FIELDS` in its `study`.
        folder: holds `teacher/` and `<variant>/seed<n>/` afterwards, `config.json`, `table.txt` and
            `curves.png`.

    Raises:
        ValueError: a run cannot be made; it is named. Nothing is written before all configs are known to be
            right.
    """
    folder = folder_of(folder)
    check(config)
    teacher, students = teacher_of(config), students_of(config, folder)
    trainings = {folder / _TEACHER: teacher} if teacher else {}
    trainings |= {
        _place(folder, name, student): student for name, of_seeds in students.items() for student in of_seeds
    }
    for place, training in trainings.items():
        with _named(place.relative_to(folder)):
            experiment.check(training)
            run_folder.changes(training, place, experiment.FIELDS)
    _keep_config(config, folder)
    task = task_of(config)
    of_teacher = _measure_teacher(config, teacher, students, folder, task)
    rows = {}
    for name, of_seeds in students.items():
        rows[name] = [_train(student, folder, _place(folder, name, student)) for student in of_seeds]
    table = compare(task, of_teacher, rows)
    if jax.process_index() == 0:
        (folder / "table.txt").write_text(f"{table}\n")
        best = None if of_teacher is None else of_teacher.get(f"eval/{task.best}")
        pictures.plot_study(rows, best, folder / "curves.png", task)
    return f"\n{table}\n"


def folder_of(named: str | Place) -> Path:
    """Return the folder of a study.

    Raises:
        ValueError: it is in a bucket, where only a run can be.
    """
    folder = buckets.place(named)
    if isinstance(folder, Bucket):
        raise ValueError(f"{folder}: a study is kept on a disk; each of its runs alone may lie in a bucket")
    return folder


def _keep_config(config: ConfigDict, folder: Path) -> None:
    """Write the config into the study's folder, by which it continues without being named."""
    kept = run_folder.read_config(folder, experiment.FIELDS)
    if kept is not None and "study" not in kept:
        raise ValueError(
            f"{folder} holds a run, and a study goes into a folder of its own: choose another --workdir"
        )
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_config(config, folder, 0, changed=False)


def check(config: ConfigDict) -> None:
    """Check the fields of a config's study.

    Raises:
        ValueError: some are missing, unknown or not allowed.
    """
    if lines := list(wrong(FIELDS, config.study.to_dict(), "study.")):
        raise ValueError("in the config, " + "\n  ".join(lines))
    for name, changes in config.study.students.items():
        if "seed" in changes:
            raise ValueError(f"study, {name}: its seed does nothing, study.seeds are those of every student")
        of_teacher = changes.get("teacher")
        if _TEACHER in config.study and isinstance(of_teacher, ConfigDict) and "weights" in of_teacher:
            raise ValueError(
                f"study, {name}: its teacher.weights do nothing, as study.teacher is trained and teaches "
                "every student; leave that out of the study, and name the teacher of each"
            )


def teacher_of(config: ConfigDict) -> ConfigDict | None:
    """Return the config of a study's teacher; None where it trains none."""
    if _TEACHER not in config.study:
        return None
    with _named(_TEACHER):
        return _variant(config, config.study.teacher)


def students_of(config: ConfigDict, folder: Path) -> dict[str, list[ConfigDict]]:
    """Return the configs of each variant of a study's students, one for each seed."""
    students: dict[str, list[ConfigDict]] = {}
    for name, changes in config.study.students.items():
        students[name] = []
        for seed in config.study.seeds:
            with _named(name):
                student = _variant(config, changes)
            student.seed = seed
            if _TEACHER in config.study:
                student.teacher.weights = str(folder / _TEACHER)
            students[name].append(student)
    return students


def _variant(config: ConfigDict, changes: ConfigDict) -> ConfigDict:
    """Return the config of a training, of which the study says what `changes`."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked(), changed.ignore_type():  # `experiment.check` says what is wrong, and where
        del changed.study
        try:
            changed.update(changes.to_dict())
            renew(experiment.FIELDS, changed)
        except AttributeError as error:  # of what is no mapping
            raise ValueError(f"of {changes.to_dict()}, a value stands where a config has fields") from error
    return changed


@contextmanager
def _named(training: str | Path) -> Iterator[None]:
    """Add to an error of one of the trainings which one it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"study, {training}: {error}") from error


def _place(folder: Path, name: str, student: ConfigDict) -> Path:
    return folder / name / f"seed{student.seed}"


def _train(config: ConfigDict, folder: Path, place: Path) -> list[dict[str, Any]]:
    """Train a student, and return the rows of its log."""
    with _named(place.relative_to(folder)):
        train.run(config, place)
    return read_rows(place)


def _measure_teacher(
    config: ConfigDict,
    teacher: ConfigDict | None,
    students: Mapping[str, Sequence[ConfigDict]],
    folder: Path,
    task: Task,
) -> Mapping[str, Any] | None:
    """Return a row of the teacher, trained here or before, at its best; None where none is to be compared."""
    if teacher:
        with _named(_TEACHER):
            return train.run(teacher, folder / _TEACHER)["best"]
    if not any(read_teacher(all_terms(of_seeds[0])) for of_seeds in students.values()):
        return None
    try:
        measures = evaluate.run(config_of_training(config), folder, config.teacher.weights).measures
        return {f"eval/{name}": value for name, value in measures.items()}
    except (
        FileNotFoundError,
        ValueError,
    ):  # random, of other classes, without a head; a student's run says why
        return None


def config_of_training(config: ConfigDict) -> ConfigDict:
    """Return a study's config without what it says of its trainings."""
    return _variant(config, ConfigDict())


def compare(
    task: Task,
    teacher: Mapping[str, Any] | None,
    students: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
) -> str:
    """Return a table with a line for the teacher and each variant.

    Args:
        task: has the columns.
        teacher: the row of its evaluation; None where there is none to compare.
        students: for each variant the rows of its seeds, which stand behind the line by the first column.
    """
    columns = task.columns or ((task.best, "last"),)
    names = max(map(len, (_TEACHER, *students))) + 2
    what = f"{task.unit} (mean ± standard deviation)".strip()
    if len(columns) == 1:
        heads, lines = [""], [f"{'':{names}}validation {task.titles[columns[0][0]]}, {what}"]
    else:
        heads = [f"{task.titles[measure]}, {which}" for measure, which in columns]
        lines = [f"{'':{names}}validation, {what}"]
    width = max(16, *map(len, heads)) + 2 if heads[1:] else 0
    if heads[1:]:
        cells = (f"{head:{width}}" for head in heads)
        lines.append(f"{'':{names}}{''.join(cells)}({heads[0]} of each seed)")
    if teacher is not None:
        of_teacher = (teacher.get(f"eval/{measure}") for measure, _ in columns)
        cells = (f"{'' if m is None else _mean(task.shown(np.array([m]))):{width}}" for m in of_teacher)
        lines.append(f"{_TEACHER:{names}}{''.join(cells)}".rstrip())
    for name, seeds in students.items():
        ends = [
            {"first": next(filter(is_evaluation, rows))} | last_and_best(rows, f"eval/{task.best}")
            for rows in seeds
        ]
        of_columns = [
            task.shown(np.array([end[which][f"eval/{measure}"] for end in ends]))
            for measure, which in columns
        ]
        cells = (f"{_mean(values):{width}}" for values in of_columns)
        of_seeds = ", ".join(f"{value:.2f}" for value in of_columns[0])
        lines.append(f"{name:{names}}{''.join(cells)}{'' if heads[1:] else '   '}({of_seeds})")
    return "\n".join(lines)


def _mean(values: np.ndarray) -> str:
    """Return the mean of numbers and, of several, the standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):4.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):6.2f}{deviation}"
