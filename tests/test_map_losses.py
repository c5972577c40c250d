"""Losses of feature maps agree with PyTorch at grids of any ratio; a training step trains what they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from einops import rearrange
from flax import nnx
from torch.nn import functional

from tat_jax import distill
from tat_jax.batch import Batch
from tat_jax.distill import Distillation, Recipe
from tat_jax.losses import LOSSES, attention_transfer, hierarchical_context_loss, ickd, similarity_preserving
from tat_jax.losses.adapt import nearest, pool
from tat_jax.losses.review import Level, Review
from tat_jax.losses.vid import Predictor
from tat_jax.networks.view import Outputs, View, watch
from tat_jax.tasks.classification import Classification
from tests.tiny import Tiny

SIDES = [(8, 8), (8, 4), (7, 4), (4, 7), (5, 3), (14, 1)]
TAPS = ("layer1", "layer2")
SEVERAL = {"student_taps": TAPS, "teacher_taps": TAPS}
ONE = {"student_tap": "layer2", "teacher_tap": "layer2"}
OPTIONS = {"at": SEVERAL, "sp": ONE, "vid": SEVERAL, "ickd": ONE, "review": SEVERAL, "fitnet": ONE}


def draw(side, channels, seed, count=3):
    return np.random.default_rng(seed).standard_normal((count, side, side, channels))


def to_torch(x):
    return torch.from_numpy(np.array(rearrange(x, "b h w c -> b c h w")))


def kernel_of(conv):
    return torch.from_numpy(np.array(rearrange(conv.kernel[...], "h w i o -> o i h w")))


def to_smaller(*maps):
    side = min(x.shape[2] for x in maps)
    return [functional.adaptive_avg_pool2d(x, side) for x in maps]


def attention(x):
    return functional.normalize((x**2).mean(1).flatten(1))


def theirs_at(student, teacher):
    ours, theirs = map(attention, to_smaller(student, teacher))
    return ((ours - theirs) ** 2).mean()


def theirs_sp(student, teacher):
    rows = (x.flatten(1) for x in (student, teacher))
    ours, theirs = (functional.normalize(x @ x.T) for x in rows)
    return ((ours - theirs) ** 2).sum() / len(student) ** 2


def theirs_ickd(student, teacher):
    rows = (x.flatten(2) for x in (student, teacher))
    ours, theirs = (functional.normalize(x @ x.transpose(1, 2), dim=2) for x in rows)
    return ((ours - theirs) ** 2).sum() / (student.shape[1] * len(student))


def theirs_context(student, teacher):
    total, weights, weight = functional.mse_loss(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            weight /= 2
            pooled = (functional.adaptive_avg_pool2d(x, side) for x in (student, teacher))
            total, weights = total + weight * functional.mse_loss(*pooled), weights + weight
    return total / weights


def theirs_vid(predict, student, teacher):
    mean, target = to_smaller(student, teacher)
    for i, conv in enumerate(predict.regressor):
        mean = functional.conv2d(functional.relu(mean) if i else mean, kernel_of(conv))
    variance = torch.log1p(torch.exp(torch.tensor(np.array(predict.log_scale[...])))) + 1e-5
    variance = variance[:, None, None]
    return (((mean - target) ** 2 / variance + torch.log(variance)) / 2).mean()


def normalized(conv, x, padding=0):
    return functional.batch_norm(
        functional.conv2d(x, kernel_of(conv), padding=padding), None, None, None, None, True
    )


def theirs_review(loss, students, teachers):
    total, below = 0, None
    for fuse, student, teacher in zip(loss.fusions, students[::-1], teachers[::-1], strict=True):
        x = normalized(fuse.enter, student)
        if below is not None:
            y = functional.interpolate(below, x.shape[2:], mode="nearest")
            bias = torch.tensor(np.array(fuse.gates.bias[...]))
            gates = torch.sigmoid(functional.conv2d(torch.cat([x, y], 1), kernel_of(fuse.gates), bias))
            x = x * gates[:, :1] + y * gates[:, 1:]
        below = functional.interpolate(x, teacher.shape[2:], mode="nearest")
        total = total + theirs_context(normalized(fuse.leave, below, padding=1), teacher)
    return total


def assert_same(ours, theirs, student, reference):
    """Compare a value and its gradient by the student with PyTorch's."""
    value, gradient = ours
    theirs.backward()
    assert value == pytest.approx(theirs.item(), rel=1e-12)
    expected = rearrange(reference.grad.numpy(), "b c h w -> b h w c")
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize(("side", "to"), [*SIDES, (1, 7), (3, 9)])
def test_pooling_and_nearest_resizing_are_pytorchs(side, to, x64):
    x = draw(side, 2, 0)
    pooled = functional.adaptive_avg_pool2d(to_torch(x), to)
    resized = functional.interpolate(to_torch(x), (to, to), mode="nearest")
    np.testing.assert_allclose(to_torch(pool(jnp.asarray(x), (to, to))), pooled, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(to_torch(nearest(jnp.asarray(x), (to, to))), resized)


@pytest.mark.parametrize(
    ("ours", "theirs", "channels"),
    [
        (attention_transfer, theirs_at, (3, 5)),
        (similarity_preserving, theirs_sp, (3, 5)),
        (ickd, theirs_ickd, (4, 4)),
    ],
    ids=["at", "sp", "ickd"],
)
@pytest.mark.parametrize(("side", "to"), SIDES)
def test_formulas_at_differing_grids_are_pytorchs(ours, theirs, channels, side, to, x64):
    student, teacher = draw(side, channels[0], 1), draw(to, channels[1], 2)
    reference = to_torch(student).requires_grad_()
    found = jax.value_and_grad(ours)(jnp.asarray(student), jnp.asarray(teacher))
    assert_same(found, theirs(reference, to_torch(teacher)), student, reference)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8])
