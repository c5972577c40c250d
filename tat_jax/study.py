"""A study: teachers, their students in several variants, each over several seeds, and what compares them."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from tat_jax import (
    buckets,
    comparison,
    costs,
    evaluate,
    experiment,
    paths,
    pictures,
    run_folder,
    tables,
    together,
    train,
    variants,
)
from tat_jax.buckets import Bucket, Place
from tat_jax.build import all_terms, read_teacher
from tat_jax.comparison import Comparison, Method, Run
from tat_jax.metrics import last_and_best, read_rows
from tat_jax.run_folder import BusyError
from tat_jax.tasks import task_of
from tat_jax.variants import named

Students = Mapping[str, Sequence[ConfigDict]]

_LOOK = 2.0  # seconds from one look at what other processes train to the next


def run(config: ConfigDict, folder: str | Place) -> str:
    """Train the teachers and every student of `config.study` below `folder`, and return the table.

    Several processes that are started with one folder share the work, a run each: what another one trains is
    passed over, and waited for at the end. One that dies leaves its run to the others. Runs that are finished
    are not repeated; an interrupted one continues.

    In the text, a student's measure is that after its last epoch, so that no run is chosen by the images that
    it is judged by; a teacher's is that of the weights that teach, the best ones of its run.

    Args:
        config: with `variants.FIELDS` in its `study`.
        folder: holds `<teacher>/` and `<variant>/seed<n>/` afterwards, `config.json`, `table.txt`, `.md`,
            `.csv` and `.json`, `comparison.png` and `curves.png`.

    Raises:
        ValueError: a run cannot be made; it is named. Nothing is written before all configs are known to be
            right.
    """
    folder = folder_of(folder)
    variants.check(config)
    teachers = {folder / name: teacher for name, teacher in variants.teachers_of(config).items()}
    students = variants.students_of(config, folder)
    trainings = teachers | {
        _place(folder, name, student): student for name, of_seeds in students.items() for student in of_seeds
    }
    for place, training in trainings.items():
        with named(place.relative_to(folder)):
            experiment.check(training)
            run_folder.changes(training, place, experiment.FIELDS)
            if place not in teachers:
                _check_teacher(training, list(teachers))
    _keep_config(config, folder)
    _train(trainings, folder, config.study.get("seeds_at_once", 1))
    found = _compare(config, teachers, students, folder)
    if jax.process_index() == 0:
        with run_folder.in_turn(folder):
            _write(found, folder)
    return f"\n{tables.text(found)}\n"


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
        with run_folder.in_turn(folder):
            run_folder.write_config(config, folder, 0, changed=False)


def _check_teacher(training: ConfigDict, teachers: Sequence[Path]) -> None:
    """Raise a ValueError if a student's losses read a teacher, and it names none of several."""
    if len(teachers) > 1 and Path(training.teacher.weights) not in teachers and _reads_teacher(training):
        names = ", ".join(place.name for place in teachers)
        raise ValueError(f"which of study.teachers teaches? Name one as its teacher.weights: {names}")


def _reads_teacher(training: ConfigDict) -> bool:
    return read_teacher(all_terms(training))


def _place(folder: Path, name: str, student: ConfigDict) -> Path:
    return folder / name / f"seed{student.seed}"


def _train(trainings: Mapping[Path, ConfigDict], folder: Path, at_once: int) -> None:
    """Train, or see trained by other processes, all of a study, so many seeds of a student at once."""
    waiting, said = dict(trainings), ""
    while waiting:
        before = len(waiting)
        for place, training in trainings.items():
            teacher = Path(training.teacher.weights)
            is_ready = teacher not in waiting or not _reads_teacher(training)
            if place in waiting and is_ready:
                group = _free_seeds(waiting, place, folder)[:at_once]
                if group and _are_trained({run: waiting[run] for run in group}, folder):
                    for run in group:
                        del waiting[run]
        if len(waiting) == before:
            others = ", ".join(str(place.relative_to(folder)) for place in waiting)
            if jax.process_index() == 0 and said != others:
                print(f"{folder}: other processes are at work; left are {others}", flush=True)
            said = others
            time.sleep(_LOOK)


def _free_seeds(waiting: Mapping[Path, ConfigDict], place: Path, folder: Path) -> list[Path]:
    """Return a run that waits, and of a student the later ones of other seeds, if nobody is at them."""
    runs = list(waiting)
    seeds = [run for run in runs[runs.index(place) :] if run.parent == place.parent]
    return [run for run in (seeds if place.parent != folder else [place]) if not _is_busy(run)]


def _are_trained(trainings: Mapping[Path, ConfigDict], folder: Path) -> bool:
    """Train a run, or several seeds of a student at once, and return whether no other process was at one."""
    (place, training), *others = trainings.items()
    with named(place.relative_to(folder)):
        try:
            if others:
                together.run(training, {of_seed.seed: run for run, of_seed in trainings.items()})
            else:
                train.run(training, place)
        except BusyError:  # since this moment
            if jax.process_count() > 1:  # of which the first alone sees the lock
                raise
            return False
    return True


def _is_busy(place: Path) -> bool:
    """Return the same in all processes of one training."""
    busy = jax.process_index() == 0 and run_folder.is_busy(place)
    return bool(multihost_utils.broadcast_one_to_all(busy)) if jax.process_count() > 1 else busy


def _compare(
    config: ConfigDict, teachers: Mapping[Path, ConfigDict], students: Students, folder: Path
) -> Comparison:
    """Return what the logs of a study's runs tell."""
    task, controls = task_of(config), variants.controls(config, students)
    published = config.study.get("published", {})
    measure = f"eval/{task.best}"
    if teachers:
        rows = {place.name: last_and_best(read_rows(place), measure)["best"] for place in teachers}
    else:
        rows = _measure_given_teacher(config, students, folder)
    methods = []
    for name, of_seeds in students.items():
        places = [_place(folder, name, student) for student in of_seeds]
        runs = [
            Run(read_rows(place), student.batch_size, costs.read(place))
            for place, student in zip(places, of_seeds, strict=True)
        ]
        methods.append(Method(name, controls[name], runs, published.get(name)))
    seeds = [student.seed for student in next(iter(students.values()))]
    return comparison.compare(task, seeds, rows, methods)


def _measure_given_teacher(
    config: ConfigDict, students: Students, folder: Path
) -> dict[str, Mapping[str, Any]]:
    """Return a row of the teacher that the config names; none where there is none to be compared."""
    if not any(_reads_teacher(of_seeds[0]) for of_seeds in students.values()):
        return {}
    training = variants.config_of_training(config)
    try:
        measures = evaluate.run(training, folder, config.teacher.weights).measures
    except (
        FileNotFoundError,
        ValueError,
    ):  # random, of other classes, without a head; a student's run says why
        return {}
    return {variants.TEACHER: {f"eval/{name}": value for name, value in measures.items()}}


def _write(found: Comparison, folder: Path) -> None:
    """Write the tables and the pictures of a study."""
    written = {
        "txt": tables.text(found),
        "md": tables.markdown(found),
        "csv": tables.as_csv(found).rstrip("\n"),
        "json": tables.as_json(found),
    }
    for ending, table in written.items():
        paths.write(folder / f"table.{ending}", f"{table}\n".encode())
    pictures.plot_study(found, folder / "curves.png")
    pictures.plot_comparison(found, folder / "comparison.png")
