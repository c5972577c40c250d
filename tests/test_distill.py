"""The training step: what it trains, what it leaves alone, and that devices and padding do not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tat_jax import distill, ema, sharding
from tat_jax.batch import Batch
from tat_jax.build import all_terms, build_teacher
from tat_jax.configs import r18_r34
from tat_jax.distill import Distillation, Recipe
from tat_jax.losses import kl_divergence
from tat_jax.losses.labels import CrossEntropy
from tat_jax.losses.logits import KD
from tat_jax.losses.loss import Loss
from tat_jax.losses.tat import TargetAwareTransformer
from tat_jax.mixing import Mixing, mix
from tat_jax.networks.layers import BatchNorm
from tat_jax.networks.view import View
from tat_jax.tasks.classification import Classification
from tests.tiny import Dropping, Tiny

WIDTHS = {"layer1": 4, "layer2": 8}  # of the student's taps; the teacher's are twice as wide
WEIGHTS = {"cross_entropy": 0.5, "kd": 0.5, "tat_layer1": 0.2, "tat_layer2": 0.1}
HEADS = {"layer1": 1, "layer2": 2}


def make(weights=WEIGHTS, dtype=jnp.float32, bn_group=None, optimizer=None, student=Tiny, **options):
    """Return a recipe with a narrow teacher and student, its first state, and the teacher's arrays."""
    losses = {"cross_entropy": CrossEntropy(), "kd": KD(temperature=2.0)}
    for tap, width in WIDTHS.items():
        losses[f"tat_{tap}"] = TargetAwareTransformer(
            width,
            2 * width,
            student_tap=tap,
            teacher_tap=tap,
            heads=HEADS[tap],
            **options,
            dtype=dtype,
            bn_group=bn_group,
            rngs=nnx.Rngs(2),
        )
    student = View(student(4, dtype=dtype, bn_group=bn_group, rngs=nnx.Rngs(0)))
    teacher = View(Tiny(8, dtype=dtype, rngs=nnx.Rngs(1)))
    distillation = Distillation(student, {name: losses[name] for name in weights})
    optimizer = optimizer or optax.sgd(0.05)
    graph, teacher_state = nnx.split(teacher)
    recipe = Recipe(
        nnx.graphdef(distillation), graph, True, weights, Classification(), optimizer, lambda step: 0.05
    )
    return recipe, distill.init_state(distillation, optimizer), teacher_state


def batch_of(size, *, valid=None, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8)
    return Batch(image, rng.integers(0, 5, size), np.arange(size) < (size if valid is None else valid))


@functools.cache
def compiled(bn_group=None):
    recipe, state, teacher = make(bn_group=bn_group)
    return jax.jit(functools.partial(distill.train_step, recipe)), state, teacher


def assert_same_states(a, b, rtol=2e-4, atol=2e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_a_step_trains_student_and_embeddings_and_reports_every_term():
    step, state, teacher = compiled()
    after, metrics = step(state, teacher, batch_of(8))
    assert int(after.step) == 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    assert all(jax.tree.leaves(moved))
    expected = 0.5 * metrics["cross_entropy"] + 0.5 * metrics["kd"]
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
    [{}, {"embedding_kernel": 1, "trainable_key": True}, {"asks": "teacher"}],
    ids=["published", "trainable key", "teacher asks"],
)
def test_the_gradient_to_the_teacher_is_exactly_zero(options):
    recipe, state, teacher = make({"kd": 0.5, "tat_layer2": 0.1}, **options)
    gradient = jax.jit(
        jax.grad(lambda teacher: distill.train_step(recipe, state, teacher, batch_of(4))[1]["loss"])
    )(teacher)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


class Noisy(Tiny):
    """A network that drops out before its second tap."""

    def __init__(self, width, *, rngs, **options):
        super().__init__(width, rngs=rngs, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images, *, train=False, where=None):
        x = nnx.relu(self.bn1(self.conv1(images.astype(self.dtype)), train=train, where=where))
        x = self.dropout(x, deterministic=not train)
        x = nnx.relu(self.bn2(self.conv2(x), train=train, where=where))
        self.sow(nnx.Intermediate, "layer2", x)
        return self.fc(x.mean((1, 2)))


@functools.cache
def taught_in_training(network=Noisy):
    """Return a step under a teacher in training mode, the first state, and the teacher's arrays."""
    recipe, state, _ = make({"kd": 0.5, "tat_layer2": 0.1})
    graph, teacher = nnx.split(View(network(8, rngs=nnx.Rngs(1))))
    recipe = recipe._replace(teacher=graph, teacher_in_training=True)
    return jax.jit(functools.partial(distill.train_step, recipe)), state, teacher, recipe


