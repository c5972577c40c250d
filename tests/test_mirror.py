"""A run in a bucket: as on a disk, whatever becomes of requests and of whoever makes them."""

import contextlib
import os
import signal
import time

import pytest

from tat_jax import check, mirror, study, train
from tat_jax.bucket_lock import BucketLock, LostError
from tat_jax.buckets import Bucket
from tat_jax.configs import digits
from tat_jax.inspection import describe_folder
from tat_jax.metrics import MetricWriter, read_rows
from tat_jax.mirror import Mirror
from tat_jax.signals import Interrupted
from tat_jax.weights import folders
from tat_jax.weights.remote import whole
from tests.emulator import Faults
from tests.test_main import read, refusal
from tests.test_train import assert_same_run, config_of, run

pytestmark = pytest.mark.usefixtures("unchecked")

GONE = ("404 Not Found", "NoSuchBucket")


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch):
    """Give up requests at once, and copy often."""
    monkeypatch.setattr("tat_jax.buckets._RETRIES", {"max_retries": 0})
    for name, seconds in (("_LOOK", 0.05), ("_ROWS", 0.1), ("_PATIENCE", 0.5)):
        monkeypatch.setattr(mirror, name, seconds)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run on a disk."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(config_of(), folder)
    return folder


def fetched(bucket, folder):
    """Copy what lies in a bucket onto the disk, as gsutil and aws do."""
    bucket.fetch(bucket.objects(), folder)
    return folder


def checkpoint(folder, step, text="whole"):
    """Write what stands for a checkpoint."""
    for name in ("data/metadata", "student/d/1", "_CHECKPOINT_METADATA"):
        file = folder / "checkpoints" / str(step) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{step} {text}")


# Whole runs


def test_a_run_in_a_bucket_is_that_on_a_disk_and_leaves_nothing_on_this_machine(
    emulator, uninterrupted, tmp_path
):
    bucket = Bucket("s3://bucket/runs/a")
    result = run(config_of(), str(bucket))
    assert result["last"]["step"] == 6
    here = fetched(bucket, tmp_path / "copy")
    assert_same_run(here, uninterrupted)
    assert {path.name.partition(".out")[0] for path in here.iterdir()} == (
        {path.name.partition(".out")[0] for path in uninterrupted.iterdir()} - {"lock"}
    )
    assert list((tmp_path / "cache/tat_jax/runs").iterdir()) == []
    assert run(config_of(), str(bucket)) == result  # finished, so that nothing is trained


def test_a_run_whose_bucket_vanishes_in_the_middle_ends_and_continues_to_the_bit(
    emulator, uninterrupted, tmp_path, capfd
):
    bucket = Bucket("s3://bucket/runs/a")
    copied = []

    def fail_after_the_first_checkpoint(method, path):
        copied.append(path.endswith("checkpoints/3/_CHECKPOINT_METADATA") and method == "PUT")
        return any(copied[:-1])

    emulator.faults = Faults(fail_after_the_first_checkpoint, GONE)
    with pytest.raises(OSError, match=r"^there is no bucket of s3://bucket/runs/a") as error:
        run(config_of(), str(bucket))
    assert "\n" not in str(error.value)
    assert "what was not copied lies in" in str(error.value)
    emulator.mend()
    emulator.delete("runs/a/lock.json")  # or it would be this process's until it ends
    assert folders.steps(fetched(bucket, tmp_path / "then")) == [3]
    run(config_of(), str(bucket))
    assert "continues from step 3" in capfd.readouterr().out
    assert_same_run(fetched(bucket, tmp_path / "now"), uninterrupted)


def test_a_run_that_is_stopped_is_copied_and_continues_to_the_bit_on_another_machine(
    emulator, uninterrupted, tmp_path, monkeypatch
):
    bucket = Bucket("gs://bucket/runs/a")
    take_step = train.Training.take_step

    def stopped(training, batch):
        take_step(training, batch)
        if training._position.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Training, "take_step", stopped)
    with pytest.raises(Interrupted, match="stopped at step 4 of 6"):
        run(config_of(), str(bucket))
    assert folders.steps(fetched(bucket, tmp_path / "then")) == [3, 4]
    monkeypatch.undo()
    for name, value in emulator.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine's"))
    run(config_of(), str(bucket))
    assert_same_run(fetched(bucket, tmp_path / "now"), uninterrupted)


def test_another_config_in_a_bucket_is_refused_before_it_is_locked(bucket, emulator, uninterrupted):
    emulator.copy(uninterrupted, "runs/a")
    with pytest.raises(ValueError, match=f"^{bucket} holds a run of another.*\n  seed: 0 there"):
        run(config_of(seed=1), str(bucket))
    assert "runs/a/lock.json" not in emulator.names()