def test_hierarchical_context_at_any_size_is_pytorchs(side, x64):
    student, teacher = draw(side, 3, 1), draw(side, 3, 2)
    reference = to_torch(student).requires_grad_()
    found = jax.value_and_grad(hierarchical_context_loss)(jnp.asarray(student), jnp.asarray(teacher))
    assert_same(found, theirs_context(reference, to_torch(teacher)), student, reference)


@pytest.mark.parametrize(("side", "to"), SIDES)
def test_vid_at_differing_grids_is_pytorchs(side, to, x64):
    predict = Predictor(3, 5, dtype=jnp.float64, rngs=nnx.Rngs(0))
    predict.log_scale[...] += jnp.asarray(np.random.default_rng(3).standard_normal(5))
    student, teacher = draw(side, 3, 1), draw(to, 5, 2)
    reference = to_torch(student).requires_grad_()
    found = jax.value_and_grad(lambda s: predict(s, jnp.asarray(teacher)).mean())(jnp.asarray(student))
    assert_same(found, theirs_vid(predict, reference, to_torch(teacher)), student, reference)


@pytest.mark.parametrize("sides", [((7, 8), (3, 5), (1, 1)), ((8, 4), (4, 8), (2, 3))])
def test_review_at_differing_grids_is_pytorchs(sides, x64):
    levels = [Level(3, 6), Level(4, 5), Level(5, 4)]
    names = ("a", "b", "c")
    loss = Review(
        levels, student_taps=names, teacher_taps=names, middle=3, dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    triples = list(zip(levels, sides, strict=True))
    student = [draw(side, level.student, i) for i, (level, (side, _)) in enumerate(triples)]
    teacher = [draw(side, level.teacher, 9 + i) for i, (level, (_, side)) in enumerate(triples)]
    references = [to_torch(x).requires_grad_() for x in student]

    def value(student):
        outputs = (
            Outputs(None, dict(zip(names, x, strict=True))) for x in (student, map(jnp.asarray, teacher))
        )
        module = nnx.merge(*nnx.split(loss), copy=True)
        return module(*outputs, batch_of(3), train=True).mean()

    found, gradients = jax.value_and_grad(value)([jnp.asarray(x) for x in student])
    theirs = theirs_review(loss, references, [to_torch(x) for x in teacher])
    assert_same((found, gradients[0]), theirs, student[0], references[0])
    np.testing.assert_allclose(to_torch(gradients[2]), references[2].grad, rtol=1e-9, atol=1e-12)


def batch_of(count, side=1):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return Batch(image, rng.integers(0, 5, count), np.ones(count, bool))


def build(name, student, teacher, **options):
    shapes = (watch(view, TAPS, 16) for view in (student, teacher))
    return LOSSES[name].build(
        *shapes, dtype=jnp.float32, bn_group=None, rngs=nnx.Rngs(2), **OPTIONS[name] | options
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_trains_student_and_loss_and_leaves_the_teacher(name):
    student, teacher = View(Tiny(4, rngs=nnx.Rngs(0))), View(Tiny(8, rngs=nnx.Rngs(1)))
    loss = build(name, student, teacher)
    distillation, optimizer = Distillation(student, {name: loss}), optax.sgd(0.05)
    graph, told = nnx.split(teacher)
    recipe = Recipe(
        nnx.graphdef(distillation), graph, True, {name: 1.0}, Classification(), optimizer, lambda step: 0.05
    )
    state = distill.init_state(distillation, optimizer)

    @jax.jit
    def step_and_gradient(teacher):
        after, metrics = distill.train_step(recipe, state, teacher, batch_of(8, 16))
        return metrics["loss"], after

    (value, after), of_teacher = jax.value_and_grad(step_and_gradient, has_aux=True, allow_int=True)(told)
    assert np.isfinite(value)
    floats = [g for g in jax.tree.leaves(of_teacher) if jnp.issubdtype(g.dtype, jnp.floating)]
    assert floats
    assert not any(g.any() for g in floats)
    before, after = (nnx.merge_state(s.params, s.variables) for s in (state, after))
    moves = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    still = {".".join(map(str, path)) for path, leaf in nnx.to_flat_state(moves) if not leaf.get_value()}
    # No logits are compared, and BatchNorm takes away the bias before it.
    assert still - {"losses.fitnet.conv.bias"} == {"student.network.fc.kernel", "student.network.fc.bias"}


@pytest.mark.parametrize("name", ["at", "review"])
def test_taps_of_which_a_loss_can_make_nothing_are_refused_before_training(name):
    taps = {"layer1": jax.ShapeDtypeStruct((1, 9, 4), jnp.float32)}
    outputs = Outputs(None, taps)
    options = {"student_taps": ("layer1",), "teacher_taps": ("layer1",)}
    with pytest.raises(ValueError, match=r"student_taps must be maps .*, and layer1 is \[9, 4\]"):
        LOSSES[name].build(outputs, outputs, dtype=jnp.float32, bn_group=None, rngs=nnx.Rngs(0), **options)
