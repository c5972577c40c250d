"""The command line: a mistake is answered in a line or two that name it, never with a stack trace."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tat_jax import cli

MAIN = Path(__file__).parents[1] / "main.py"


def answer(*arguments, folder):
    process = subprocess.run(
        [sys.executable, MAIN, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return process.returncode, process.stderr + process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batch_sise=3"], 'Did you mean "batch_size" instead of "batch_sise"?'),
        (["--config.losses.tat.layer4.wieght=3"], 'Did you mean "weight" instead of "wieght"?'),
        (["--config.batch_size=many"], "--config.batch_size=many"),
        (
            [f"--config={MAIN.parent}/configs/r18_r34.py:smok"],
            "takes the argument 'smoke' or none, not 'smok'",
        ),
        (["--config=nothing.py"], "nothing.py"),
        ([f"--config={MAIN.parent}/configs/r18_r34.py"], "no folder data/imagenet"),
        (
            ["--mode=eval", "--workdir=runs/none"],
            "no checkpoint in runs/none: train one with main.py --workdir",
        ),
        (["--mode=eval", "--checkpoint=weights/none"], "weights/none"),
    ],
)
def test_a_mistake_is_named(arguments, message, tmp_path):
    code, text = answer(*arguments, folder=tmp_path)
    assert code == 1
    assert message in text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) <= 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "processes", "answer"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory\nallocating", 1, "memory is full: lower --config.batch_size"),
        ("UNKNOWN: Gloo all-reduce failed", 2, "lost one of the 2 processes; .*run the same command again"),
        ("INTERNAL: something else", 1, "^INTERNAL: something else$"),
    ],
)
def test_what_the_devices_report_comes_with_what_it_may_come_of(said, processes, answer):
    assert re.search(answer, cli._of_devices(said, processes))


def test_help_names_the_flags(tmp_path):
    _, text = answer("--help", folder=tmp_path)
    assert all(flag in text for flag in ("--config", "--workdir", "--mode", "--checkpoint"))
