"""CRD: its authors' figures, PyTorch's, its memory and its negatives, on any devices and in little memory."""

import functools
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from proofs.fidelity import rival_losses, rival_memory
from tat_jax import train
from tat_jax.batch import Batch
from tat_jax.build import build
from tat_jax.configs import base
from tat_jax.data.source import Example, all_labels
from tat_jax.distill import TrainState
from tat_jax.losses import crd
from tat_jax.losses.crd import CRD, Memory, draw_negatives
from tat_jax.metrics import read_rows
from tat_jax.networks.view import Outputs
from tat_jax.sharding import batched, make_mesh
from tat_jax.signals import Interrupted
from tat_jax.step import places_of
from tests.claims import broken
from tests.test_train import assert_same_run
from tests.tiny import Tiny

FIGURES = json.loads((Path(__file__).parent / "golden" / "rivals.json").read_text())
STEPS = list(rival_memory.steps([case for case in FIGURES["losses"] if case["method"] == "CRD"]))
IMAGES, FEATURES, BATCH, NEGATIVES = 30, 5, 6, 11


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def inputs(scale=0.0):
    """Return embeddings of a student and a teacher, a memory, indices and negatives."""
    memory = Memory(
        drawn(IMAGES, FEATURES, seed=3) / 2,
        drawn(IMAGES, FEATURES, seed=4) / 2,
        jnp.asarray(scale),
        jnp.asarray(2 * scale),
    )
    rng = np.random.default_rng(5)
    index = rng.permutation(IMAGES)[:BATCH]
    negatives = np.stack([rng.permutation(IMAGES)[:NEGATIVES] for _ in range(BATCH)])
    return drawn(BATCH, FEATURES, seed=1), drawn(BATCH, FEATURES, seed=2), memory, index, negatives


@pytest.mark.parametrize("case", STEPS, ids=lambda case: f"step {case['last']}")
def test_values_gradients_and_memory_are_those_recorded_of_the_authors_code(case, x64):
    assert broken(list(rival_losses.claims({"losses": [case]}, rival_memory.METHODS))) == []


def of_pytorch(student, teacher, memory, index, negatives):
    """Return the loss of each image, its gradients by both embeddings, and the memory afterwards."""
    ours, theirs = (torch.tensor(np.array(x), requires_grad=True) for x in (student, teacher))
    rows = [torch.tensor(np.array(x)) for x in memory[:2]]
    chosen = torch.tensor(np.concatenate([index[:, None], negatives], 1))
    units = [torch.nn.functional.normalize(x) for x in (ours, theirs)]
    noise, value, scales = negatives.shape[1] / IMAGES, 0, []
    for v, others, scale in zip(units, rows[::-1], memory[2:], strict=True):
        likeness = torch.exp(torch.einsum("bkd,bd->bk", others[chosen], v) / 0.07)
        scales.append(float(scale) or float(likeness.detach().mean() * IMAGES))
        q = likeness / scales[-1]
        own = q[:, 0] / (q[:, 0] + noise + 1e-7)
        value = value - own.log() - (noise / (q[:, 1:] + noise + 1e-7)).log().sum(1)
    value.sum().backward()
    for of, v in zip(rows, units, strict=True):
        of[index] = torch.nn.functional.normalize((of[index] + v.detach()) / 2)
    return value.detach(), ours.grad, theirs.grad, Memory(*rows, *scales)


@pytest.mark.parametrize("scale", [0.0, 40.0], ids=["first batch", "later"])
def test_values_gradients_and_memory_are_pytorchs(scale, x64):
    student, teacher, *others = inputs(scale)
    value, memory = crd(student, teacher, *others)
    gradients = jax.grad(lambda s, t: crd(s, t, *others)[0].sum(), argnums=(0, 1))(student, teacher)
    expected = of_pytorch(student, teacher, *others)
    for ours, theirs in zip((value, *gradients, *memory), (*expected[:3], *expected[3]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_memory_that_is_read_in_many_blocks_is_read_once(x64, monkeypatch):
    student, teacher, *others = inputs()
    whole = crd(student, teacher, *others)
    # Two pieces of 15 rows each, of which 4 are no divisor.
    monkeypatch.setattr(sys.modules[CRD.__module__], "_BLOCK", 2 * 4 * BATCH * 8)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12), crd(student, teacher, *others), whole
    )


def test_padding_changes_neither_value_nor_gradient_nor_memory(x64):
    student, teacher, memory, index, negatives = inputs()
    where = np.arange(BATCH) < 4
    index = np.where(where, index, -1)

    def mean(s, t, rows, where):
        value, after = crd(s, t, memory, index[rows], negatives[rows], where=where)
        return jnp.mean(value, where=where), after

    padded, gradient = jax.value_and_grad(mean, has_aux=True)(student, teacher, slice(None), where)
    alone, expected = jax.value_and_grad(mean, has_aux=True)(student[:4], teacher[:4], slice(4), None)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), padded, alone)
    np.testing.assert_allclose(gradient[:4], expected, rtol=1e-12)
    np.testing.assert_array_equal(gradient[4:], 0)


