"""The tables of a study: as text, Markdown, CSV and JSON, all of one `Comparison`."""

import csv
import io
import json
from typing import Any

import numpy as np

from tat_jax.comparison import Cell, Comparison, Estimate, Line, columns_of
from tat_jax.tasks.task import Task

_NOTHING = "–"
_COSTS = ("student_parameters", "loss_parameters", "milliseconds", "step_memory", "hours")


def text(comparison: Comparison) -> str:
    """Return a line for each teacher and method, with the first measure of each seed behind it."""
    task, columns = comparison.task, columns_of(comparison.task)
    methods = [line.method for line in comparison.lines]
    names = max(map(len, (*comparison.teachers, "teacher", *methods))) + 2
    what = f"{task.unit} (mean ± standard deviation)".strip()
    if len(columns) == 1:
        heads, lines = [""], [f"{'':{names}}validation {task.titles[columns[0][0]]}, {what}"]
    else:
        heads = [_title(task, *column) for column in columns]
        lines = [f"{'':{names}}validation, {what}"]
    width = max(16, *map(len, heads)) + 2 if heads[1:] else 0
    if heads[1:]:
        cells = (f"{head:{width}}" for head in heads)
        lines.append(f"{'':{names}}{''.join(cells)}({heads[0]} of each seed)")
    for name, measures in comparison.teachers.items():
        shown = (f"{measures[m]:6.2f}" if m in measures else "" for m, _ in columns)
        lines.append(f"{name:{names}}{''.join(f'{cell:{width}}' for cell in shown)}".rstrip())
    for line in comparison.lines:
        found = [line.cells[column] for column in columns]
        cells = (f"{_mean(cell, '6.2f', '4.2f'):{width}}" for cell in found)
        of_seeds = ", ".join(f"{value:.2f}" for value in found[0].values)
        lines.append(f"{line.method:{names}}{''.join(cells)}{'' if heads[1:] else '   '}({of_seeds})")
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """Return a table with the differences to the controls and the costs, and below it how to read it."""
    task, columns = comparison.task, comparison.columns
    heads = ["", *(_title(task, *column) for column in columns)]
    compared = [(measure, epoch) for measure, epoch in columns if epoch != "first"]
    of_several = len({measure for measure, _ in compared}) > 1
    heads += [f"Δ {_title(task, *column) if of_several else column[1]}" for column in compared]
    heads += ["n", "parameters", "of the losses", "ms a step", "MiB a step", "hours"]
    has_published = any(line.published for line in comparison.lines)
    rows = [heads + ["published"] * has_published]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for name, measures in comparison.teachers.items():
        cells = [f"{measures[m]:.2f}" if m in measures else "" for m, _ in columns]
        rows.append([_escaped(name), *cells, *[""] * (len(rows[0]) - 1 - len(cells))])
    for line in comparison.lines:
        cells = [_shown(line.cells.get(column)) for column in columns]
        cells += [_difference(line, column) for column in compared]
        cells += [str(len(comparison.seeds)), *_costs(line)]
        rows.append([_escaped(line.method), *cells, *[_published(line)] * has_published])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n{_notes(comparison)}"


def as_csv(comparison: Comparison) -> str:
    """Return a line for each method and measure, in the task's unit and not rounded."""
    file = io.StringIO()
    records = _records(comparison)
    writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def as_json(comparison: Comparison) -> str:
    """Return all that is known, in the task's unit and not rounded."""
    methods = [
        {
            "method": line.method,
            "control": line.control,
            "measures": [_of_cell(cell) for cell in line.cells.values()],
            **_costs_of(line),
            "published": line.published and dict(line.published),
        }
        for line in comparison.lines
    ]
    said = {
        "unit": comparison.task.unit,
        "seeds": list(comparison.seeds),
        "teachers": {name: dict(measures) for name, measures in comparison.teachers.items()},
        "methods": methods,
    }
    return json.dumps(said, indent=2, ensure_ascii=False)


def _of_cell(cell: Cell) -> dict[str, Any]:
    difference = cell.difference or Estimate(np.nan, np.nan, np.nan)
    return {
        "measure": cell.measure,
        "epoch": cell.epoch,
        "n": len(cell.values),
        "mean": cell.mean,
        "standard_deviation": cell.deviation,
        "difference": _number(difference.mean),
        "difference_low": _number(difference.low),
        "difference_high": _number(difference.high),
        "wins": cell.wins,
        "seeds": list(cell.values),
    }


def _costs_of(line: Line) -> dict[str, Any]:
    return {name: getattr(line, name) for name in _COSTS}


def _records(comparison: Comparison) -> list[dict[str, Any]]:
    records = []
    for line in comparison.lines:
        for cell in line.cells.values():
            of_cell = _of_cell(cell)
            of_seeds = of_cell.pop("seeds")
            seeds = {f"seed{seed}": value for seed, value in zip(comparison.seeds, of_seeds, strict=True)}
            published = line.published or {}
            records.append(
                {
                    "method": line.method,
                    "control": line.control,
                    **of_cell,
                    **seeds,
                    **_costs_of(line),
                    "published": published.get("value"),
                    "published_epoch": published.get("epoch"),
                }
            )
    return records


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _title(task: Task, measure: str, epoch: str) -> str:
    return f"{task.titles[measure]}, {epoch}"


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")


def _mean(cell: Cell, mean: str, deviation: str) -> str:
    """Return the mean and, of several seeds, the standard deviation, so formatted."""
    spread = f" ± {cell.deviation:{deviation}}" if cell.deviation is not None else ""
    return f"{cell.mean:{mean}}{spread}"


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return _NOTHING
    mean = _mean(cell, ".2f", ".2f")
    return f"**{mean}**" if cell.wins else mean


def _difference(line: Line, column: tuple[str, str]) -> str:
    if line.method == line.control:
        return "control"
    cell = line.cells.get(column)
    if cell is None or cell.difference is None:
        return _NOTHING
    mean, low, high = cell.difference
    return f"{mean:+.2f}" + ("" if np.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")


def _costs(line: Line) -> list[str]:
    memory = None if line.step_memory is None else line.step_memory / 2**20
    shown = (
        (line.student_parameters, ",d"),
        (line.loss_parameters, ",d"),
        (line.milliseconds, ",.1f"),
        (memory, ",.0f"),
        (line.hours, ",.2f"),
    )
    return [_NOTHING if value is None else f"{value:{form}}" for value, form in shown]


def _published(line: Line) -> str:
    return f"{line.published['value']:.2f} ({line.published['epoch']})" if line.published else ""


def _notes(comparison: Comparison) -> str:
    n, unit = len(comparison.seeds), comparison.task.unit
    controls = ", ".join(f"`{control}`" for control in comparison.groups)
    spread = "with its 95 % interval (Student's t)" if n > 1 else "of one seed, which has no interval"
    return " ".join(
        [
            f"Validation{f', {unit}' if unit else ''}: mean ± standard deviation over n seeds.",
            f"Δ is the mean difference, by seed, to the control ({controls}), {spread}.",
            "Bold is the highest where such intervals of its differences to the control and to the second",
            "highest both exclude 0.",
            "Parameters are those that are trained of the student, and of the losses besides.",
            "A teacher's measure is that of the weights that teach.",
            "The best epoch is chosen by the images that measure it, unless the column says otherwise.",
            "Hours are those of the steps of all seeds, without evaluations; the memory of a step is that of",
            "its arguments and temporaries on a device.",
        ]
    )