def test_a_teacher_in_training_mode_normalises_by_the_batch_without_what_does_not_count():
    step, state, teacher, recipe = taught_in_training(Tiny)
    batch = batch_of(8, valid=6)
    (_, metrics), images = step(state, teacher, batch), batch.image[:6]
    student = nnx.merge(recipe.distillation, state.params, state.variables).student(images, train=True)
    told = nnx.merge(recipe.teacher, teacher, copy=True)(images, train=True)
    expected = 4 * kl_divergence(student.logits, told.logits, temperature=2.0)
    assert float(metrics["kd"]) == pytest.approx(float(expected), rel=1e-4)
    recipe = recipe._replace(teacher_in_training=False)
    _, evaluated = jax.jit(functools.partial(distill.train_step, recipe))(state, teacher, batch)
    assert float(evaluated["kd"]) != pytest.approx(float(expected), rel=1e-2)


def test_a_teacher_in_training_mode_drops_out_anew_at_each_step():
    step, state, teacher, _ = taught_in_training()
    later = state._replace(step=state.step + 1)
    (_, first), (_, again), (_, second) = (step(s, teacher, batch_of(8)) for s in (state, state, later))
    # The step decides, whatever was before: a run that resumes has the same.
    assert first["kd"] == again["kd"]
    assert first["kd"] != second["kd"]


def test_the_gradient_to_a_teacher_in_training_mode_is_exactly_zero():
    _, state, teacher, recipe = taught_in_training()
    params, others = nnx.split_state(teacher, nnx.Param, ...)

    def loss(params):
        return distill.train_step(recipe, state, nnx.merge_state(params, others), batch_of(4))[1]["loss"]

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_on_eight_devices_a_teacher_in_training_mode_says_what_it_says_on_one():
    step, state, teacher, _ = taught_in_training()
    mesh = sharding.make_mesh()
    everywhere = jax.device_put((state, teacher), sharding.replicated(mesh))
    spread = jax.device_put(batch_of(16, valid=13), sharding.batched(mesh))
    assert_same_states(step(*everywhere, spread), step(state, teacher, batch_of(16, valid=13)))


def test_the_config_says_in_which_mode_the_teacher_runs():
    config = r18_r34.get_config("smoke")
    groups = {}
    for mode in ("eval", "train"):
        config.teacher_mode, config.bn_group = mode, 4
        teacher = build_teacher(config, 10, terms=all_terms(config))
        groups[mode] = {
            norm.group for _, norm in nnx.iter_modules(teacher.view) if isinstance(norm, BatchNorm)
        }
    assert groups == {"eval": {None}, "train": {4}}


def test_padding_changes_nothing():
    step, state, teacher = compiled()
    padded, metrics = step(state, teacher, batch_of(8, valid=6))
    whole, expected = step(state, teacher, Batch(*(x[:6] for x in batch_of(8)[:3])))
    assert_same_states((padded, metrics), (whole, expected))


def test_a_group_of_padding_alone_does_no_harm():
    step, state, teacher = compiled(bn_group=4)
    padded, metrics = step(state, teacher, batch_of(8, valid=4))
    whole, expected = step(state, teacher, Batch(*(x[:4] for x in batch_of(8)[:3])))
    assert_same_states((padded, metrics), (whole, expected))


@pytest.mark.parametrize("bn_group", [None, 4])
def test_eight_devices_take_the_step_of_one(bn_group):
    step, state, teacher = compiled(bn_group)
    mesh = sharding.make_mesh()
    everywhere = jax.device_put((state, teacher), sharding.replicated(mesh))
    spread = jax.device_put(batch_of(16, valid=13), sharding.batched(mesh))
    assert_same_states(step(*everywhere, spread), step(state, teacher, batch_of(16, valid=13)))


def test_dropout_drops_the_same_on_eight_devices_as_on_one_and_something_else_at_each_step():
    recipe, state, teacher = make({"cross_entropy": 1.0}, optimizer=optax.sgd(0.0), student=Dropping)
    step, mesh = jax.jit(functools.partial(distill.train_step, recipe)), sharding.make_mesh()
    everywhere = jax.device_put((state, teacher), sharding.replicated(mesh))
    spread, losses = jax.device_put(batch_of(16), sharding.batched(mesh)), []
    for _ in range(3):
        state, metrics = step(state, teacher, batch_of(16))
        after, expected = step(*everywhere, spread)
        everywhere = after, everywhere[1]
        losses.append(float(metrics["loss"]))
        assert losses[-1] == pytest.approx(float(expected["loss"]), rel=1e-5)
    assert len(set(losses)) == 3  # of the same images and, as the rate is 0, the same parameters


