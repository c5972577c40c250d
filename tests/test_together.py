"""Several seeds of one training at once: each run is the one that it would be alone."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest

from tat_jax import study, together, train
from tat_jax.metrics import read_rows
from tat_jax.sharding import make_mesh
from tat_jax.signals import Interrupted
from tests.test_study import KD, config_of

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(autouse=True)
def one_device(monkeypatch, x64):
    mesh = make_mesh(jax.devices()[:1])
    monkeypatch.setattr("tat_jax.sharding.make_mesh", lambda: mesh)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def training(seed=0, **fields):
    config = config_of({"alone": {}})
    del config.study
    config.update({"seed": seed, "epochs": 2, "eval_every": 1, "log_every": 1, "dtype": "float64", **fields})
    return config


def assert_same(ours, theirs):
    """Check that rows are the same, but for times and for rounding: of pixels, which is that of float32."""
    for here, there in zip(ours, theirs, strict=True):
        assert here.keys() == there.keys()
        names = [name for name in here if "per_second" not in name]
        np.testing.assert_allclose([here[n] for n in names], [there[n] for n in names], rtol=1e-5)


def test_runs_of_several_seeds_at_once_are_those_of_each_alone(tmp_path):
    ends = together.run(training(), {seed: tmp_path / f"seed{seed}" for seed in (0, 1)})
    for seed in (0, 1):
        train.run(training(seed), tmp_path / f"alone{seed}")
        assert_same(read_rows(tmp_path / f"seed{seed}"), read_rows(tmp_path / f"alone{seed}"))
        assert ends[seed]["last"]["step"] == 4


def test_one_that_is_stopped_saves_all_and_goes_on_alone_or_with_one_that_is_behind(tmp_path, monkeypatch):
    folders = {seed: tmp_path / f"seed{seed}" for seed in (0, 1)}
    train.run(training(0), tmp_path / "whole")
    count_step, asked = train.Training.count_step, []

    def stopped(run, *arguments):
        count_step(run, *arguments)
        if run.step == 3 and not asked:
            asked.append(run)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(train.Training, "count_step", stopped)
        with pytest.raises(Interrupted, match="stopped at step 3 of 4"):
            together.run(training(), folders)
    assert all((folder / "checkpoints" / "3").is_dir() for folder in folders.values())
    shutil.copytree(folders[0], tmp_path / "alone")
    train.run(training(0), tmp_path / "alone")
    shutil.rmtree(folders[1])
    ends = together.run(training(), folders)
    for folder in (tmp_path / "alone", folders[0]):
        assert_same(read_rows(folder), read_rows(tmp_path / "whole"))
    assert ends[1]["last"]["step"] == 4


def test_a_study_trains_the_seeds_of_a_student_so_many_at_once(tmp_path, monkeypatch):
    groups = []
    run = together.run
    monkeypatch.setattr(
        together, "run", lambda config, folders: (groups.append(list(folders)), run(config, folders))
    )
    table = study.run(config_of({"kd": KD}, seeds=(0, 1, 2), seeds_at_once=2), tmp_path)
    assert groups == [[0, 1]]
    assert "kd" in table
    assert all((tmp_path / "kd" / f"seed{seed}" / "metrics.jsonl").exists() for seed in (0, 1, 2))


def test_what_cannot_be_trained_at_once_is_refused(tmp_path, monkeypatch):
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    with pytest.raises(ValueError, match=r"mixup=0.5: .* set study.seeds_at_once to 1, or mixup to 0"):
        together.run(training(mixup=0.5), folders)
    with pytest.raises(ValueError, match="seeds 0 and 1 have other teachers"):
        together.run(training(losses=KD["losses"]), folders)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(ValueError, match="share one device, and there are 8"):
        together.run(training(), folders)