def test_the_memory_has_no_gradient(x64):
    student, teacher, memory, *others = inputs()
    gradient = jax.grad(lambda rows: crd(student, teacher, memory._replace(teacher=rows), *others)[0].sum())
    np.testing.assert_array_equal(gradient(memory.teacher), 0)


CLASSES = np.repeat(np.arange(5), (3, 9, 6, 4, 8))


def negatives_of(step, labels=CLASSES[:12], count=NEGATIVES):
    key = jax.random.fold_in(jax.random.key(0), step)
    return np.asarray(draw_negatives(key, jnp.asarray(CLASSES), jnp.asarray(labels), count=count, largest=9))


def test_negatives_are_so_many_different_images_of_other_classes():
    for step in range(20):
        drawn = negatives_of(step)
        assert (drawn.sum(1) == NEGATIVES).all()
        assert not (drawn & (CLASSES[:12, None] == CLASSES)).any()


def test_negatives_follow_from_the_key_and_differ_by_image_and_step():
    np.testing.assert_array_equal(negatives_of(3), negatives_of(3))
    assert (negatives_of(3) != negatives_of(4)).any()
    same_class = negatives_of(3, labels=np.ones(12, int))
    assert len(np.unique(same_class, axis=0)) > 6


def test_every_pair_of_images_of_other_classes_is_equally_likely():
    count, others = 3, np.flatnonzero(CLASSES != 1)
    draw = jax.jit(
        jax.vmap(functools.partial(draw_negatives, count=count, largest=9), in_axes=(0, None, None))
    )
    keys = jax.random.split(jax.random.key(1), 20_000)
    found = np.asarray(draw(keys, jnp.asarray(CLASSES), jnp.ones(1, jnp.int32)))[:, 0, others].astype(int)
    n = len(others)
    expected = len(keys) * count * (count - 1) / (n * (n - 1))
    pairs = (found.T @ found)[np.triu_indices(n, 1)]
    assert pairs.sum() == len(keys) * count * (count - 1) / 2
    assert abs(pairs - expected).max() < 5 * np.sqrt(expected)


def outputs(x):
    return Outputs(None, {"pooled": x})


def module_and_batch(images, *, batch=8, classes=4, **options):
    labels = np.arange(images) % classes
    loss = CRD(6, 7, labels, rngs=nnx.Rngs(0), **options)
    rows = np.arange(batch, dtype=np.int32)
    return loss, Batch(np.zeros((batch, 1, 1, 3), np.uint8), labels[:batch], np.ones(batch, bool), rows)


def step_of(loss, *, taps):
    """Return a function of what the loss holds, the taps and a batch: its value, gradients and state."""
    graph = nnx.graphdef(loss)

    def value(params, rest, student, teacher, batch):
        module = nnx.merge(graph, params, rest, copy=True)
        value = module(outputs(student), outputs(teacher), batch, train=True)
        return jnp.mean(value, where=batch.where), nnx.state(module, nnx.Not(nnx.Param))

    return jax.value_and_grad(value, argnums=(0, 2) if taps else 0, has_aux=True)


def test_on_eight_devices_it_is_what_it_is_on_one(x64):
    loss, batch = module_and_batch(40, batch=16, features=5, negatives=NEGATIVES, dtype=jnp.float64)
    params, rest = nnx.state(loss, nnx.Param, ...)
    student, teacher = drawn(16, 6, seed=1), drawn(16, 7, seed=2)
    step = jax.jit(step_of(loss, taps=True))
    alone = step(params, rest, student, teacher, batch)
    mesh = make_mesh()
    state = TrainState(jnp.zeros(()), params, rest, ())
    spread_state = jax.device_put(state, places_of(state, mesh))
    assert not spread_state.variables["student_memory"][...].is_fully_replicated
    images = jax.device_put((student, teacher, batch), batched(mesh))
    spread = step(spread_state.params, spread_state.variables, *images)
    ours, theirs = (jax.tree.leaves((value, nnx.to_pure_dict(rest))) for (value, rest), _ in (spread, alone))
    for a, b in zip(ours, theirs, strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-10)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14), spread[1], alone[1])


def test_a_step_with_all_16384_negatives_takes_less_than_64_mib_and_changes_its_memory_in_place():
    loss, batch = module_and_batch(20_000, batch=64, classes=100)
    params, rest = nnx.state(loss, nnx.Param, ...)
    step = jax.jit(step_of(loss, taps=True), donate_argnums=1)
    program = step.lower(params, rest, jnp.zeros((64, 6)), jnp.zeros((64, 7)), batch).compile()
    # Of 50,000 images it is 16 MiB; a copy of one memory of 20,000 would be 10.
    assert program.memory_analysis().temp_size_in_bytes < 16 * 2**20
    assert "f32[64,16385,128]" not in program.as_text()