# What lies in the bucket at every moment


def test_whenever_copying_ends_what_lies_in_the_bucket_is_a_run(emulator, tmp_path):
    bucket = Bucket("s3://bucket/runs/a")
    allowed = 0
    while True:
        emulator.mend()
        for name in emulator.names():
            emulator.delete(name)
        writes = []

        def fail(method, path, writes=writes, allowed=allowed):
            if method != "GET" and not path.endswith("lock.json"):
                writes.append(path)
            return len(writes) > allowed

        with contextlib.suppress(OSError), Mirror(bucket, tmp_path / "work") as ours:
            ours._ended.set()
            ours._copying.join()
            with MetricWriter(ours.folder, 0) as writer:
                for step in (1, 2):
                    writer.write(step, {"loss": 1.0})
                    checkpoint(ours.folder, step)
                    ours._copy()
                emulator.faults = Faults(fail)
                writer.write(3, {"loss": 1.0})
                checkpoint(ours.folder, 2, "saved anew")
                checkpoint(ours.folder, 3)
                for file in sorted((ours.folder / "checkpoints/1").rglob("*"), reverse=True):
                    file.unlink() if file.is_file() else file.rmdir()
                ours._copy()
        done = len(writes) <= allowed
        emulator.mend()
        emulator.delete("runs/a/lock.json")  # or it would be this process's until it ends
        with Mirror(bucket, tmp_path / "next") as theirs:
            steps = folders.steps(theirs.folder)
            assert steps
            assert len(read_rows(theirs.folder)) >= steps[-1]
            for step in steps:
                files = (theirs.folder / "checkpoints" / str(step)).rglob("*")
                texts = [file.read_text() for file in files if file.is_file()]
                assert (len(texts), len(set(texts))) == (3, 1)
        if done:
            assert steps == [2, 3]
            break
        allowed += 1
    assert allowed > 8


def test_what_a_kill_left_half_copied_is_removed(bucket, emulator, tmp_path):
    emulator.write("runs/a/checkpoints/7/student/d/1", b"half")
    emulator.write("runs/a/checkpoints/7.orbax-checkpoint-tmp/1", b"half")
    with Mirror(bucket, tmp_path / "work") as ours:
        assert folders.steps(ours.folder) == []
    assert not any("checkpoints/7/" in name for name in emulator.names())


def test_rows_are_copied_while_the_run_goes_on(bucket, emulator, tmp_path):
    with Mirror(bucket, tmp_path / "work") as ours, MetricWriter(ours.folder, 0) as writer:
        writer.write(1, {"loss": 1.0})
        until(lambda: "runs/a/metrics.jsonl" in emulator.names())
        writer.write(2, {"loss": 1.0})
        until(lambda: emulator.read("runs/a/metrics.jsonl").count(b"\n") == 2)


def test_a_short_failure_is_told_and_outlived(bucket, emulator, tmp_path, capfd):
    with Mirror(bucket, tmp_path / "work") as ours:
        emulator.faults = Faults(lambda *_: True)
        checkpoint(ours.folder, 1)
        until(lambda: ours._failure is not None)
        emulator.mend()
        until(lambda: ours._failure is None)
        ours.check()
    assert "503 Service Unavailable; the run goes on, and copies again" in capfd.readouterr().err
    assert whole(bucket.objects("checkpoints"))


def test_after_a_long_failure_the_run_is_told(bucket, emulator, tmp_path):
    ours = Mirror(bucket, tmp_path / "work").__enter__()
    emulator.faults = Faults(lambda *_: True)
    checkpoint(ours.folder, 1)
    until(lambda: time.monotonic() - ours._fails_since > 0.6)
    with pytest.raises(OSError, match="503"):
        ours.check()
    with pytest.raises(OSError, match=r"503.*what was not copied lies in"):
        ours.__exit__(None, None, None)


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_bucket(bucket, emulator, tmp_path, capfd):
    ours = Mirror(bucket, tmp_path / "work").__enter__()
    checkpoint(ours.folder, 1)
    emulator.faults = Faults(lambda *_: True)
    ours.__exit__(FloatingPointError, FloatingPointError("of the run"), None)
    assert "what was not copied lies in" in capfd.readouterr().err


def until(holds):
    """Wait until something holds."""
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never holds")


# One run at a time


def lock(bucket, beat=0.05, stale=0.5):
    return BucketLock(bucket, beat=beat, stale=stale)


