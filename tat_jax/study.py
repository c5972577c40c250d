"""A teacher, its students in several variants, each over several seeds, and the table that compares them."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tat_jax import fields, report, train
from tat_jax.metrics import read_rows


def run(config: ConfigDict, folder: str | Path) -> str:
    """Train the teacher and every student of `config.study` below `folder`, and return the table.

    A student's accuracy is that after its last epoch, so that no run is chosen by the test images.
    Runs that are finished are not repeated; an interrupted one continues.

    Args:
        config: with `study.seeds`, `study.teacher` and `study.students`, the latter two being what differs
            from the rest of the config.
        folder: holds `teacher/`, `<variant>/seed<n>/` and `curves.png` afterwards.
    """
    folder = Path(folder)
    study = config.study.to_dict()
    for changes in (study["teacher"], *study["students"].values()):
        fields.check(variant(config, changes))
    teacher = train.run(variant(config, study["teacher"]), folder / "teacher")["last"]["eval/top1"]
    runs = {name: [folder / name / f"seed{seed}" for seed in study["seeds"]] for name in study["students"]}
    for name, changes in study["students"].items():
        for seed, run_folder in zip(study["seeds"], runs[name], strict=True):
            student = variant(config, changes)
            student.seed = seed
            student.teacher.weights = str(folder / "teacher")
            train.run(student, run_folder)
    rows = {name: [read_rows(run_folder) for run_folder in folders] for name, folders in runs.items()}
    report.plot_study(rows, teacher, folder / "curves.png")
    accuracies = {
        name: [[row["eval/top1"] for row in seed if "eval/top1" in row][-1] for seed in seeds]
        for name, seeds in rows.items()
    }
    return _table(teacher, accuracies)


def variant(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Return the config of a study's teacher or student, of which the study says what `changes`."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        del changed.study
    changed.update(changes)
    return changed


def _table(teacher: float, accuracies: dict[str, list[float]]) -> str:
    lines = [f"{'':16}test top-1, % (mean ± standard deviation)", f"{'teacher':16}{100 * teacher:6.2f}"]
    for name, values in accuracies.items():
        deviation = f" ± {100 * np.std(values, ddof=1):4.2f}" if len(values) > 1 else ""
        seeds = ", ".join(f"{100 * value:.2f}" for value in values)
        lines.append(f"{name:16}{100 * np.mean(values):6.2f}{deviation}   ({seeds})")
    return "\n".join(lines)
