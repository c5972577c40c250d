"""The benchmarks run, and say whether an aim was reached."""

import json
import sys
import time

import pytest

from proofs.bench import convolutions, growth, loss, sidebyside
from proofs.bench import input as bench_input
from proofs.bench.growth import plot
from proofs.bench.sidebyside import Row, compare_times
from proofs.bench.step import roofline
from proofs.photographs import photographs
from proofs.report import table


def test_the_loss_is_compared_at_once_and_beside_pytorch_and_written_as_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proofs.bench.loss", "--json", str(tmp_path / "rows.json")])
    sidebyside.main(None, lambda: loss.measure_one(3, 8, 2, "float32"))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["unit"] for row in rows] == ["MiB", "ms", "ms"]
    assert all({"name", "ours", "rival", "ratio", "bound", "unit"} <= row.keys() for row in rows)
    assert all(row["ours"] > 0 and row["ratio"] == row["rival"] / row["ours"] for row in rows)
    assert rows[2]["name"] in capsys.readouterr().out


def test_a_teacher_that_asks_is_compared_with_resizing_first(monkeypatch):
    monkeypatch.setattr(sidebyside, "_PAUSE", 0)
    memory, time_ = loss.measure_two_grids(2, 3, (4, 8), images=2)
    assert (memory.unit, time_.unit, time_.bound) == ("MiB", "ms", 1.0)
    assert "2×2×4 under 3×3×8 tokens" in time_.name
    assert memory.ours < memory.rival


@pytest.mark.parametrize("option", ["--json=none/rows.json", "--json=.", "--plot=none/a.png"])
def test_a_file_that_cannot_be_is_refused_before_anything_is_measured(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proofs.bench.growth", option])
    with pytest.raises(SystemExit):
        growth.main()
    assert option.partition("=")[2] in capsys.readouterr().err


def test_a_ratio_above_one_means_that_ours_takes_less_time(monkeypatch):
    clock, calls = 0.0, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    monkeypatch.setattr(sidebyside, "_PAUSE", 0)

    def takes(name, seconds):
        def call():
            nonlocal clock
            clock += seconds
            calls.append(name)

        return call

    row = compare_times("ours beside another", takes("ours", 1), takes("rival", 3), bound=2.0, rounds=3)
    assert row[1:6] == (1000, 3000, 3, 2.0, "ms")
    assert row.spread == (3, 3)
    # A call of each that does not count, then in turns, neither always first.
    assert calls == ["ours", "rival", "rival", "ours", "ours", "rival", "rival", "ours"]


@pytest.mark.parametrize(
    ("row", "mark"),
    [
        (Row("time", 2.0, 1.0, 0.5, 1.0, "ms", (0.5, 0.5)), "MISSED"),
        (Row("time", 1.0, 1.0, 1.0, 1.0, "ms", (1.0, 1.0)), "reached"),
        (Row("memory", 161.0, 1.0, 0.01, 160, "MiB", (0.01, 0.01)), "MISSED"),
        (Row("memory", 159.0, 1.0, 0.01, 160, "MiB", (0.01, 0.01)), "reached"),
    ],
)
def test_the_table_says_whether_an_aim_was_reached(row, mark):
    assert mark in table([row])
    assert (mark == "reached") == row.holds


def test_the_input_is_compared_in_processes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sidebyside, "_PAUSE", 0)
    for i, photo in enumerate(photographs(None, 3)):
        (tmp_path / f"{i}.jpg").write_bytes(photo.jpeg)
    files = tuple(sorted(map(str, tmp_path.iterdir())))
    row = bench_input.compare(files, "crops", bench_input.ours, bench_input.torch_loader, bound=1.4)
    assert (row.name, row.bound, row.unit) == ("crops", 1.4, "images/s")
    assert row.ours > 0
    assert row.ratio == pytest.approx(row.ours / row.rival)


def test_growth_is_drawn(tmp_path):
    figures = {
        "batches": [{"batch": 4, "MiB": 1.0}, {"batch": 8, "MiB": 2.0}],
        "crops": [{"pixels": 64, "MiB": 1.0}, {"pixels": 128, "MiB": 2.0}],
        "positions": [{"positions": 49, "MiB": 1.0, "ms": 1.0}, {"positions": 64, "MiB": 2.0, "ms": 2.0}],
    }
    of_devices = {"MiB sent": 1.0, "GFLOP": 1.0, "temporaries, MiB": 1.0}
    for kind in ("weak", "strong"):
        figures[kind] = [{"devices": n, "images on each": 2, **of_devices} for n in (1, 2)]
    plot(figures, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("moved", "binds", "bound"), [(10.0, "operations", 20.0), (100.0, "memory", 4.0)])
def test_the_roofline_is_the_tighter_of_operations_and_bytes(moved, binds, bound):
    row = roofline("step", 2.0, 8, (40.0, moved), peaks=(100.0, 50.0))
    assert (row.ours, row.rival, row.ratio) == (2.0, bound, 2.0 / bound)
    assert f"{binds} bind" in row.name


@pytest.mark.parametrize(
    "kind",
    [convolutions.Convolution(8, 4, 8, 3, 2), convolutions.Convolution(8, 4, 4, 3, depthwise=True)],
    ids=str,
)
def test_a_convolution_and_its_gradients_are_compared_each(kind, monkeypatch):
    monkeypatch.setattr(sidebyside, "_PAUSE", 0)
    rows = convolutions.measure_one(kind, images=True, batch=2)
    assert [row.name.partition(": ")[2] for row in rows] == [
        "forward",
        "kernel's gradient",
        "input's gradient",
    ]
    assert all(row.ours > 0 and row.rival > 0 for row in rows)