def elsewhere(held):
    """Let a lock be that of another machine."""
    held._said["process"] = ["another boot", *held._said["process"][1:]]
    return held


def test_of_two_runs_in_a_bucket_the_second_is_refused_until_the_first_is_done(bucket, emulator):
    answer = f"^another run is at work in {bucket}: .*, process "
    with lock(bucket), pytest.raises(ValueError, match=answer), lock(bucket):
        pass
    assert "runs/a/lock.json" not in emulator.names()
    with lock(bucket):
        pass


def test_the_lock_of_a_run_that_is_not_heard_of_is_taken_over_and_that_run_learns_it(bucket, emulator, capfd):
    with elsewhere(lock(bucket, beat=100)) as silent, lock(bucket):
        assert "waiting for up to 0 s for a sign of life" in capfd.readouterr().err
        with pytest.raises(LostError, match=f"another run has taken over {bucket}"):
            silent.renew()
        assert "runs/a/lock.json" in emulator.names()


def test_the_lock_of_a_process_that_is_gone_from_this_machine_is_taken_over_at_once(bucket):
    with lock(bucket, beat=100) as killed:
        killed._said["process"][3] = "started at another time"
        killed.renew()
        with lock(bucket, beat=0.05, stale=1000):
            pass


def test_a_lock_whose_answer_was_lost_is_still_ours(bucket, emulator):
    with lock(bucket, beat=100) as ours:
        ours._write(ours._stamp)  # as if the client had sent it, and heard nothing
        ours.renew()


def test_a_lock_that_is_damaged_becomes_stale(bucket, emulator):
    emulator.write("runs/a/lock.json", b"\x00")
    with lock(bucket):
        pass


def test_a_run_that_was_taken_over_writes_no_more(bucket, emulator, tmp_path):
    ours = Mirror(bucket, tmp_path / "work").__enter__()
    emulator.write("runs/a/lock.json", b'{"owner": "another"}')
    (ours.folder / "metrics.jsonl").write_text("")
    until(lambda: ours._failure is not None)
    with pytest.raises(LostError):
        ours.check()
    with pytest.raises(OSError, match=f"^another run has taken over {bucket}"):
        ours.__exit__(None, None, None)
    assert "runs/a/metrics.jsonl" not in emulator.names()
    assert emulator.read("runs/a/lock.json") == b'{"owner": "another"}'


# What is said before


def test_check_says_what_a_run_in_a_bucket_continues_and_writes_nothing(
    bucket, emulator, uninterrupted, tmp_path
):
    assert "runs/a: starts; " in describe_folder(config_of(), bucket)[0]
    emulator.copy(uninterrupted, "runs/a")
    emulator.write("runs/a/checkpoints/9/data/metadata", b"half")
    there = emulator.names()
    said, _ = describe_folder(config_of(epochs=3), bucket)
    assert said.startswith(f"{bucket}: continues from step 6; ")
    assert f" free in {tmp_path}/cache/tat_jax/runs/a-" in said
    assert said.endswith("\nchanged: epochs: 2 there, 3 now")
    emulator.write("runs/a/lock.json", b'{"owner": "me@there, process 7"}')
    assert "\nNOTE: locked by me@there, process 7; a run waits" in describe_folder(config_of(), bucket)[0]
    assert emulator.names() == there | {"runs/a/lock.json"}


def test_check_says_in_a_line_what_hinders_a_run_in_a_bucket(bucket, emulator):
    emulator.faults = Faults(lambda *_: True, GONE)
    with pytest.raises(FileNotFoundError, match=f"^there is no bucket of {bucket}$"):
        describe_folder(config_of(), bucket)


def test_a_study_in_a_bucket_is_refused_before_anything_is_asked_of_it(bucket, emulator):
    for command in (study.run, check.run):
        with pytest.raises(ValueError, match=f"^{bucket}: a study is kept on a disk; each of its runs"):
            command(digits.get_config("smoke"), str(bucket))
    assert emulator.faults.requests == []


def test_a_command_finds_the_config_of_a_run_in_a_bucket(bucket, emulator, uninterrupted, monkeypatch):
    assert "runs/a: name a config with --config" in refusal(f"--workdir={bucket}")
    emulator.copy(uninterrupted, "runs/a")
    monkeypatch.setenv("RUNS", str(bucket).removesuffix("/a"))
    for workdir in (str(bucket), "$RUNS/a"):
        config, folder, origin = read("--mode=eval", f"--workdir={workdir}")
        assert (str(folder), config.batch_size) == (str(bucket), 16)
        assert origin == f"without --config: that of the run, {bucket}/config.json"
