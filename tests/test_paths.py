"""Paths as people type them."""

from pathlib import Path

import pytest

from tat_jax import paths


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("RUN", "run 1")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("BUCKET", "gs://bucket")
    monkeypatch.delenv("NOT_SET", raising=False)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~/runs", "/home/me/runs"),
        ("$HOME/runs", "/home/me/runs"),
        ("$DATA/${RUN}/x", "/data/run 1/x"),
        ("./~/runs", "~/runs"),
        ("a~b", "a~b"),
        ("100$", "100$"),
        ("runs${EMPTY}", "runs"),
    ],
)
def test_a_path_is_what_a_shell_makes_of_it(typed, meant):
    assert paths.local(typed) == Path(meant)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("$NOT_SET/runs", r"\$NOT_SET/runs: \$NOT_SET is not set"),
        ("runs/${NOT_SET}", r"\$\{NOT_SET\} is not set"),
        ("runs/${}", r"\$\{\} is not set"),
        ("~nobody-of-this-name/runs", "no such home folder"),
        ("", "a path is empty"),
        ("$BUCKET/run", r"\$BUCKET/run, gs://bucket/run, is not on a disk"),
        ("file:///run", "file:///run is not on a disk"),
    ],
)
def test_what_leads_nowhere_is_told(typed, answer):
    with pytest.raises(ValueError, match=answer):
        paths.local(typed)


def test_two_machines_that_share_a_disk_write_a_file_apart_even_from_processes_of_one_number(tmp_path):
    file = tmp_path / "list"
    with (
        paths.replacing(file) as mine,
        paths.replacing(file) as theirs,
    ):  # of one number
        mine.write_text("mine, and longer")
        theirs.write_text("theirs")
    assert file.read_text() == "mine, and longer"
    assert list(tmp_path.iterdir()) == [file]
