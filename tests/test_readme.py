"""What README prints of networks and losses of one's own runs as it is printed."""

import json
import re
import shlex
from pathlib import Path

import grain  # noqa: F401  it defines flags, which must be there before they are saved
import pytest
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import load_file

from tat_jax import cli, convert
from tat_jax.metrics import read_rows

README = (Path(__file__).parents[1] / "README.md").read_text()
NETWORK, LOSS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Work in a folder that holds mine.py, and leave no flag set."""
    (tmp_path / "mine.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        yield tmp_path


def main(words):
    flags.FLAGS.unparse_flags()
    cli.parse_flags(["main.py", *words])
    cli.main([])


def test_a_network_of_one_s_own_is_trained_evaluated_and_exported(here, capsys):
    commands = [shlex.split(line) for line in README.splitlines() if "--student mine.py:Network" in line]
    (_, script, *training), (_, _, *evaluation), (_, _, module, *exporting) = commands
    assert (script, module) == ("main.py", "tat_jax.convert")
    main(training)
    measured = read_rows(here / "runs/mine")[-1]["eval/top1"]
    capsys.readouterr()
    main(evaluation)
    assert capsys.readouterr().out.startswith(f"top-1 {measured:.2%}")
    convert.main(exporting)
    shapes = {name: array.shape for name, array in load_file(here / "mine.safetensors").items()}
    assert shapes == {
        "conv.weight": (64, 3, 32, 32),
        "conv.bias": (64,),
        "fc.weight": (10, 64),
        "fc.bias": (10,),
    }
    usage = json.loads((here / "mine.json").read_text())
    assert usage["classes"] == [str(digit) for digit in range(10)]
    assert usage["image"] == {"shorter_side": 64, "centre": 64}
    assert json.loads((here / "runs/mine/usage.json").read_text()) == usage


def test_a_loss_of_one_s_own_is_trained_and_logged(here):
    exec(compile(LOSS, "README.md", "exec"), {})  # as it is printed
    assert read_rows(here / "runs/regression")[0]["train/mine"] > 0
