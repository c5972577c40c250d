"""What `make gpu` runs, as far as a machine without a GPU can."""

import subprocess
import sys

import pytest

from proofs.bench import sidebyside
from proofs.bench.full_size import full_size
from proofs.gpu import large_maps, loop, suite
from proofs.photographs import photographs
from proofs.program import ROOT
from tat_jax.data.source import SPLITS
from tat_jax.data.sources import open_source


def test_without_a_gpu_a_line_says_so():
    command = [sys.executable, "-m", "proofs.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no NVIDIA GPU here, only cpu" in done.stderr.splitlines()[-1]


def test_tests_are_counted_by_file_and_named_where_they_fail(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    bodies = {"good": "def test_a(): pass\n", "bad": "def test_b(): assert False\ndef test_c(): pass\n"}
    for name, body in bodies.items():
        (tmp_path / "tests" / f"test_{name}.py").write_text(body)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    good, bad = suite.results(("good", "bad"), {})
    assert (good.passed, good.failed, good.holds) == (1, (), True)
    assert (bad.passed, bad.failed, bad.holds) == (1, ("test_b",), False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_loss_is_compared_with_pytorchs_attention_in_one_kernel(dtype, monkeypatch):
    monkeypatch.setattr(sidebyside, "_PAUSE", 0)
    row = large_maps.measure_one(3, 2, 8, dtype)
    assert row.ours > 0
    assert row.ratio == row.rival / row.ours


def test_a_folder_of_photographs_has_as_many_images_as_it_should(tmp_path):
    loop.write_folder(photographs(None, 3), tmp_path, 25)
    config = full_size(on_gpu=True)
    config.data.source, config.data.root = "imagefolder", str(tmp_path)
    train, val = (open_source(config.data, split) for split in SPLITS)
    assert (len(train), len(val), train.num_classes) == (25, loop.CLASSES, loop.CLASSES)
