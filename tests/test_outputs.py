"""What a command prints may be lost; that it could not be printed is no error, and no work is lost by it."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Words that ASCII lacks, a name that is no text, a bar, and work after them.
WORK = """
    import os, sys
    from tat_jax import outputs
    outputs.keep()
    from tqdm import tqdm
    with tqdm(total=3, mininterval=0, desc="Σ ×") as bar:
        for step in range(3):
            bar.update()
            bar.write(f"0.1·tat {step} \\udcff")
            print("to stderr ·", file=sys.stderr)
    open("work", "w").close()
    sys.exit(3 if outputs.are_lost() else 0)
"""


def work(folder, redirection="", *, stdout=subprocess.PIPE, stderr=subprocess.PIPE, code=WORK, **environment):
    """Return the process that did the work with its streams redirected as a shell does it."""
    command = f'exec "$0" "$@" {redirection}'
    process = subprocess.run(
        ["bash", "-c", command, sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=stdout,
        stderr=stderr,
        timeout=60,
        check=False,
    )
    assert (folder / "work").exists()
    return process


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_is_printed_arrives(unbuffered, tmp_path):
    process = work(tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert process.returncode == 0
    assert process.stdout.decode() == "".join(f"0.1·tat {step} \\udcff\n" for step in range(3))
    assert b"to stderr" in process.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_a_character_that_the_encoding_lacks_is_written_as_its_number(encoding, tmp_path):
    process = work(tmp_path, PYTHONIOENCODING=encoding)
    assert process.returncode == 0
    assert b"tat 2 \\udcff" in process.stdout


@pytest.mark.parametrize(
    ("redirection", "lost"),
    [
        ("| true", None),
        ("2>/dev/full", 0),
        (">/dev/full", 3),
        (">&-", 0),
        ("2>&-", 0),
        ("<&- >&- 2>&-", 0),
        (">/dev/full 2>/dev/full", 3),
        ("1</dev/null", 3),
    ],
)
def test_streams_that_are_full_or_closed_stop_nothing(redirection, lost, tmp_path):
    process = work(tmp_path, redirection)
    if lost is not None:
        assert process.returncode == lost
    assert b"Traceback" not in process.stderr
    assert b"Exception ignored" not in process.stderr


def test_that_stdout_is_lost_is_said_once(tmp_path):
    said = work(tmp_path, ">/dev/full").stderr.decode()
    assert said.count("stdout cannot be written: No space left on device") == 1


def test_a_reader_that_leaves_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    process = work(tmp_path, stdout=write)
    os.close(write)
    assert process.returncode == 3
    assert b"stdout cannot be written: Broken pipe" in process.stderr
    assert b"Exception ignored" not in process.stderr


def test_a_terminal_that_closes_is_no_error(tmp_path):
    master, terminal = pty.openpty()
    os.close(master)
    assert work(tmp_path, stdout=terminal, stderr=terminal).returncode == 3
    os.close(terminal)


def test_a_closed_stream_is_not_written_into_a_file_that_is_opened_later(tmp_path):
    code = """
        import os
        from tat_jax import outputs
        outputs.keep()
        with open("work", "w") as file:
            os.write(1, b"of a library")
            file.write("mine")
    """
    work(tmp_path, ">&- 2>&-", code=code)
    assert (tmp_path / "work").read_text() == "mine"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_is_full_for_a_while_is_waited_for(unbuffered, tmp_path):
    code = """
        import os
        from tat_jax import outputs
        os.set_blocking(1, False)
        outputs.keep()
        print("x" * 1_000_000)
        open("work", "w").close()
    """
    assert (
        len(work(tmp_path, "| (sleep 0.3; cat)", code=code, PYTHONUNBUFFERED=unbuffered).stdout) == 1_000_001
    )


def test_a_command_that_is_interrupted_ends_at_once_and_without_a_stack_trace(tmp_path):
    code = """
        import time
        from tat_jax import signals
        signals.act_at_once()
        open("work", "w").close()
        time.sleep(30)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "work").exists():
        pass
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == -signal.SIGINT
