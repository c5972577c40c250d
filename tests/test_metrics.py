"""The log of a run: what stands on disk, and what is watched while steps go on."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tat_jax.metrics import MetricWriter, StepLog, progress, read_rows


def test_an_evaluation_that_no_checkpoint_knows_of_is_not_logged_twice(tmp_path):
    rows = [{"step": 3, "train/loss": 1.0}, {"step": 3, "eval/top1": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for evaluated, kept in ((True, rows), (False, rows[:1])):
        with MetricWriter(tmp_path, 3, evaluated=evaluated):
            assert read_rows(tmp_path) == kept


@pytest.fixture
def log(tmp_path):
    """Return a log of a loss with one term, that takes no step that is not finite."""
    with progress(3, description="", show=False) as bar:
        yield StepLog(MetricWriter(tmp_path, 0, active=False), bar, 10, terms=["mine"], describe=str)


def add(log, step, **metrics):
    log.add({name: jnp.float32(value) for name, value in metrics.items()}, step, images=1)
    log.flush()


def test_what_is_to_be_saved_of_a_log_stays_as_it_was_while_steps_go_on(log):
    add(log, 0, loss=1, mine=1)
    position = log.position
    add(log, 1, loss=2, mine=2)
    assert position["rows"] == [{"loss": 1.0, "mine": 1.0}]


def test_a_row_over_steps_with_other_terms_has_the_means_of_those_that_have_them(tmp_path):
    rows = [{"loss": 4.0, "before": 9.0}, {"loss": 1.0, "before": 9.0}]
    with (
        progress(3, description="", show=False) as bar,
        MetricWriter(tmp_path, 2) as writer,
    ):
        log = StepLog(writer, bar, 3, terms=["mine"], describe=str, position={"left_out": 0, "rows": rows})
        add(log, 2, loss=1, mine=7)
    (row,) = read_rows(tmp_path)
    assert row.pop("train/images_per_second") > 0
    assert row == {"step": 3, "train/loss": 2.0, "train/mine": 7.0}


@pytest.mark.parametrize("name", ["loss", "mine", "gradient_norm"])
def test_a_term_of_any_name_that_is_not_finite_is_named_and_no_other_measurement_is_watched(log, name):
    metrics = {"loss": 1, "mine": 1, "gradient_norm": 1, "of_no_matter": np.nan}
    add(log, 0, **metrics)
    with pytest.raises(FloatingPointError, match=f"^{name} is inf of step 1; 1$"):
        add(log, 1, **metrics | {name: np.inf})


def test_a_damaged_line_of_the_log_is_named_and_one_that_was_cut_off_is_not_missed(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(tmp_path) == [{"step": 1}, {"step": 2}]
    log.write_bytes(b'{"step": 1}\n{"st\xffp": 2}\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged"):
        read_rows(tmp_path)


class Gone:
    """A stream that nobody takes anything from."""

    encoding = "utf-8"

    def __init__(self, error):
        self._error = error

    def write(self, text):
        raise self._error

    flush = isatty = lambda self: False


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, ""), OSError(28, ""), OSError(5, ""), ValueError("closed file")], ids=repr
)
def test_a_bar_that_nobody_watches_any_more_stops_nothing(error, monkeypatch):
    monkeypatch.setattr("sys.stderr", Gone(error))
    monkeypatch.setattr("sys.stdout", Gone(error))
    with progress(3, description="work") as bar:
        for _ in range(3):
            bar.update()
            bar.refresh()
            bar.write("a line")
    assert bar.n == 3


def test_without_a_stderr_there_is_no_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with progress(3, description="work") as bar:
        bar.update()
        bar.write("a line")
