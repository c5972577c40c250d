"""The training step: what it trains, what it leaves alone, and that devices and padding do not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tat_jax import distill, sharding
from tat_jax.distill import Batch, Distillation, LossWeights, Task, TatWeight
from tat_jax.tat import TargetAwareTransformer
from tests.tiny import Tiny

ALL_TERMS = LossWeights(
    alpha=0.5, beta=0.5, temperature=2.0, tat={"layer1": TatWeight(0.2), "layer2": TatWeight(0.1, heads=2)}
)

WIDTHS = {"layer1": 4, "layer2": 8}  # of the student's taps; the teacher's are twice as wide


def make(weights=ALL_TERMS, dtype=jnp.float32, bn_group=None, optimizer=None):
    """Return a task with a narrow teacher and student, its first state, and the teacher's arrays."""
    student = Tiny(4, dtype=dtype, bn_group=bn_group, rngs=nnx.Rngs(0))
    teacher = Tiny(8, dtype=dtype, rngs=nnx.Rngs(1))
    embeddings = {
        tap: TargetAwareTransformer(
            width,
            2 * width,
            **{name: value for name, value in tat._asdict().items() if name != "weight"},
            dtype=dtype,
            bn_group=bn_group,
            rngs=nnx.Rngs(2),
        )
        for tap, tat in weights.of_taps().items()
        for width in (WIDTHS[tap],)
    }
    distillation = Distillation(student, embeddings)
    optimizer = optimizer or optax.sgd(0.05)
    graph, teacher_state = nnx.split(teacher)
    task = Task(nnx.graphdef(distillation), graph, True, weights, optimizer, lambda step: 0.05)
    return task, distill.init_state(distillation, optimizer), teacher_state


def batch_of(size, *, valid=None, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8)
    return Batch(image, rng.integers(0, 5, size), np.arange(size) < (size if valid is None else valid))


@functools.cache
def compiled(bn_group=None):
    task, state, teacher = make(bn_group=bn_group)
    return jax.jit(functools.partial(distill.train_step, task)), state, teacher


def assert_same_states(a, b, rtol=2e-4, atol=2e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_a_step_trains_student_and_embeddings_and_reports_every_term():
    step, state, teacher = compiled()
    after, metrics = step(state, teacher, batch_of(8))
    assert int(after.step) == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    assert all(jax.tree.leaves(moved))
    expected = 0.5 * metrics["cross_entropy"] + 0.5 * 4 * metrics["kl"]
    expected += 0.2 * metrics["tat_layer1"] + 0.1 * metrics["tat_layer2"]
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert {"learning_rate", "gradient_norm", "teacher_agreement", "train_top1"} <= metrics.keys()


def test_steps_on_one_batch_lower_the_loss():
    step, state, teacher = compiled()
    losses = []
    for _ in range(8):
        state, metrics = step(state, teacher, batch_of(8))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"embedding_kernel": 1, "trainable_key": True}, {"per_teacher_position": True}],
    ids=["published", "trainable key", "per teacher position"],
)
def test_the_gradient_to_the_teacher_is_exactly_zero(options):
    task, state, teacher = make(ALL_TERMS._replace(tat={"layer2": TatWeight(0.1, heads=2, **options)}))
    gradient = jax.jit(
        jax.grad(lambda teacher: distill.train_step(task, state, teacher, batch_of(4))[1]["loss"])
    )(teacher)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


def test_padding_changes_nothing():
    step, state, teacher = compiled()
    padded, metrics = step(state, teacher, batch_of(8, valid=6))
    whole, expected = step(state, teacher, Batch(*(x[:6] for x in batch_of(8))))
    assert_same_states((padded, metrics), (whole, expected))


def test_a_group_of_padding_alone_does_no_harm():
    step, state, teacher = compiled(bn_group=4)
    padded, metrics = step(state, teacher, batch_of(8, valid=4))
    whole, expected = step(state, teacher, Batch(*(x[:4] for x in batch_of(8))))
    assert_same_states((padded, metrics), (whole, expected))


