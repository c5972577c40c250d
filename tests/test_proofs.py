"""What the proofs share: their command lines, their places in documents, and programs that they start."""

import sys
import time

import pytest

from proofs import command, pods
from proofs.fidelity import __main__ as fidelity
from proofs.fidelity.claim import Claim
from proofs.photographs import add_photos
from proofs.program import Program
from proofs.report import write_between
from proofs.rounding import largest_relative_error
from proofs.torture import __main__ as torture

GOOD, BAD = Claim("good", "b", 0.0, 1.0), Claim("bad", "b", 2.0, 1.0)


@pytest.fixture
def document(tmp_path):
    """Return a document with two places."""
    path = tmp_path / "document.md"
    path.write_text(
        "before\n<!-- a: begin -->\nstale\n<!-- a: end -->\n<!-- b: begin --><!-- b: end -->\nafter\n"
    )
    return path


def run(document, monkeypatch, *arguments):
    """Run the parts a, which holds, and b, which does not."""
    monkeypatch.setattr(sys, "argv", ["proof", *arguments])
    command.run_parts(command.make_parser(None), {"a": lambda _: [GOOD], "b": lambda _: [BAD]}, document)


@pytest.mark.parametrize("proof", [fidelity, pods, torture])
def test_every_part_has_its_place_in_the_document(proof, tmp_path):
    copy = tmp_path / "copy.md"
    copy.write_text(proof.DOCUMENT.read_text())
    for part in proof.PARTS:
        write_between(copy, part, "new")
    assert copy.read_text().count("begin -->\n\nnew\n\n<!--") == len(proof.PARTS)


def test_a_part_that_is_named_runs_alone_and_replaces_its_own_table(document, monkeypatch, capsys):
    run(document, monkeypatch, "a")
    text = document.read_text()
    assert text.startswith("before\n<!-- a: begin -->\n\n| claim |")
    assert text.endswith("<!-- a: end -->\n<!-- b: begin --><!-- b: end -->\nafter\n")
    assert "stale" not in text
    assert "good" in capsys.readouterr().out


def test_what_does_not_hold_is_written_too_and_ends_the_command_with_its_table(document, monkeypatch):
    with pytest.raises(SystemExit, match=r"^1 do not hold:\n\| claim"):
        run(document, monkeypatch)
    assert "BROKEN" in document.read_text()


def test_a_part_that_there_is_not_is_named_before_any_runs(document, monkeypatch, capsys):
    before = document.read_text()
    with pytest.raises(SystemExit):
        run(document, monkeypatch, "a", "c")
    assert "no part c; there are a, b" in capsys.readouterr().err
    assert document.read_text() == before


def test_a_document_without_the_place_is_refused(document):
    with pytest.raises(ValueError, match="has no place for c"):
        write_between(document, "c", "new")


def test_a_folder_without_photographs_is_named_by_the_command_line(tmp_path, capsys):
    parser = command.make_parser(None)
    add_photos(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--photos", str(tmp_path)])
    assert f"no .jpg or .jpeg file under {tmp_path}" in capsys.readouterr().err


def test_curves_of_other_lengths_are_infinitely_far_apart():
    assert largest_relative_error([1.0, 2.0], [1.0]) == float("inf")
    assert largest_relative_error([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)


def python(code, log, **options):
    return Program([sys.executable, "-c", code], log, **options)


def test_a_program_that_fails_tells_what_it_printed(tmp_path):
    program = python("print('because'); raise SystemExit(3)", tmp_path / "log")
    with pytest.raises(RuntimeError, match=r"(?s)^it ended with 3 before its work:.*because"):
        program.wait_until(lambda: False, "its work")
    with pytest.raises(RuntimeError, match=r"(?s)^it ended with 3:.*because"):
        program.finish()


def test_a_program_that_hangs_is_ended_with_what_it_started(tmp_path):
    ready, late = str(tmp_path / "ready"), str(tmp_path / "late")
    child = f"import time; open({ready!r}, 'w'); time.sleep(2); open({late!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    program = python(code, tmp_path / "log", limit=60)
    program.wait_until((tmp_path / "ready").exists, "its child")
    program.limit = 0.1
    with pytest.raises(TimeoutError, match="it hangs before its end"):
        program.wait()
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()
