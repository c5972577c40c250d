"""Neither the number of devices nor that of processes changes what is computed."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from proofs.compiled_step import blank_rows, compile_step
from proofs.fidelity import collectives, counts, ddp, devices
from proofs.program import Layout, run_everywhere
from tat_jax import sharding
from tat_jax.build import build
from tat_jax.configs import r18_r34
from tat_jax.evaluate import jit_eval_step
from tat_jax.step import jit_train_step
from tests.claims import broken


def test_two_processes_of_four_devices_train_as_one_device_does_under_a_teacher_that_is_split_over_them():
    layouts = (Layout(1, 1), Layout(2, 4))
    options = "--config.bn_group=2", "--config.teacher_sharding=sharded"
    claims = devices.compare(layouts, *options, name="", bound=5e-6)
    assert len(claims) == 1
    assert broken(claims) == []


def test_groups_of_batch_norm_are_the_processes_of_ddp():
    assert broken(ddp.claims()) == []


def test_statistics_of_groups_are_not_communicated():
    claims = collectives.claims()
    assert broken(claims) == []
    grouped, whole = (claim.error for claim in claims[1:])
    assert 0 < grouped < whole


def test_what_devices_send_does_not_grow_with_the_batch():
    config = r18_r34.get_config("smoke")
    config.bn_group = 2
    sent = []
    for images in (2, 6):
        config.batch_size = 4 * images
        step = compile_step(config, blank_rows(config), devices=4)
        sent.append(step.bytes_sent())
    assert sent[0] == sent[1]
    assert min(sent[0]) > 0


def test_the_steps_lower_for_gpus_and_tpus_and_never_call_the_host():
    config = r18_r34.get_config("smoke")
    mesh = sharding.make_mesh(jax.devices()[:1])
    built = build(config, mesh, num_classes=10, steps_per_epoch=1)
    (batch,) = sharding.put_batches([blank_rows(config)], mesh)
    graph, student = nnx.split(built.student.view)
    training = jit_train_step(built.recipe, mesh).trace(built.state, built.teacher, batch)
    evaluation = jit_eval_step(mesh).trace(graph, built.recipe.task, student, batch)
    for platform in ("cuda", "tpu"):
        for traced in (training, evaluation):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert "stablehlo.convolution" in text
            assert "callback" not in text
            assert re.findall(r"custom_call @(\w+)", text) == []


def test_evaluation_counts_every_image_once_whatever_the_devices():
    assert broken(counts.claims(1_000, (7, 333, 2_000))) == []


@pytest.mark.parametrize(("devices", "batch_size", "size"), [(1, 7, 7), (3, 256, 258), (8, 8, 8), (8, 1, 8)])
def test_a_batch_for_evaluation_grows_to_a_multiple_of_the_devices(devices, batch_size, size):
    assert sharding.round_up(batch_size, sharding.make_mesh(jax.devices()[:devices])) == size


def test_batches_are_put_ahead_up_to_the_one_that_cannot_be_read_and_closed_with_whoever_takes_them():
    def read(log):
        try:
            for number in range(3):
                log.append(number)
                yield np.full(8, number)
            raise OSError("the disk is gone")
        finally:
            log.append("closed")

    mesh, log = sharding.make_mesh(), []
    batches = sharding.put_batches(read(log), mesh)
    assert [int(next(batches)[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert log == [0, 1, 2, "closed"]

    log.clear()
    batches = sharding.put_batches(read(log), mesh)
    assert int(next(batches)[0]) == 0
    batches.close()
    assert log == [0, 1, "closed"]


def test_batches_of_float64_stay_so_where_that_is_asked_for(x64):
    (batch,) = sharding.put_batches([np.linspace(0, 1, 8)], sharding.make_mesh())
    assert batch.dtype == np.float64


def test_processes_that_have_not_the_same_config_images_or_weights_are_told_and_gather_no_weights():
    said = run_everywhere(Layout(2, 2), [sys.executable, "-m", "tests.differing"])
    answers = [json.loads(text.splitlines()[-1]) for text in said]
    assert answers[0] == answers[1]
    refused = answers[0]["refused"]
    assert refused.pop("nothing") == refused.pop("how each reads") == ""
    way_out = (
        "of process 1 of 2 is another than of process 0: start all by the same command, on the same files"
    )
    assert refused == {
        "the config": f"the config {way_out}",
        "the images": f"what was found of images {way_out}",
        "the weights": f"the weights {way_out}",
    }
    assert answers[0]["whole"]


@pytest.mark.parametrize("name", ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_processes_started_by_hand_need_address_number_and_index(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match="either all or none must be set"):
        sharding.start_processes()