@pytest.mark.parametrize("bn_group", [None, 4])
def test_eight_devices_take_the_step_of_one(bn_group):
    step, state, teacher = compiled(bn_group)
    mesh = sharding.make_mesh()
    everywhere = jax.device_put((state, teacher), sharding.replicated(mesh))
    spread = jax.device_put(batch_of(16, valid=13), sharding.batched(mesh))
    assert_same_states(step(*everywhere, spread), step(state, teacher, batch_of(16, valid=13)))


def test_terms_of_weight_zero_are_not_computed():
    weights = LossWeights(1.0, 0.0, 1.0, {"layer2": TatWeight(0.0)})
    assert not weights.need_teacher()
    task, state, _ = make(weights)
    task = task._replace(teacher=None, teacher_has_head=False)
    _, metrics = jax.jit(functools.partial(distill.train_step, task))(state, None, batch_of(4))
    assert metrics.keys().isdisjoint({"kl", "tat_layer2", "teacher_agreement"})
    assert float(metrics["loss"]) == float(metrics["cross_entropy"])


def test_bfloat16_keeps_parameters_statistics_and_losses_in_float32():
    task, state, teacher = make(dtype=jnp.bfloat16)
    after, metrics = jax.jit(functools.partial(distill.train_step, task))(state, teacher, batch_of(4))
    kept = jax.tree.leaves((after.params, after.batch_stats, metrics))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}
    reference = compiled()[0](*compiled()[1:], batch_of(4))[1]
    assert float(metrics["loss"]) == pytest.approx(float(reference["loss"]), rel=0.05)


def test_evaluation_counts_as_a_stable_sort_does_ties_and_nan_included():
    class Table(nnx.Module):
        """Return rows of logits that are written into the image's first channel."""

        def __call__(self, images):
            return images[:, 0, :, 0]

    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (64, 8)).astype(np.float32)  # many ties
    logits[-1] = np.nan
    labels, where = rng.integers(0, 8, 64), np.arange(64) % 5 > 0
    images = np.broadcast_to(logits[:, None, :, None], (64, 1, 8, 3))
    counts = distill.eval_step(*nnx.split(Table()), Batch(images, labels, where))
    order = np.argsort(-logits, axis=1, kind="stable")
    right = (order == labels[:, None]) & where[:, None] & np.isfinite(logits).all(1)[:, None]
    assert counts == {"count": where.sum(), "top1": right[:, :1].sum(), "top5": right[:, :5].sum()}


def test_uint8_images_are_normalised_and_floats_taken_as_they_are():
    pixels = jnp.full((1, 1, 1, 3), 255, jnp.uint8)
    np.testing.assert_allclose(distill.normalize(pixels)[0, 0, 0], [2.2489, 2.4286, 2.64], atol=1e-4)
    np.testing.assert_array_equal(distill.normalize(jnp.ones((1, 1, 1, 3))), 1)


@pytest.mark.parametrize("where", ["image", "gradient"])
def test_a_step_that_is_no_number_can_be_left_out(where):
    task, state, teacher = make()
    step = jax.jit(functools.partial(distill.train_step, task._replace(leave_out_not_finite=True)))
    batch = batch_of(8)
    if where == "image":
        batch = batch._replace(image=np.full(batch.image.shape, np.nan, np.float32))
    else:  # A loss that is finite, with a gradient that is not: the square of 1e30 in float32.
        state.params.student.fc.kernel.set_value(state.params.student.fc.kernel.get_value() * 1e25)
    after, metrics = step(state, teacher, batch)
    assert not np.isfinite(metrics["gradient_norm"])
    assert np.isfinite(metrics["loss"]) == (where == "gradient")
    assert after.step == state.step + 1
    for new, old in zip(jax.tree.leaves(after[1:]), jax.tree.leaves(state[1:]), strict=True):
        np.testing.assert_array_equal(new, old)


def test_leaving_out_changes_no_step_that_is_finite():
    task, state, teacher = make()
    batch = batch_of(8)
    left, kept = (
        jax.jit(functools.partial(distill.train_step, task._replace(leave_out_not_finite=leave_out)))(
            state, teacher, batch
        )
        for leave_out in (True, False)
    )
    assert_same_states(left, kept, rtol=1e-6, atol=1e-7)
