"""A teacher, its students in several variants, each over several seeds, and the table that compares them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tat_jax import experiment, pictures, train
from tat_jax.metrics import read_rows
from tat_jax.tasks import TASKS


def run(config: ConfigDict, folder: str | Path) -> str:
    """Train the teacher and every student of `config.study` below `folder`, and return the table.

    A student's measure is that after its last epoch, so that no run is chosen by the test images.
    Runs that are finished are not repeated; an interrupted one continues.

    Args:
        config: with `study.seeds`, `study.teacher` and `study.students`, the latter two being what differs
            from the rest of the config.
        folder: holds `teacher/`, `<variant>/seed<n>/` and `curves.png` afterwards.
    """
    folder = Path(folder)
    study = config.study.to_dict()
    for changes in (study["teacher"], *study["students"].values()):
        experiment.check(variant(config, changes))
    task = TASKS[config.task]()
    measure = f"eval/{task.best}"
    teacher = train.run(variant(config, study["teacher"]), folder / "teacher")["last"][measure]
    runs = {name: [folder / name / f"seed{seed}" for seed in study["seeds"]] for name in study["students"]}
    for name, changes in study["students"].items():
        for seed, run_folder in zip(study["seeds"], runs[name], strict=True):
            student = variant(config, changes)
            student.seed = seed
            student.teacher.weights = str(folder / "teacher")
            train.run(student, run_folder)
    rows = {name: [read_rows(run_folder) for run_folder in folders] for name, folders in runs.items()}
    pictures.plot_study(rows, teacher, folder / "curves.png", task)
    lasts = {
        name: [[row[measure] for row in seed if measure in row][-1] for seed in seeds]
        for name, seeds in rows.items()
    }
    return f"\n{_table(task.titles[task.best], teacher, lasts)}\n"


def variant(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Return the config of a study's teacher or student, of which the study says what `changes`."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        del changed.study
    changed.update(changes)
    return changed


def _table(title: str, teacher: float, students: Mapping[str, Sequence[float]]) -> str:
    lines = [f"{'':16}test {title}, % (mean ± standard deviation)", f"{'teacher':16}{100 * teacher:6.2f}"]
    for name, values in students.items():
        deviation = f" ± {100 * np.std(values, ddof=1):4.2f}" if len(values) > 1 else ""
        seeds = ", ".join(f"{100 * value:.2f}" for value in values)
        lines.append(f"{name:16}{100 * np.mean(values):6.2f}{deviation}   ({seeds})")
    return "\n".join(lines)
