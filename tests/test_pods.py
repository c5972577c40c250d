"""What a training takes of a pod of TPUs is said without one: by its compiler, where that is installed."""

import importlib.util
import math
import re

import jax
import pytest
from flax import nnx

from tat_jax import check, pods, sharding, topology
from tat_jax.build import build
from tat_jax.compiled import Program, collectives, describe
from tat_jax.configs import seg_coco_r18, seg_folder, seg_voc_r18
from tat_jax.data.pipeline import open_pipeline
from tat_jax.pods import Data
from tat_jax.step import jit_train_step
from tat_jax.topology import Device, Pod
from tests.test_check import config_of, failed, findings, narrow, tiny

ITEMS = ["config", "pod", "data", "student", "teacher", "task", "training step", "evaluation step", "time"]
ITEMS += ["largest batch", "check"]
MIB = 2**20
DATA = Data(train=1000, val=100, num_classes=10, classes=None)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep what compilers say where nothing is yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/tat_jax/pods"


def pod_of(memory=64 * MIB, *, operations=10**12, bandwidth=10**9, chips=8):
    """Return the simulated devices as if they were a pod."""
    return Pod("cpu:8", sharding.make_mesh(), chips, Device(memory, operations, bandwidth))


def program_of(images, *, moved=0.0, twice=1.0):
    """Return a program whose memory is linear in its images."""
    return Program(MIB, images * MIB, 0, twice * images * 1e9, moved, {})


def built_of(config):
    return build(
        config,
        sharding.make_mesh(jax.devices()[:1]),
        num_classes=10,
        steps_per_epoch=2,
        student=tiny(4),
        teacher=tiny(8),
    )


# Names


@pytest.mark.parametrize("name", ["v5e", "v5e-8", "8x8", "v5e:8 x 8", "v5e:", "", "v5e:8x8\n"])
def test_what_is_no_name_of_a_pod_is_answered_with_those_that_are(name):
    with pytest.raises(ValueError, match=r"is no pod of TPUs: .* v4:2x2x4, v5e:2x4, .* tpu7x:2x2x1"):
        topology.check_name(name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler_what_brings_it_is_named():
    with pytest.raises(ImportError, match=r'--topology=v5e:8x8 needs .* libtpu: pip install "jax\[tpu\]"'):
        topology.find("v5e:8x8")


# What a compiled program sends


def test_collectives_are_read_with_their_kinds_and_bytes():
    text = """
  %all-reduce.1 = (f32[64]{0:T(128)}, /*index=1*/bf16[3,3,8,8]{3,2,1,0:T(8,128)(2,1)S(1)}) all-reduce(%a, %b)
  %ag = s32[] all-gather-start(%c), replica_groups={{0,1}}
  ROOT %p = pred[16,2]{1,0} collective-permute(%d), metadata={op_name="all-reduce(x)"}
  %done = f32[64]{0} all-reduce-done(%e)
  %add = f32[64]{0} add(%all-reduce.1, %f)
"""
    found = list(collectives(text))
    assert [collective.kind for collective in found] == ["all-reduce", "all-gather", "collective-permute"]
    assert [[array.shape for array in of.arrays] for of in found] == [[(64,), (3, 3, 8, 8)], [()], [(16, 2)]]
    assert [[array.bytes for array in of.arrays] for of in found] == [[256, 1152], [4], [32]]


def test_a_program_is_described_by_what_its_compiler_says():
    whole = sharding.replicated(sharding.make_mesh())
    total = jax.jit(lambda x: x.sum(0), out_shardings=whole)
    rows = jax.ShapeDtypeStruct((8, 32), "float32", sharding=sharding.batched(sharding.make_mesh()))
    program = describe(total.lower(rows).compile())
    assert program.arguments == 32 * 4
    assert program.collectives == {"all-reduce": (1, 32 * 4)}
    assert program.memory == program.arguments + program.temporaries + program.code


# The step that is compiled


def test_the_step_of_abstract_arrays_is_that_of_the_training():
    config = config_of()
    built = built_of(config)
    mesh = sharding.make_mesh()
    state, teacher = jax.device_put((built.state, built.teacher), sharding.replicated(mesh))
    pipeline = open_pipeline(config, "train")
    (batch,) = sharding.put_batches([next(pipeline.epoch(0))], mesh)
    of_training = jit_train_step(built.recipe, mesh).lower(state, teacher, batch).compile()
    assert topology.compile_step(built, config, pod_of(), images=16) == describe(of_training)


def test_the_evaluation_is_compiled_for_the_student_alone():
    config = config_of()
    built = built_of(config)
    student = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(built.student.view)))
    found = topology.compile_evaluation(built, config, pod_of(), images=16)
    assert found.arguments == student + 2 * (16 * 16 * 3 + 4 + 1)


