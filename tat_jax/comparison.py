"""What a study found: the measures of each method over seeds, beside those of a control, and its costs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tat_jax.evaluate import HELD_OUT
from tat_jax.metrics import is_evaluation, last_and_best
from tat_jax.tasks.task import Task
from tat_jax.weights.folders import OF_EMA

Rows = Sequence[Mapping[str, Any]]

BY_HELD_OUT = "best by held out"
_CONFIDENCE = 0.95


class Run(NamedTuple):
    """A run of a study: the rows of its log, its images a step, and its costs as `costs.read` has them."""

    rows: Rows
    batch_size: int
    costs: Mapping[str, Any]


class Method(NamedTuple):
    """A variant of the students: its name, that of its control, and its runs, one of each seed."""

    name: str
    control: str
    runs: Sequence[Run]
    published: Mapping[str, Any] | None = None


class Estimate(NamedTuple):
    """A mean over seeds, and the ends of its 95 % interval; NaN of a single seed, which has none."""

    mean: float
    low: float
    high: float


class Cell(NamedTuple):
    """One measure of a method.

    Attributes:
        measure: its name.
        epoch: that of which it is: the "last", the "best" by the task's measure, …
        values: of each seed, in the task's unit.
        difference: by seed to the control; None of the control itself.
        wins: whether it is the highest among the methods of its control, and the intervals of its paired
            differences to the control and to the second highest both exclude 0.
    """

    measure: str
    epoch: str
    values: tuple[float, ...]
    difference: Estimate | None
    wins: bool

    @property
    def mean(self) -> float:
        """Return the mean over the seeds."""
        return float(np.mean(self.values))

    @property
    def deviation(self) -> float | None:
        """Return the standard deviation over the seeds, with n − 1; None of one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None


class Line(NamedTuple):
    """A method in the table.

    Attributes:
        method: its name, and that of its `control`.
        runs: the rows of each seed.
        cells: by measure and epoch.
        student_parameters: how many of the student are trained.
        loss_parameters: how many are trained besides.
        milliseconds: of a step, the median over the rows of a log and then over the seeds.
        step_memory: bytes of the step's arguments and temporaries on a device.
        hours: of the steps of all seeds, without evaluations.
        published: the figure of a paper, its `value` and its `epoch`.
    """

    method: str
    control: str
    runs: Sequence[Rows]
    cells: Mapping[tuple[str, str], Cell]
    student_parameters: int | None
    loss_parameters: int | None
    milliseconds: float | None
    step_memory: int | None
    hours: float | None
    published: Mapping[str, Any] | None


class Comparison(NamedTuple):
    """All that the tables and pictures of a study show.

    Attributes:
        task: names the measures.
        seeds: of each student.
        teachers: the measures of each, in the task's unit.
        lines: of the methods.
    """

    task: Task
    seeds: Sequence[int]
    teachers: Mapping[str, Mapping[str, float]]
    lines: Sequence[Line]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Return the measures and epochs that the methods have, each once."""
        return list(dict.fromkeys(itertools.chain.from_iterable(line.cells for line in self.lines)))

    @property
    def groups(self) -> dict[str, list[Line]]:
        """Return by control the methods that are compared with it."""
        controls = dict.fromkeys(line.control for line in self.lines)
        return {control: [line for line in self.lines if line.control == control] for control in controls}


def interval(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values with its 95 % interval by Student's t.

    mean ± t(0.975; n − 1) · s / √n, with s the standard deviation with n − 1.
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Estimate(mean, np.nan, np.nan)
    from scipy.special import stdtrit  # here, as a training needs it at its end alone

    quantile = stdtrit(n - 1, (1 + _CONFIDENCE) / 2)
    half = float(quantile * np.std(values, ddof=1) / np.sqrt(n))
    return Estimate(mean, mean - half, mean + half)


def paired(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Return the mean difference of values of the same seeds, with its interval."""
    return interval(np.subtract(values, others).tolist())


def compare(
    task: Task,
    seeds: Sequence[int],
    teachers: Mapping[str, Mapping[str, Any]],
    methods: Sequence[Method],
) -> Comparison:
    """Compare each method with its control, by seed.

    Where a run kept a moving average of its student, that is a method of its own.

    Args:
        task: says which measures; the higher, the better.
        seeds: of the runs of each method, in their order.
        teachers: for each the row of its evaluation.
        methods: among them every control.
    """
    methods = list(itertools.chain.from_iterable(map(_with_average, methods)))
    values = {method.name: _values(task, method) for method in methods}
    lines = []
    for method in methods:
        group = {other.name: values[other.name] for other in methods if other.control == method.control}
        cells = {
            column: Cell(*column, found, *_standing(column, method.name, method.control, group))
            for column, found in values[method.name].items()
        }
        rows = [run.rows for run in method.runs]
        lines.append(Line(method.name, method.control, rows, cells, *_costs(method), method.published))
    of_teachers = {
        name: {m: float(task.shown(row[f"eval/{m}"])) for m in task.titles if f"eval/{m}" in row}
        for name, row in teachers.items()
    }
    return Comparison(task, seeds, of_teachers, lines)


