"""The short forms of `make torture`, run by `make proofs`: what is done to a run or a file is survived."""

import signal

import numpy as np
import pytest

from proofs.report import table
from proofs.torture import buckets, disk, elastic, endurance, hosts, kill, preemption, processes
from proofs.torture.pod import Pod
from proofs.torture.small_run import CLASSIFICATION, SEGMENTATION, finish


def assert_survived(faults):
    assert faults
    assert all(fault.tried > 0 for fault in faults)
    assert [fault for fault in faults if not fault.holds] == [], table(faults)


@pytest.mark.parametrize(
    ("phases", "epochs", "miniature"), [(kill.PHASES, 12, CLASSIFICATION), (("a step",), 6, SEGMENTATION)]
)
def test_a_run_that_was_killed_anywhere_equals_the_uninterrupted_one(phases, epochs, miniature):
    assert_survived(kill.faults(phases, epochs=epochs, miniature=miniature))


def test_sigterm_and_ctrl_c_save_and_end_and_a_second_one_leaves_at_once():
    assert_survived(preemption.faults(preemption.SIGNALS, epochs=12))


def test_a_run_continues_on_other_devices_and_with_other_threads(tmp_path):
    assert_survived([elastic.device_fault(tmp_path)])


@pytest.mark.parametrize("start", ["2 processes as on SLURM", "2 processes as on a TPU pod"])
def test_processes_find_each_other(start):
    assert_survived(processes.start_faults((start,)))


def test_each_of_two_processes_names_its_own_half_of_a_batch_that_is_no_number():
    assert_survived([processes.share_fault()])


def test_when_one_process_dies_the_other_ends_and_both_continue_exactly():
    assert_survived(processes.kill_faults((1,)))


def test_each_of_four_hosts_reads_its_own_images_and_writes_its_own_quarter_of_the_arrays():
    (four,) = hosts.hosts((4,))
    assert four.holds, table([four])
    assert four.images == 64
    assert four.shares == pytest.approx((0.25, 0.25), abs=0.01)


def test_a_signal_to_one_of_four_hosts_ends_all_and_costs_no_step_and_a_kill_those_since_the_checkpoint(
    tmp_path,
):
    pod = Pod(tmp_path, 4, 0.02)
    told, killed = pod.hit(3, signal.SIGTERM), pod.hit(2, signal.SIGKILL)
    assert told.wrong == killed.wrong == []
    assert told.lost == 0 <= killed.lost
    assert pod.finish(pod.epoch()) == []


def test_a_run_in_a_bucket_goes_on_elsewhere_and_in_processes_that_share_no_disk():
    assert_survived(buckets.faults_in_short())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run that met nothing."""
    folder = tmp_path_factory.mktemp("disk") / "whole"
    finish(folder, disk.EPOCHS)
    return folder


@pytest.mark.skipif(not disk.can_isolate(), reason="this machine lets nobody mount a small disk")
def test_a_disk_that_is_full_or_read_only_or_loses_the_folder_costs_no_good_checkpoint(whole):
    assert_survived(disk.run_faults(whole, sizes=("3m",)))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(whole):
    assert_survived(disk.damaged_checkpoints(whole, files=4))


def test_memory_files_and_speed_that_change_in_a_long_run_are_seen():
    flat = np.ones(60)
    grows = np.linspace(1, 1.2, 60)
    flat_record = endurance.Record(np.arange(60.0), 500 * flat, 20 * flat, 900 * flat)
    assert_survived(endurance.changes(flat_record))
    for changed in (
        flat_record._replace(resident=500 * grows),
        flat_record._replace(files=20 * grows),
        flat_record._replace(speed=900 / grows),
    ):
        assert [fault.survived for fault in endurance.changes(changed)].count(0) == 1