def test_what_was_found_is_kept_for_the_same_program_alone(cache, monkeypatch):
    config = config_of()
    built = built_of(config)
    first = topology.compile_evaluation(built, config, pod_of(), images=16)
    topology.compile_evaluation(built, config, pod_of(), images=32)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled anew"))
    again = topology.compile_evaluation(built, config, pod_of(), images=16)
    assert (again.memory, again.operations) == (first.memory, first.operations)
    assert {kind: tuple(sent) for kind, sent in again.collectives.items()} == dict(first.collectives)


# What is reckoned from it


def test_time_is_that_of_what_binds_at_its_peak():
    pod = pod_of(operations=10**12, bandwidth=10**9)
    by_operations, by_memory = (Program(0, 0, 0, 4e9, moved, {}) for moved in (1e6, 5e6))
    assert pods.seconds_at_peaks(by_operations, pod) == (pytest.approx(0.004), "operations")
    assert pods.seconds_at_peaks(by_memory, pod) == (pytest.approx(0.005), "memory")


@pytest.mark.parametrize(("price", "cost"), [(None, ""), (2.0, "US$ 1.60 at 2 a chip-hour")])
def test_a_training_takes_its_steps_and_evaluations_and_costs_its_chips(price, cost):
    config = config_of(epochs=10, eval_every=4)
    step, evaluation = Program(0, 0, 0, 5.6e12, 0, {}), Program(0, 0, 0, 5e11, 0, {})
    finding, _ = pods.reckon(config, pod_of(chips=4), DATA, step, evaluation, price)
    # 10 · 63 steps of 5.6 s and 3 evaluations of 7 batches of half a second
    assert finding.startswith("5.6e+03 ms a step, 3 images/s at the peak of what binds, operations\n")
    hours = (630 * 5.6 + 21 * 0.5) / 3600
    assert pods.seconds_in_all(config, pod_of(), DATA, step, evaluation) == pytest.approx(3600 * hours)
    assert "\n630 steps and 3 evaluations in 59 min at least" in finding
    assert ("US$" in finding) == bool(price)
    assert f"US$ {hours * 4 * 2:,.2f} at 2 a chip-hour" in finding or price is None