def test_a_step_that_is_left_out_draws_nothing_from_a_random_stream():
    recipe, state, teacher = make({"cross_entropy": 1.0}, student=Dropping)
    step = jax.jit(functools.partial(distill.train_step, recipe._replace(leave_out_not_finite=True)))
    batch = batch_of(8)
    for pixels, drawn in ((np.full(batch.image.shape, np.nan, np.float32), 0), (batch.image, 1)):
        state, _ = step(state, teacher, batch._replace(image=pixels))
        assert state.variables.student.network.dropout.rngs.count.get_value() == drawn


def test_without_a_loss_that_reads_it_there_is_no_teacher():
    recipe, state, _ = make({"cross_entropy": 1.0})
    recipe = recipe._replace(teacher=None, teacher_has_head=False)
    _, metrics = jax.jit(functools.partial(distill.train_step, recipe))(state, None, batch_of(4))
    assert metrics.keys().isdisjoint({"kd", "tat_layer2", "teacher_agreement"})
    assert float(metrics["loss"]) == float(metrics["cross_entropy"])


def test_bfloat16_keeps_parameters_statistics_and_losses_in_float32():
    recipe, state, teacher = make(dtype=jnp.bfloat16)
    after, metrics = jax.jit(functools.partial(distill.train_step, recipe))(state, teacher, batch_of(4))
    kept = jax.tree.leaves((after.params, after.variables, metrics))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}
    reference = compiled()[0](*compiled()[1:], batch_of(4))[1]
    assert float(metrics["loss"]) == pytest.approx(float(reference["loss"]), rel=0.05)


@pytest.mark.parametrize("where", ["image", "gradient"])
def test_a_step_that_is_no_number_can_be_left_out(where):
    recipe, state, teacher = make()
    step = jax.jit(functools.partial(distill.train_step, recipe._replace(leave_out_not_finite=True)))
    batch = batch_of(8)
    if where == "image":
        batch = batch._replace(image=np.full(batch.image.shape, np.nan, np.float32))
    else:  # A loss that is finite, with a gradient that is not: the square of 1e30 in float32.
        kernel = state.params.student.network.fc.kernel
        kernel.set_value(kernel.get_value() * 1e25)
    after, metrics = step(state, teacher, batch)
    assert not np.isfinite(metrics["gradient_norm"])
    assert np.isfinite(metrics["loss"]) == (where == "gradient")
    assert after.step == state.step + 1
    for new, old in zip(jax.tree.leaves(after[1:]), jax.tree.leaves(state[1:]), strict=True):
        np.testing.assert_array_equal(new, old)


def test_leaving_out_changes_no_step_that_is_finite():
    recipe, state, teacher = make()
    batch = batch_of(8)
    left, kept = (
        jax.jit(functools.partial(distill.train_step, recipe._replace(leave_out_not_finite=leave_out)))(
            state, teacher, batch
        )
        for leave_out in (True, False)
    )
    assert_same_states(left, kept, rtol=1e-6, atol=1e-7)


def test_a_weight_that_is_a_function_of_the_step_is_taken_at_each_step_and_reported():
    recipe, state, teacher = make({"cross_entropy": 1.0, "kd": lambda step: 0.25 * step})
    step = jax.jit(functools.partial(distill.train_step, recipe))
    for expected in (0.0, 0.25, 0.5):
        state, metrics = step(state, teacher, batch_of(4))
        assert metrics["kd_weight"] == expected
        total = metrics["cross_entropy"] + expected * metrics["kd"]
        assert float(metrics["loss"]) == pytest.approx(float(total), rel=1e-6)
        assert "cross_entropy_weight" not in metrics


def test_both_networks_and_every_loss_see_the_images_that_were_mixed_once():
    recipe, state, teacher = make({"cross_entropy": 0.5, "kd": 0.5, "tat_layer2": 0.1})
    mixing = Mixing(mixup=1.0, cutmix=0.0, seed=3)
    step = jax.jit(functools.partial(distill.train_step, recipe._replace(mixing=mixing)))
    batch = batch_of(8, valid=6)
    after, metrics = step(state, teacher, batch)
    # The batch that was mixed before has labels that are mixed, and the step without mixing takes it.
    mixed = jax.jit(functools.partial(mix, mixing))(state.step, batch)
    again, expected = jax.jit(functools.partial(distill.train_step, recipe))(state, teacher, mixed)
    assert_same_states((after, metrics), (again, expected), rtol=1e-5)
    student = nnx.merge(recipe.distillation, state.params, state.variables, copy=True).student
    hit = student(mixed.image, train=True, where=batch.where).logits.argmax(-1)
    first, second, share = mixed.label
    top1 = (share * (hit == first) + (1 - share) * (hit == second))[:6].mean()
    assert float(metrics["train_top1"]) == pytest.approx(float(top1), rel=1e-6)