@pytest.mark.parametrize("fill", ["equal rows", "zeros", "far apart"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_nan_at_the_edges_and_the_loss_is_float32(fill, dtype):
    loss, batch = module_and_batch(40, negatives=NEGATIVES, dtype=dtype)
    student, teacher = drawn(8, 6, seed=1).astype(dtype), drawn(8, 7, seed=2).astype(dtype)
    if fill == "equal rows":
        student = jnp.broadcast_to(student[:1], student.shape)
    elif fill == "zeros":
        student, teacher = jnp.zeros_like(student), jnp.zeros_like(teacher)
        loss.student.bias[...] = jnp.zeros_like(loss.student.bias[...])
    else:
        student, teacher = (jnp.where(x > 0, 1e4, -1e4).astype(dtype) for x in (student, teacher))
    params, rest = nnx.state(loss, nnx.Param, ...)
    (value, after), gradients = step_of(loss, taps=True)(params, rest, student, teacher, batch)
    assert value.dtype == jnp.float32
    floats = [x for x in jax.tree.leaves((value, after, gradients)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert all(jnp.isfinite(x.astype(jnp.float32)).all() for x in floats)


def test_out_of_training_the_memory_stays():
    loss, batch = module_and_batch(40, negatives=NEGATIVES)
    before = loss.memory
    loss(outputs(drawn(8, 6)), outputs(drawn(8, 7)), batch, train=False)
    jax.tree.map(np.testing.assert_array_equal, loss.memory, before)


def test_batches_without_indices_are_refused():
    loss, batch = module_and_batch(40, negatives=NEGATIVES)
    with pytest.raises(ValueError, match="by its index, and the batch has no indices"):
        loss(outputs(drawn(8, 6)), outputs(drawn(8, 7)), batch._replace(indices=None), train=True)


def test_more_negatives_than_there_are_images_of_other_classes_are_refused():
    module_and_batch(40, negatives=30)
    with pytest.raises(ValueError, match="negatives=31, and of the 40 images 30 are of another class"):
        module_and_batch(40, negatives=31)


def config_of(**changes):
    config = base.base()
    config.update({"epochs": 2, "batch_size": 16, "log_every": 1, "bn_group": 8})
    taps = {"student_tap": "layer2", "teacher_tap": "layer2"}
    config.losses = {
        "cross_entropy": base.loss("cross_entropy", weight=1.0),
        "crd": base.loss("crd", weight=0.8, features=8, negatives=20, **taps),
    }
    config.data.update(
        {"source": "digits", "labels_per_class": 4, "image_size": 16, "eval_resize": 16, "threads": 1}
    )
    with config.ignore_type():
        for name, value in changes.items():
            config[name] = value
    return config


def run(config, folder):
    student, teacher = (Tiny(width, classes=10, rngs=nnx.Rngs(i)) for i, width in enumerate((4, 8)))
    return train.run(config, folder, student=student, teacher=teacher)


def test_an_interrupted_run_remembers_and_draws_as_if_it_had_not_been_and_on_other_devices_nearly_so(
    tmp_path, monkeypatch
):
    run(config_of(), tmp_path / "whole")
    save = train.Training.save_if_asked

    def stop(training):
        if training._position.step == 4:
            training._signals.received = 15
        save(training)

    with monkeypatch.context() as patched:
        patched.setattr(train.Training, "save_if_asked", stop)
        with pytest.raises(Interrupted):
            run(config_of(), tmp_path / "stopped")
    shutil.copytree(tmp_path / "stopped", tmp_path / "on one")
    run(config_of(), tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    one = make_mesh(jax.devices()[:1])
    monkeypatch.setattr("tat_jax.sharding.make_mesh", lambda: one)
    run(config_of(), tmp_path / "on one")
    ours, theirs = (crd_of(tmp_path / name) for name in ("on one", "whole"))
    assert ours == pytest.approx(theirs, rel=1e-4)


def crd_of(run):
    return [row["train/crd"] for row in read_rows(run) if "train/crd" in row]


def test_it_is_built_with_the_classes_of_all_images():
    config, classes = config_of(), np.arange(40) % 10
    options = {"num_classes": 10, "steps_per_epoch": 3, "student": Tiny(4, classes=10, rngs=nnx.Rngs(0))}
    options["teacher"] = Tiny(8, classes=10, rngs=nnx.Rngs(1))
    built = build(config, make_mesh(), labels=lambda: classes, **options)
    np.testing.assert_array_equal(built.state.variables["losses"]["crd"]["classes"][...], classes)
    with pytest.raises(ValueError, match="crd: it reads the class of every image"):
        build(config, make_mesh(), **options)


class Maps:
    """Images with a label map each."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Example(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), str(index))


def test_label_maps_are_no_classes():
    with pytest.raises(ValueError, match="are no classes"):
        all_labels(Maps())
