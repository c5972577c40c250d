"""Pictures of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tat_jax.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def plot_run(rows: Rows, path: Path, terms: Sequence[str], task: Task) -> None:
    """Draw the loss, its terms and the task's measures of one run against the step."""
    figure = _figure(11, 4)
    loss, measures = figure.subplots(1, 2)
    for name in ("loss", *terms):
        steps, values = _column(rows, f"train/{name}")
        if len(steps):
            loss.plot(steps, values, label=name)
    loss.set(xlabel="step", ylabel="loss", title="Training", yscale="log")
    for name, title in task.titles.items():
        steps, values = _column(rows, f"eval/{name}")
        measures.plot(steps, 100 * values, marker=".", label=title)
    measures.set(xlabel="step", ylabel=f"{', '.join(task.titles.values())}, %", title="Validation")
    for axes in (loss, measures):
        axes.grid(alpha=0.3)
        _count(axes)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def plot_study(runs: Mapping[str, Sequence[Rows]], teacher: float | None, path: Path, task: Task) -> None:
    """Draw mean and standard deviation of the task's best measure over the seeds of each variant, by epoch.

    Args:
        runs: for each variant the rows of its seeds.
        teacher: the teacher's measure, a fraction; None where there is none.
        path: the picture.
        task: says which measure.
    """
    figure = _figure(8, 5)
    axes = figure.subplots()
    if teacher is not None:
        axes.axhline(100 * teacher, color="black", linestyle="--", label=f"teacher {teacher:.1%}")
    for name, seeds in runs.items():
        epochs = _column(seeds[0], f"eval/{task.best}", by="epoch")[0]
        values = 100 * np.stack([_column(rows, f"eval/{task.best}")[1] for rows in seeds])
        mean, deviation = values.mean(0), values.std(0, ddof=1) if len(seeds) > 1 else 0
        (line,) = axes.plot(epochs, mean, label=f"{name} {mean[-1]:.1f} %")
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2)
    title = "Students, mean ± standard deviation over seeds"
    axes.set(xlabel="epoch", ylabel=f"validation {task.titles[task.best]}, %", title=title)
    axes.grid(alpha=0.3)
    _count(axes)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> "Figure":
    # Imported here, because a run needs it at its end and not for its first step.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _count(axes: "Axes") -> None:
    """Mark whole steps or epochs alone."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _column(rows: Rows, name: str, by: str = "step") -> tuple[np.ndarray, np.ndarray]:
    chosen = [(row[by], row[name]) for row in rows if name in row]
    steps, values = zip(*chosen, strict=True) if chosen else ((), ())
    return np.array(steps), np.array(values)