def columns_of(task: Task) -> tuple[tuple[str, str], ...]:
    """Return which measures of which epochs the text of a study shows of a task."""
    return tuple(task.columns) or ((task.best, "last"),)


def of_average(rows: Rows) -> list[dict[str, Any]]:
    """Return the evaluations of a run's moving average, if it has one, as if that were the student."""
    prefix = f"eval/{OF_EMA}"
    return [
        {
            "step": row["step"],
            "epoch": row.get("epoch"),
            **{f"eval/{name.removeprefix(prefix)}": row[name] for name in row if name.startswith(prefix)},
        }
        for row in rows
        if any(name.startswith(prefix) for name in row)
    ]


def _with_average(method: Method) -> Iterator[Method]:
    yield method
    averages = [of_average(run.rows) for run in method.runs]
    if all(averages):
        # Its costs are those of the method before it.
        runs = [run._replace(rows=rows, costs={}) for run, rows in zip(method.runs, averages, strict=True)]
        yield Method(f"{method.name}, EMA", method.control, runs)


def _values(task: Task, method: Method) -> dict[tuple[str, str], tuple[float, ...]]:
    """Return the measures of each seed, by measure and epoch."""
    ends = [_ends(task, run.rows) for run in method.runs]
    best = [(task.best, epoch) for epoch in ("last", "best", BY_HELD_OUT)]
    return {
        (measure, epoch): tuple(float(task.shown(end[epoch][f"eval/{measure}"])) for end in ends)
        for measure, epoch in dict.fromkeys([*best, *columns_of(task)])
        if all(epoch in end for end in ends)
    }


def _ends(task: Task, rows: Rows) -> dict[str, Mapping[str, Any]]:
    """Return by their names the evaluations that are compared."""
    held_out = f"eval/{HELD_OUT}{task.best}"
    ends = {"first": next(filter(is_evaluation, rows)), **last_and_best(rows, f"eval/{task.best}")}
    if any(held_out in row for row in rows):
        ends[BY_HELD_OUT] = last_and_best(rows, held_out)["best"]
    return ends


def _standing(
    column: tuple[str, str],
    name: str,
    control: str,
    group: Mapping[str, Mapping[tuple[str, str], Sequence[float]]],
) -> tuple[Estimate | None, bool]:
    """Return the difference of a method to its control, and whether it wins."""
    values = {other: of_other[column] for other, of_other in group.items() if column in of_other}
    mine = values[name]
    difference = paired(mine, values[control]) if name != control and control in values else None
    others = [of_other for other, of_other in values.items() if other != name]
    if not others:
        return difference, False
    second = paired(mine, max(others, key=np.mean))
    wins = second.low > 0 and (difference is None or difference.low > 0)
    return difference, bool(wins)


def _costs(method: Method) -> tuple[int | None, int | None, float | None, int | None, float | None]:
    def known(values: Sequence[Any]) -> list[Any]:
        return [value for value in values if value is not None]

    of_student, of_losses = (
        known([run.costs.get(f"{part}_parameters") for run in method.runs]) for part in ("student", "loss")
    )
    times = known([milliseconds(run) for run in method.runs])
    memory = known([run.costs.get("step_memory") for run in method.runs])
    spent = known([hours(run) for run in method.runs])
    return (
        max(of_student, default=None),
        max(of_losses, default=None),
        float(np.median(times)) if times else None,
        max(memory, default=None),
        sum(spent) if len(spent) == len(method.runs) else None,
    )


def milliseconds(run: Run) -> float | None:
    """Return the median time of a step; the first row of a log, in which it is compiled, does not count."""
    times = [seconds / steps for steps, seconds in _times(run)[1:]]
    return float(1000 * np.median(times)) if times else None


def hours(run: Run) -> float | None:
    """Return how long the steps of a run took, as far as its rows tell it, evaluations left out."""
    times, last = _times(run), max((row["step"] for row in run.rows), default=0)
    logged = sum(steps for steps, _ in times)
    return sum(seconds for _, seconds in times) * last / logged / 3600 if logged else None


def _times(run: Run) -> list[tuple[int, float]]:
    """Return of each row of training its steps, and their seconds."""
    rate = "train/images_per_second"
    rows = [row for row in run.rows if rate in row]
    steps = np.diff([0, *(row["step"] for row in rows)])
    return [(int(n), n * run.batch_size / row[rate]) for n, row in zip(steps, rows, strict=True)]
