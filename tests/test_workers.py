"""Processes that read: the same batches as ever, ends that are named, and nothing that is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tat_jax import sharding
from tat_jax.data.transforms import DecodeError
from tests.images import encode, photograph
from tests.interpreter import children, run_python
from tests.sources import Deadly, Greedy, Photographs, Slow
from tests.test_pipeline import assert_same, make

COUNT = 150


def is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds, seconds=20) -> None:
    since = time.monotonic()
    while not holds():
        assert time.monotonic() - since < seconds
        time.sleep(0.05)


@pytest.fixture
def reading():
    """Return a function that makes a pipeline read by processes of its own, which it returns, too."""
    made = []

    def read(source, *, processes=2, **options):
        before = children()
        made.append(make(source, processes=processes, **options))
        made[-1].start()
        return made[-1], children() - before

    yield read
    for pipeline in made:
        pipeline.close()


@pytest.fixture(scope="module", params=[(1, 0, 8, False), (2, 3, 36, True), (3, 1, 100, True)], ids=str)
def both(request):
    """Return two pipelines of the same images, one read by processes, the other as its images come."""
    processes, threads, batch_size, train = request.param
    options = {"batch_size": batch_size, "train": train}
    shared = make(Photographs(COUNT), processes=processes, threads=threads, **options)
    yield shared, make(Photographs(COUNT), **options)
    shared.close()


@settings(deadline=None, max_examples=6)
@given(st.data())
def test_batches_and_their_order_are_those_of_one_thread_from_any_step_on(both, data):
    shared, plain = both
    epoch = data.draw(st.integers(0, 3))
    start = data.draw(st.integers(0, plain.steps_per_epoch))
    left_off = data.draw(st.integers(0, 2))
    if left_off:
        abandoned = shared.epoch(epoch + 1)
        for _, _ in zip(range(left_off), abandoned, strict=False):
            pass
        abandoned.close()
    assert_same(shared.epoch(epoch, start), plain.epoch(epoch, start))


def test_several_iterations_at_once_do_not_meet(both):
    shared, plain = both
    for one, other, expected in zip(shared.epoch(2), shared.epoch(2), plain.epoch(2), strict=True):
        assert_same([one, other], [expected, expected])


def test_what_was_handed_over_stays_as_it_is_for_as_long_as_it_is_held(both):
    shared, plain = both
    mesh = sharding.make_mesh(jax.devices()[:1])
    expected = list(plain.epoch(0))
    held = list(shared.epoch(0))
    on_device = list(sharding.put_batches(shared.epoch(0), mesh))
    for _ in range(3):
        assert len(list(shared.epoch(1))) == len(expected)
    assert_same(held, expected)
    assert_same(on_device, expected)


def test_batches_are_handed_over_without_a_copy_as_a_cpu_takes_them(reading):
    data, _ = reading(Photographs(COUNT), processes=1)
    places = set()
    for batch in data.epoch(0):
        assert not batch.image.flags.owndata
        assert batch.image.ctypes.data % 64 == 0
        on_device = jax.device_put(batch.image, jax.devices()[0])
        assert on_device.unsafe_buffer_pointer() == batch.image.ctypes.data
        places.add(batch.image.ctypes.data)
    assert len(places) < data.steps_per_epoch  # memory is used again


def test_a_broken_file_stops_the_epoch_at_its_batch_with_its_name(reading):
    whole = encode(photograph())
    data, _ = reading(Photographs(COUNT, {120: whole[: len(whole) // 2], 121: b""}), train=False)
    for _ in range(2):
        batches = data.epoch(0)
        for _ in range(120 // 8):
            next(batches)
        with pytest.raises(DecodeError, match=r"^photograph 120: .*truncated[^\n]*$"):
            next(batches)
    assert len(list(data.epoch(0, start_step=16))) == data.steps_per_epoch - 16


def test_broken_files_can_be_skipped_and_are_counted(reading):
    broken = {3: b"", 40: b"<html>", 41: encode(photograph())[:300]}
    data, _ = reading(Photographs(60, broken), train=False, skip_broken=True)
    for _ in range(2):
        batches = list(data.epoch(0))
        where = np.concatenate([batch.where for batch in batches])
        assert set(np.flatnonzero(~where[:60])) == set(broken)
        assert not batches[5].image[:2].any()
    assert data.skipped == {index: f"photograph {index}" for index in broken}


def test_a_process_that_is_killed_ends_the_reading_with_its_reason(reading):
    data, processes = reading(Slow(10_000))
    batches = data.epoch(0)
    next(batches)
    killed, _ = processes
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(
        ChildProcessError, match=rf"^a process that reads images \({killed}\) was ended by SIGKILL"
    ):
        list(batches)
    wait_until(lambda: not any(map(is_there, processes)))
    assert len(next(data.epoch(0)).where) == 8  # by others


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (Greedy(COUNT), MemoryError, "Unable to allocate 1.00 EiB"),
        (
            Deadly(COUNT),
            ChildProcessError,
            r"^a process that reads .*was ended by SIGABRT: lower",
        ),
    ],
    ids=["memory", "crash"],
)
def test_a_process_that_fails_ends_the_reading_with_its_reason(reading, source, error, message):
    data, _ = reading(source, train=False)
    with pytest.raises(error, match=message):
        list(data.epoch(0))


def test_what_cannot_be_read_by_another_process_is_said(reading):
    class Local(Photographs):
        pass

    before = children()
    with pytest.raises(TypeError, match=r"^processes that read cannot be sent .*Local.*data\.processes=0"):
        reading(Local(3))
    assert children() == before


def test_a_signal_to_all_processes_is_for_the_one_that_trains(reading):
    data, processes = reading(Slow(COUNT), train=False)
    batches = data.epoch(0)
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for process in processes:
            os.kill(process, number)
    assert len(list(batches)) == data.steps_per_epoch - 1
    assert all(map(is_there, processes))
    data.close()
    assert not any(map(is_there, processes))


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit()", "raise KeyboardInterrupt"])
def test_nothing_outlives_the_process_that_trains(end):
    shared_memory = set(os.listdir("/dev/shm"))
    code = f"""if True:
        import os, sys
        from tests.sources import Slow
        from tests.test_pipeline import make
        from tests.interpreter import children
        data = make(Slow(100_000), threads=2, processes=2)
        batches = data.epoch(0)
        next(batches)
        print(*children(), flush=True)
        {end}
    """
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    processes = list(map(int, ended.stdout.split()))
    assert len(processes) == 2
    wait_until(lambda: not any(map(is_there, processes)))
    assert set(os.listdir("/dev/shm")) == shared_memory


def test_processes_that_read_import_no_jax():
    done = run_python(
        """
        import sys
        import tat_jax.data.crops, tat_jax.data.sources, tat_jax.data.worker
        print("jax" in sys.modules)
        """
    )
    assert done.stdout.strip() == "False"