def test_on_eight_devices_mixed_images_and_the_average_are_what_they_are_on_one():
    recipe, state, teacher = make({"cross_entropy": 0.5, "tat_layer2": 0.1})
    recipe = recipe._replace(mixing=Mixing(mixup=1.0, cutmix=1.0, seed=3), ema_decay=0.9)
    state = state._replace(ema=ema.student_of(state.params, state.variables))
    step, mesh = jax.jit(functools.partial(distill.train_step, recipe)), sharding.make_mesh()
    everywhere = jax.device_put((state, teacher), sharding.replicated(mesh))
    spread = jax.device_put(batch_of(16, valid=13), sharding.batched(mesh))
    assert_same_states(step(*everywhere, spread), step(state, teacher, batch_of(16, valid=13)))


def averaging(decay, optimizer, dtype=jnp.float32):
    """Return a step that keeps an average of its student, and the first state."""
    student = View(Tiny(4, dtype=dtype, rngs=nnx.Rngs(0)))
    model = Distillation(student, {"cross_entropy": CrossEntropy()})
    recipe = Recipe(
        nnx.graphdef(model),
        None,
        False,
        {"cross_entropy": 1.0},
        Classification(),
        optimizer,
        lambda step: 0.05,
        leave_out_not_finite=True,
        ema_decay=decay,
    )
    state = distill.init_state(model, optimizer, with_ema=True)
    return jax.jit(functools.partial(distill.train_step, recipe)), state, recipe


def leaves(state):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state)]


def test_the_average_is_its_recurrence_over_parameters_and_running_statistics(x64):
    step, state, recipe = averaging(0.7, optax.sgd(0.5), jnp.float64)
    average = leaves(ema.student_of(state.params, state.variables))
    for seed in range(4):
        state, _ = step(state, None, batch_of(8, seed=seed))
        student = leaves(ema.student_of(state.params, state.variables))
        average = [0.7 * old + 0.3 * new for old, new in zip(average, student, strict=True)]
    for ours, expected in zip(leaves(state.ema), average, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-13, atol=1e-15)
    views = distill.student_views(recipe, state)
    own, averaged = (nnx.merge(*view)(batch_of(4).image).logits for view in (views[""], views["ema"]))
    assert not np.allclose(own, averaged, rtol=1e-3)
    model = nnx.merge(recipe.distillation, state.params, state.variables, copy=True)
    assert len(average) == len(jax.tree.leaves(nnx.state(model.student)))  # statistics among them
    nnx.update(model, state.ema)
    np.testing.assert_array_equal(averaged, model.student(batch_of(4).image).logits)


def test_the_average_follows_updates_not_the_batches_of_which_several_make_one():
    optimizer = optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation()
    step, state, _ = averaging(0.7, optimizer)
    moved = []
    for seed in range(4):
        before, (state, _) = state, step(state, None, batch_of(8, seed=seed))
        moved.append(any((a != b).any() for a, b in zip(leaves(before.ema), leaves(state.ema), strict=True)))
    assert moved == [False, True, False, True]


def test_a_step_that_is_left_out_leaves_the_average_as_it_is():
    step, state, _ = averaging(0.7, optax.sgd(0.5))
    state, _ = step(state, None, batch_of(8))
    batch = batch_of(8)._replace(image=np.full((8, 16, 16, 3), np.nan, np.float32))
    after, _ = step(state, None, batch)
    for new, old in zip(leaves(after.ema), leaves(state.ema), strict=True):
        np.testing.assert_array_equal(new, old)


class Memory(nnx.Variable):
    """What a loss remembers, and does not train."""


class Remembering(Loss):
    """A loss with a state that is no parameter: how many images it has seen."""

    needs_teacher = False

    def __init__(self):
        self.seen = Memory(jnp.zeros(()))

    def __call__(self, student, teacher, batch, *, train):
        self.seen.set_value(self.seen.get_value() + batch.where.sum())
        return jnp.where(batch.where, self.seen.get_value(), jnp.inf)


def test_a_loss_keeps_what_is_no_parameter_and_the_optimiser_leaves_it_alone():
    model = Distillation(View(Tiny(4, rngs=nnx.Rngs(0))), {"mine": Remembering()})
    optimizer = optax.adamw(0.1)
    recipe = Recipe(
        nnx.graphdef(model), None, False, {"mine": 1.0}, Classification(), optimizer, lambda step: 0.1
    )
    state = distill.init_state(model, optimizer)
    step = jax.jit(functools.partial(distill.train_step, recipe))
    for seen in (3, 6):
        state, metrics = step(state, None, batch_of(4, valid=3))
        assert metrics["mine"] == seen
    assert state.variables["losses"]["mine"]["seen"].get_value() == 6
