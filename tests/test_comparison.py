"""What a study found: its statistics against an independent reference, and three tables that agree."""

import csv
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tat_jax import comparison, pictures, tables
from tat_jax.comparison import BY_HELD_OUT, Method, Run, compare
from tat_jax.tasks.classification import Classification

CONTROL, OTHER = (70.1, 70.9, 70.3), (71.4, 72.0, 71.5)
LAST, BEST = ("top1", "last"), ("top1", "best")


def rows_of(*top1, **further):
    """Return the log of a run of an epoch of four steps for each measure, in percent."""
    rows = []
    for epoch, measure in enumerate(top1, 1):
        rows.append({"step": 4 * epoch, "train/images_per_second": 64.0 * epoch})
        others = {f"eval/{name}": values[epoch - 1] / 100 for name, values in further.items()}
        rows.append({"step": 4 * epoch, "epoch": epoch, "eval/top1": measure / 100, **others})
    return rows


def method(name, values, control="alone", **options):
    return Method(name, control, [Run(rows_of(60.0, value), 16, {}) for value in values], **options)


def compared(*methods, teachers=None):
    seeds = range(len(methods[0].runs))
    return compare(Classification(), seeds, teachers or {}, methods)


def line(study, name):
    (found,) = (line for line in study.lines if line.method == name)
    return found


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_of_a_mean_is_that_of_scipy(n):
    values = np.random.default_rng(n).normal(70, 0.5, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(comparison.interval(values), (values.mean(), low, high), rtol=1e-12)


def test_a_difference_is_paired_by_seed():
    found = line(compared(method("alone", CONTROL), method("kd", OTHER)), "kd").cells[LAST].difference
    expected = stats.ttest_rel(OTHER, CONTROL).confidence_interval(0.95)
    mean = np.mean(np.subtract(OTHER, CONTROL))
    np.testing.assert_allclose(found, (mean, expected.low, expected.high), rtol=1e-12)


def test_one_seed_has_a_difference_and_no_interval_and_nothing_wins():
    study = compared(method("alone", [70.0]), method("kd", [90.0]))
    mean, low, high = line(study, "kd").cells[LAST].difference
    assert (round(mean, 9), math.isnan(low), math.isnan(high)) == (20.0, True, True)
    assert not any(cell.wins for found in study.lines for cell in found.cells.values())
    assert "**" not in tables.markdown(study)
    assert "+20.00 | +20.00" in tables.markdown(study)


@pytest.mark.parametrize(
    ("methods", "winner"),
    [
        ({"kd": OTHER}, "kd"),
        ({"kd": (70.2, 71.5, 70.1)}, None),  # the control lies within its interval
        ({"kd": OTHER, "tat": (71.3, 72.0, 71.4)}, None),  # the second highest does
        ({"kd": OTHER, "tat": (70.2, 71.0, 70.4)}, "kd"),
        ({"kd": (71.0, 71.0, 71.0), "tat": (70.8, 70.8, 70.81)}, None),  # the control does, the second not
        ({"kd": (60.1, 60.8, 60.3)}, "alone"),
    ],
)
def test_only_what_differs_from_the_control_and_from_the_second_highest_is_bold(methods, winner):
    study = compared(method("alone", CONTROL), *(method(name, seeds) for name, seeds in methods.items()))
    assert [found.method for found in study.lines if found.cells[LAST].wins] == ([winner] if winner else [])
    bold = [row.split("|")[1].strip() for row in tables.markdown(study).splitlines() if "**" in row]
    assert bold == ([winner] if winner else [])


def test_methods_are_compared_with_the_control_of_their_own_and_win_among_its():
    study = compared(
        method("alone", CONTROL),
        method("kd", OTHER),
        method("small alone", (50.1, 50.9, 50.3), "small alone"),
        method("small kd", (51.4, 52.0, 51.5), "small alone"),
    )
    assert {name: len(lines) for name, lines in study.groups.items()} == {"alone": 2, "small alone": 2}
    assert [found.method for found in study.lines if found.cells[LAST].wins] == ["kd", "small kd"]
    np.testing.assert_allclose(
        line(study, "small kd").cells[LAST].difference, line(study, "kd").cells[LAST].difference, rtol=1e-9
    )


def test_the_moving_average_of_a_run_is_a_method_beside_it_with_a_best_epoch_of_its_own():
    rows = rows_of(60.0, 72.0, 71.0, ema_top1=(40.0, 71.0, 71.5))
    study = compared(Method("alone", "alone", [Run(rows, 16, {})]))
    assert [found.method for found in study.lines] == ["alone", "alone, EMA"]
    of_student, of_average = ([round(found.cells[c].mean, 9) for c in (LAST, BEST)] for found in study.lines)
    assert (of_student, of_average) == ([71.0, 72.0], [71.5, 71.5])
    assert round(study.lines[1].cells[LAST].difference.mean, 9) == 0.5
    assert "alone, EMA" in tables.text(study)


def test_the_best_epoch_by_images_held_out_of_the_training_set_is_a_column_where_rows_have_it():
    rows = rows_of(60.0, 72.0, 71.0, 70.0, held_out_top1=(50.0, 60.0, 65.0, 62.0))
    study = compared(Method("alone", "alone", [Run(rows, 16, {})]))
    measured = {epoch: round(study.lines[0].cells["top1", epoch].mean, 9) for _, epoch in study.columns}
    assert measured == {"last": 70.0, "best": 72.0, BY_HELD_OUT: 71.0}
    assert "| top-1, best by held out |" in tables.markdown(study)
    assert "held out" not in tables.markdown(compared(method("alone", CONTROL)))


def test_the_step_s_time_leaves_out_the_row_in_which_it_is_compiled_and_hours_do_not():
    run = Run(rows_of(60.0, 70.0, 71.0, 72.0), 16, {})  # 64, 128, 192 and 256 images a second
    assert comparison.milliseconds(run) == pytest.approx(1000 * 16 / 192)
    assert 3600 * comparison.hours(run) == pytest.approx(64 * (1 / 64 + 1 / 128 + 1 / 192 + 1 / 256))
    unlogged = [row for row in run.rows if "eval/top1" in row]
    assert comparison.milliseconds(Run(unlogged, 16, {})) is None
    assert comparison.hours(Run(unlogged, 16, {})) is None


@pytest.fixture
def study():
    """Return a comparison of three methods with all that one may have."""
    costs = {"student_parameters": 83_892, "loss_parameters": 1234, "step_memory": 3 * 2**20}
    rows = [rows_of(60.0, 72.0, value, ema_top1=(50.0, 60.0, 70.0)) for value in OTHER]
    return compared(
        method("alone", CONTROL),
        Method("a | b", "alone", [Run(r, 16, costs) for r in rows], {"value": 73.33, "epoch": "best"}),
        teachers={"large": {"eval/top1": 0.75, "eval/top5": 0.9}},
    )


def test_the_tables_in_text_markdown_csv_and_json_agree(study):
    said = json.loads(tables.as_json(study))
    assert (said["unit"], said["seeds"]) == ("%", [0, 1, 2])
    assert said["teachers"] == {"large": {"top1": 75.0, "top5": 90.0}}
    records = list(csv.DictReader(io.StringIO(tables.as_csv(study))))
    written = [
        (of_method["method"], of_method, of_cell)
        for of_method in said["methods"]
        for of_cell in of_method["measures"]
    ]
    assert len(records) == len(written) == 6
    for record, (name, of_method, of_cell) in zip(records, written, strict=True):
        assert (record["method"], record["control"], record["epoch"]) == (name, "alone", of_cell["epoch"])
        for field in ("mean", "standard_deviation", "difference", "difference_low", "difference_high"):
            assert (float(record[field]) if record[field] else None) == of_cell[field]
        assert [float(record[f"seed{seed}"]) for seed in said["seeds"]] == of_cell["seeds"]
        for field in ("student_parameters", "loss_parameters", "milliseconds", "step_memory", "hours"):
            assert (float(record[field]) if record[field] else None) == of_method[field]
        assert record["published"] == ("73.33" if name == "a | b" else "")
    table = [row for row in tables.markdown(study).splitlines() if row.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in table}) == 1
    _, _, teacher, control, kd, average = table
    assert teacher.startswith("| large | 75.00 | 75.00 |")
    mean, deviation = np.mean(CONTROL), np.std(CONTROL, ddof=1)
    assert control.startswith(f"| alone | {mean:.2f} ± {deviation:.2f} | ")
    (last,) = (cell for name, _, cell in written if (name, cell["epoch"]) == ("a | b", "last"))
    difference, low, high = (last[f"difference{end}"] for end in ("", "_low", "_high"))
    assert f"| {difference:+.2f} [{low:+.2f}, {high:+.2f}] |" in kd
    assert kd.startswith(f"| a \\| b | **{last['mean']:.2f} ± {last['standard_deviation']:.2f}** |")
    assert kd.endswith("| 3 | 83,892 | 1,234 | 104.2 | 3 | 0.00 | 73.33 (best) |")
    assert "| control | control |" in control
    assert average.startswith("| a \\| b, EMA | 70.00 ± 0.00 |")
    assert average.endswith("| 3 | – | – | – | – | – |  |")  # its costs are those of the line above
    for values in (CONTROL, last["seeds"], [75.0]):
        assert f"{np.mean(values):.2f}" in tables.text(study)


def test_the_pictures_show_every_method_of_any_name(study, tmp_path):
    named = compared(method("$\\no$", [70.0], "$\\no$"))  # which is no formula
    pictures.plot_comparison(study, tmp_path / "dots.png")
    pictures.plot_study(study, tmp_path / "curves.png")
    pictures.plot_study(named, tmp_path / "curves.png")
    pictures.plot_comparison(named, tmp_path / "one.png")
    with Image.open(tmp_path / "dots.png") as dots, Image.open(tmp_path / "one.png") as one:
        assert dots.height - one.height == pytest.approx(120 * 0.45 * 2, abs=2)