@pytest.mark.parametrize(
    ("group", "train", "full", "largest", "said"),
    [
        (None, 10**6, math.inf, 61, ""),  # of 64 MiB, less the arguments, a sixteenth
        (16, 10**6, math.inf, 48, "; 512 fit only, if at all, with activations computed twice"),
        (None, 10**6, 40, 39, "; "),
        (None, 100, math.inf, 13, ""),  # no more than there are
    ],
)
def test_the_largest_batch_fits_lines_up_and_was_compiled(monkeypatch, group, train, full, largest, said):
    compiled = []

    def compile_step(built, config, pod, *, images, source):
        compiled.append(images // 8)
        if images // 8 > 63:
            raise MemoryError("too large")
        return program_of(images // 8, twice=1.0 if images // 8 < full else 1.1)

    monkeypatch.setattr(topology, "compile_step", compile_step)
    config = config_of(bn_group=group)
    data = DATA._replace(train=train)
    finding, found = pods.find_largest_batch(config, None, pod_of(), data, program_of(2))
    assert largest <= found // 8 <= largest * 17 / 16
    assert found // 8 in compiled
    assert said in finding
    assert len(compiled) <= 8


@pytest.mark.parametrize(
    ("images", "group", "devices", "hold"),
    [
        (32, None, 8, True),
        (32, 256, 64, True),
        (256, 256, 8, True),
        (512, 256, 8, True),
        (1440, 256, 8, False),
        (48, 256, 16, False),
        (64, 256, 6, False),
        (3, 256, 8, True),  # all are one group
    ],
)
def test_groups_of_batch_norm_line_up_with_the_images_of_devices_or_do_not(images, group, devices, hold):
    assert pods.lines_up(images, group=group, devices=devices) == hold


# All of it


def check_pod(config, capsys, pod, **own):
    hold = check.run(config, "run", **({"student": tiny(4), "teacher": tiny(8)} | own), pod=pod)
    return hold, findings(capsys.readouterr().out)


def test_all_is_said_of_a_pod_and_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hold, found = check_pod(config_of(), capsys, pod_of())
    assert hold
    assert list(found) == ITEMS
    assert found["pod"] == (
        "cpu:8: 8 × cpu, 2 images a step on each\none has 64 MiB, 1 TFLOP/s in bfloat16 and 1 GB/s"
    )
    assert found["data"] == "20 images to train and 797 to validate, 10 classes"
    assert re.match(r"\d+ MiB of 64 MiB on each device: \d+ MiB of arguments, ", found["training step"])
    assert re.search(r"; \d+ all-reduces of \d+ MiB sent; compiled in \d+ s$", found["training step"])
    assert "\n2 steps and 1 evaluation in " in found["time"]
    assert not (tmp_path / "run").exists()


def test_neither_data_nor_weights_are_needed_and_what_is_assumed_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(topology, "compile_step", lambda *_, images, **__: program_of(images // 8))
    monkeypatch.setattr(topology, "compile_evaluation", lambda *_, images, **__: program_of(images // 8))
    config = config_of(student=narrow("weights/none"), teacher=narrow("weights/neither"))
    config.data.source = "imagefolder"
    hold, found = check_pod(config, capsys, pod_of(), student=None, teacher=None)
    assert hold
    assert found["data"].startswith("1,281,167 images to train and 50,000 to validate, 1,000 classes\nNOTE: ")
    for which, folder in (("student", "none"), ("teacher", "neither")):
        assert f"NOTE: any weights give the same program: no weights in weights/{folder}; " in found[which]


def test_a_batch_that_the_devices_cannot_share_and_one_that_does_not_fit_are_named(capsys, monkeypatch):
    hold, found = check_pod(config_of(batch_size=12), capsys, pod_of())
    assert not hold
    assert failed(found) == ["pod"]
    assert found["pod"] == "FAILED batch_size=12 is not a multiple of the 8 devices"

    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory, 34.99G exceed 15.75G.")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    hold, found = check_pod(config_of(), capsys, pod_of())
    assert failed(found) == ["training step", "evaluation step"]
    assert found["training step"] == (
        "FAILED Ran out of memory, 34.99G exceed 15.75G. "
        "Lower batch_size, set dtype=bfloat16 or take more chips"
    )


def test_the_compiler_for_tpus_compiles_for_a_pod_that_is_not_here(capsys):
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match=r"--topology=v5e:3x5 is no pod of TPUs: .*; it must be "):
        topology.find("v5e:3x5")
    pod = topology.find("v5e:2x2")
    assert (pod.chips, pod.mesh.size, pod.device.operations) == (4, 4, 197 * 10**12)
    assert topology.find("v4:2x2x1").mesh.size == topology.find("tpu7x:2x2x1").mesh.size // 2 == 4
    found = topology.compile_step(built_of(config_of()), config_of(bn_group=4), pod, images=16)
    assert found.memory < 100 * MIB
    assert found.collectives["all-reduce"][0] > 0


@pytest.mark.parametrize(("config", "counts"), [(seg_voc_r18, (10_582, 21)), (seg_coco_r18, (9_000, 182))])
def test_of_data_that_is_not_here_the_numbers_of_its_own_source_are_assumed(
    config, counts, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    said, found = pods.find_data(config.get_config())
    assert (found.train, found.num_classes) == counts
    assert "numbers are assumed" in said


def test_nothing_is_assumed_of_label_maps_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data/segments"):
        pods.find_data(seg_folder.get_config())
