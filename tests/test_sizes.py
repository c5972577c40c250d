"""Taps of any sizes: TaT beside plain NumPy in float64, normalised targets, and what is done without it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.build import build as build_training
from tat_jax.configs import base
from tat_jax.distill import train_step
from tat_jax.losses import (
    resized_loss,
    self_similarity_loss,
    target_aware_attention,
    tat,
    tat_blocks,
    tat_fused,
    tat_loss,
)
from tat_jax.losses.adapt import Standardization
from tat_jax.losses.maps import Resized
from tat_jax.losses.relations import SelfSimilarity
from tat_jax.losses.tat import TargetAwareTransformer
from tat_jax.networks.view import Outputs
from tests.test_train import config_of
from tests.tiny import Tiny

ALL = (0, 1, 2, 3)  # query, key, value and target


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def drawn(asking, answering, heads, *, depth=1, channels=2, seed=0):
    """Return query, key, value and target of two images, of so many channels a head."""
    places = [asking, answering, answering, asking]
    widths = [depth, depth, channels, channels]
    return draw(*[(2, *p, heads * w) for p, w in zip(places, widths, strict=True)], seed=seed)


def plain(query, key, value, target, heads, scale):
    """Return the loss and its gradients by the formula, image by image and head by head, in NumPy."""
    found = [np.zeros_like(x) for x in (query, key, value, target)]
    total = 0.0
    for image in range(len(query)):
        for head in range(heads):
            here = [
                x[image].reshape(-1, heads, x.shape[-1] // heads)[:, head]
                for x in (query, key, value, target)
            ]
            q, k, v, t = here
            scores = scale * q @ k.T
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            error = weights @ v - t
            total += (error**2).sum()
            by_out = 2 * error / target.size
            by_weights = by_out @ v.T
            by_scores = weights * (by_weights - (weights * by_weights).sum(1, keepdims=True))
            gradients = scale * by_scores @ k, scale * by_scores.T @ q, weights.T @ by_out, -by_out
            for whole, part in zip(found, gradients, strict=True):
                whole[image].reshape(-1, heads, whole.shape[-1] // heads)[:, head] = part
    return total / target.size, found


def measured(arrays, heads, scale):
    loss = functools.partial(tat_loss, heads=heads, scale=scale)
    return jax.jit(jax.value_and_grad(loss, ALL))(*map(jnp.asarray, arrays))


def assert_close(measured, expected, tolerance):
    """Compare arrays by their largest element."""
    for ours, reference in zip(jax.tree.leaves(measured), jax.tree.leaves(expected), strict=True):
        assert ours.shape == np.shape(reference)
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), reference, rtol=0, atol=tolerance * (1e-3 + np.abs(reference).max())
        )


# Who asks, who answers (maps and tokens), heads and the scale. The last is taken in blocks by itself.
CASES = [
    ((1, 1), (33, 17), 1, 1.0),
    ((33, 17), (1, 1), 2, 0.3),
    ((9, 5), (7, 7), 8, 8**-0.5),
    ((50,), (7, 6), 4, 0.5),
    ((3, 11), (40,), 3, 2.0),
    ((17,), (29,), 1, 1.0),
    ((33, 17), (31, 16), 8, 0.7),
]


@pytest.mark.parametrize(("asking", "answering", "heads", "scale"), CASES)
def test_losses_and_gradients_of_any_two_sizes_are_those_of_plain_numpy(asking, answering, heads, scale, x64):
    arrays = drawn(asking, answering, heads)
    assert_close(measured(arrays, heads, scale), plain(*arrays, heads, scale), 1e-12)


@pytest.mark.parametrize(("asking", "answering", "heads", "scale"), CASES[2:5])
def test_so_they_are_in_blocks(asking, answering, heads, scale, monkeypatch, x64):
    for module, name in ((tat, "SCORES"), (tat_blocks, "SCORES"), (tat_blocks, "LARGEST")):
        monkeypatch.setattr(module, name, 500)
    arrays = drawn(asking, answering, heads)
    assert_close(measured(arrays, heads, scale), plain(*arrays, heads, scale), 1e-12)


PLACES = st.one_of(st.tuples(st.integers(1, 33), st.integers(1, 17)), st.tuples(st.integers(1, 100)))


@given(PLACES, PLACES, st.integers(1, 8), st.floats(0.1, 2), st.integers(0, 99))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_attention_of_any_two_sizes_is_that_of_plain_numpy(asking, answering, heads, scale, seed):
    query, key, value, _ = drawn(asking, answering, heads, seed=seed)
    zero = np.zeros((2, *asking, 2 * heads))
    with jax.enable_x64(True):
        out = target_aware_attention(*map(jnp.asarray, (query, key, value)), heads=heads, scale=scale)
        # Its gradient by a target of zeros is −2/size of what is rebuilt.
        _, gradients = plain(query, key, value, zero, heads, scale)
        np.testing.assert_allclose(out, gradients[3] * -zero.size / 2, atol=1e-12)


@pytest.mark.parametrize("scores", [2**21, 500])
def test_bfloat16_is_as_exact_as_its_rounding(scores, monkeypatch, x64):
    for module, name in ((tat, "SCORES"), (tat_blocks, "SCORES"), (tat_blocks, "LARGEST")):
        monkeypatch.setattr(module, name, scores)
    arrays = [x.astype(jnp.bfloat16) for x in drawn((9, 5), (50,), 4, depth=16, channels=16)]
    expected = plain(*(x.astype(np.float64) for x in arrays), 4, 16**-0.5)
    # Weights, errors and their products are rounded to 8 bits, 2^-9 of each: some of that adds up.
    assert_close(measured(arrays, 4, 16**-0.5), expected, 0.02)


def test_the_scale_is_exact_where_a_scaled_query_of_bfloat16_is_rounded():
    query = jnp.full((1, 1, 1), 600, jnp.bfloat16)
    key = jnp.asarray([1, 1.0078125], jnp.bfloat16).reshape(1, 2, 1)
    value = jnp.asarray([0.0, 1.0]).reshape(1, 2, 1)
    scale = 7**-0.5  # 600/√7 is 226.8, and 227 in bfloat16
    expected = 1 / (1 + np.exp(-600 * 0.0078125 * scale))
    assert target_aware_attention(query, key, value, scale=scale).item() == pytest.approx(expected, rel=1e-5)
    folded = target_aware_attention(query * jnp.bfloat16(scale), key, value).item()
    assert folded != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("asking", "answering"), [((9, 5), (7, 6)), ((50,), (7, 6)), ((3, 11), (40,))])
def test_the_fused_form_takes_tokens_and_a_scale(asking, answering):
    arrays = drawn(asking, answering, 2, depth=8, channels=8)
    expected = plain(*arrays, 2, 0.3)

    def fused(*arrays):
        sums = tat_fused.errors_fused(*arrays, heads=2, scale=0.3, implementation="xla")
        return jnp.sum(sums) / arrays[3].size

    found = jax.value_and_grad(fused, ALL)(*(jnp.asarray(x, jnp.float32) for x in arrays))
    assert_close(found, expected, 1e-5)


def memory(asking, answering):
    """Return the bytes that loss and gradients of one image need besides arguments and results."""
    shapes = [jax.ShapeDtypeStruct((1, n, 64), np.float32) for n in (asking, answering, answering, asking)]
    step = jax.jit(jax.value_and_grad(tat_loss, ALL)).lower(*shapes).compile()
    return step.memory_analysis().temp_size_in_bytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere blocks are larger")
def test_memory_is_linear_in_the_positions_that_ask_and_in_those_that_answer():
    # All scores at once are 256 MiB, and twice that with their gradient.
    many, fewer = 16_384, 4_096
    assert memory(many, fewer) <= 64 * 2**20
    assert memory(fewer, many) <= 64 * 2**20


def test_what_does_not_fit_is_named(unchecked):
    tokens, map_ = jnp.zeros((2, 12, 8)), jnp.zeros((2, 3, 4, 8))
    with pytest.raises(ValueError, match=r"query and target .* positions: \(2, 3, 4, 8\) and \(2, 12, 8\)"):
        tat_loss(map_, tokens, tokens, tokens)
    with pytest.raises(ValueError, match=r"key and value .* positions: \(2, 12, 8\) and \(2, 11, 8\)"):
        tat_loss(map_, tokens, tokens[:, 1:], map_)
    with pytest.raises(ValueError, match=r"value is no map .* nor tokens .*: its shape is \(2, 8\)"):
        tat_loss(map_, tokens, tokens[:, 0], map_)
    for scale in (0, -1.0, np.nan, np.inf, "1/sqrt(d)", None):
        with pytest.raises(ValueError, match="is no number greater than 0"):
            tat_loss(map_, tokens, tokens, map_, scale=scale)
    with pytest.raises(ValueError, match="is no number greater than 0 that is known before compilation"):
        jax.jit(tat_loss)(map_, tokens, tokens, map_, scale=2.0)


# The loss of two taps


def shapes(student, teacher):
    return [Outputs(None, {"tap": jax.ShapeDtypeStruct((1, *s), np.float32)}) for s in (student, teacher)]


def build(loss, student, teacher, **options):
    how = {"student_tap": "tap", "teacher_tap": "tap", "dtype": jnp.dtype("float32"), "bn_group": None}
    return loss.build(*shapes(student, teacher), **how | options, rngs=nnx.Rngs(0))


def compare(module, student, teacher, where=None, train=True):
    """Return the loss of each image."""
    student, teacher = (Outputs(None, {"tap": jnp.asarray(x)}) for x in (student, teacher))
    count = len(student.taps["tap"])
    where = jnp.ones(count, bool) if where is None else jnp.asarray(where)
    return module(student, teacher, Batch(jnp.zeros((count, 1, 1, 3)), None, where), train=train)


def two(*shapes):
    return [jnp.asarray(x, jnp.float32) for x in draw(*shapes)]


def as_tokens(x):
    return x.reshape(len(x), -1, x.shape[-1])


@pytest.mark.parametrize(
    ("options", "grid", "teacher_grid"),
    [
        ({"embedding_kernel": 3, "trainable_key": True}, (4, 4), (4, 4)),
        ({"embedding_kernel": 1, "trainable_key": True}, (3, 4), (3, 4)),
        ({"asks": "teacher", "heads": 2}, (4, 4), (3, 5)),
        ({"asks": "teacher", "embedding_kernel": 1, "scale": "1/sqrt(d)"}, (2, 5), (3, 4)),
    ],
)
def test_tokens_are_the_positions_of_a_map_row_by_row(options, grid, teacher_grid):
    student, teacher = two((2, *grid, 6), (2, *teacher_grid, 8))
    expected = compare(
        build(TargetAwareTransformer, student.shape[1:], teacher.shape[1:], **options), student, teacher
    )
    for ours in (student, as_tokens(student)):
        for theirs in (teacher, as_tokens(teacher)):
            module = build(TargetAwareTransformer, ours.shape[1:], theirs.shape[1:], **options)
            np.testing.assert_allclose(compare(module, ours, theirs), expected, rtol=1e-5)


@pytest.mark.parametrize(("scale", "number"), [("1/sqrt(d)", 4**-0.5), (0.3, 0.3), (2, 2.0)])
def test_the_scale_of_a_config_is_that_of_the_loss(scale, number):
    student, teacher = two((2, 3, 4, 8), (2, 5, 8))
    module = build(
        TargetAwareTransformer, (3, 4, 8), (5, 8), asks="teacher", embedding_kernel=0, heads=2, scale=scale
    )
    expected = tat_loss(teacher, student, student, teacher, heads=2, scale=number)
    np.testing.assert_allclose(compare(module, student, teacher).mean(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "student", "teacher", "options", "message"),
    [
        (
            TargetAwareTransformer,
            (7, 7, 8),
            (256, 16),
            {},
            r"tap .*: the student's is \[7, 7\], the teacher's \[256\]; with asks='teacher' they may",
        ),
        (
            TargetAwareTransformer,
            (197, 8),
            (7, 7, 16),
            {"asks": "teacher"},
            "the student's tap tap has 197 tokens, which form no square map: .*; embedding_kernel=1",
        ),
        (
            TargetAwareTransformer,
            (7, 7, 8),
            (197, 16),
            {"asks": "teacher", "trainable_key": True},
            "the teacher's tap tap has 197 tokens",
        ),
        (TargetAwareTransformer, (7, 7, 8), (16,), {}, r"\[7, 7, 8\], the teacher's \[16\]"),
        (Resized, (7, 7, 8), (197, 16), {}, "the teacher's tap tap has 197 tokens, which form no square map"),
        (Resized, (8,), (7, 7, 16), {}, r"the taps must be maps .* or tokens .*: the student's is \[8\]"),
        (
            SelfSimilarity,
            (50, 8),
            (7, 7, 16),
            {},
            "the student's tap tap has 50 tokens, which form no square",
        ),
        (SelfSimilarity, (7, 7, 8), (16,), {}, r"the taps must be maps .* or tokens"),
    ],
)
def test_taps_that_do_not_fit_are_told_what_to_do(loss, student, teacher, options, message):
    with pytest.raises(
        ValueError, match=message.replace("tap .*: the", "taps differ in positions: the")
    ) as error:
        build(loss, student, teacher, **options)
    assert "\n" not in str(error.value)


# Normalised targets


def test_by_position_each_target_has_length_1_and_one_of_zeros_stays():
    student, teacher = two((2, 2, 3, 8), (2, 4, 8))
    teacher = teacher.at[0, 0].set(0)
    options = {"asks": "teacher", "embedding_kernel": 0}
    module = build(TargetAwareTransformer, (2, 3, 8), (4, 8), **options, target_norm="position")
    target = teacher / jnp.maximum(jnp.linalg.norm(teacher, axis=-1, keepdims=True), 1e-30)
    expected = tat_loss(teacher, student, student, target)
    np.testing.assert_allclose(compare(module, student, teacher).mean(), expected, rtol=1e-6)


def test_by_channel_the_statistics_are_those_of_all_images_seen_without_padding(x64):
    module, seen = Standardization(3, dtype=jnp.float64), []
    for i in range(4):
        (x,) = draw((4, 2, 3, 3), seed=i)
        x = (1 + i) * x + 1000 + i  # float32 would lose E[x²] − E[x]² here
        where = np.array([True, True, i > 1, False])
        out = module(jnp.asarray(x), train=True, where=jnp.asarray(where))
        seen.append(x[where].reshape(-1, 3))
        every = np.concatenate(seen)
        np.testing.assert_allclose(module.mean[...], every.mean(0), rtol=1e-12)
        np.testing.assert_allclose(module.var[...], every.var(0), rtol=1e-10)
        np.testing.assert_allclose(out, (x - every.mean(0)) / np.sqrt(every.var(0) + 1e-5), rtol=1e-9)
    before = nnx.state(module)
    module(jnp.asarray(x), train=False)
    module(jnp.asarray(x), train=True, where=jnp.zeros(4, bool))
    for now, then in zip(jax.tree.leaves(nnx.state(module)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(now, then)


def test_by_channel_eight_devices_have_one_statistic():
    (x,) = two((8, 5, 3))
    module = Standardization(3)
    expected = module(jnp.asarray(x), train=True)
    graph, state = nnx.split(Standardization(3))

    def standardize(state, x):
        module = nnx.merge(graph, state)
        return module(x, train=True), nnx.state(module)

    out, state = jax.jit(standardize)(state, jax.device_put(x, sharding.batched(sharding.make_mesh())))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(state["var"][...], module.var[...], rtol=1e-6)


def test_by_channel_what_is_rebuilt_is_standardised_and_the_key_is_not():
    student, teacher = two((4, 2, 3, 8), (4, 4, 8))
    options = {"asks": "teacher", "embedding_kernel": 0}
    module = build(TargetAwareTransformer, (2, 3, 8), (4, 8), **options, target_norm="channel")
    found = compare(module, student, teacher, where=[True, True, True, False])
    flat = teacher[:3].reshape(-1, 8)
    mean, var = flat.mean(0)[None, None], flat.var(0)[None, None]
    target = (teacher - mean) / jnp.sqrt(var + 1e-5)
    expected = tat_loss(teacher[:3], student[:3], student[:3], target[:3])
    np.testing.assert_allclose(found[:3].mean(), expected, rtol=1e-5)


# What is done without attention


@pytest.mark.parametrize(("grid", "teacher_grid"), [((3, 4), (7, 5)), ((9, 8), (4, 5)), ((4, 4), (4, 4))])
@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_a_resized_map_is_compared_as_pytorch_does_it(grid, teacher_grid, distance, x64):
    student, teacher = draw((2, *grid, 6), (2, *teacher_grid, 6))
    ours, theirs = (torch.from_numpy(x).movedim(-1, 1) for x in (student, teacher))
    ours.requires_grad_()
    functional = torch.nn.functional
    resized = functional.interpolate(ours, teacher_grid, mode="bilinear")
    if distance == "mse":
        expected = functional.mse_loss(resized, theirs)
    else:
        expected = (1 - functional.cosine_similarity(resized, theirs, dim=1)).mean()
    expected.backward()
    loss, gradient = jax.value_and_grad(resized_loss)(
        jnp.asarray(student), jnp.asarray(teacher), distance=distance
    )
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, ours.grad.movedim(1, -1), atol=1e-14)


def test_the_students_map_is_projected_then_resized():
    student, teacher = two((3, 2, 3, 6), (3, 16, 8))
    module = build(Resized, (2, 3, 6), (16, 8), distance="cosine")
    kernel, bias = module.project.kernel[...], module.project.bias[...]
    assert np.abs(kernel).max() <= 6**-0.5
    projected = student @ kernel[0, 0] + bias[None, None, None]
    expected = resized_loss(projected, teacher.reshape(3, 4, 4, 8), distance="cosine")
    np.testing.assert_allclose(compare(module, student, teacher).mean(), expected, rtol=1e-5)


def test_self_similarity_is_the_difference_of_two_matrices_of_cosines(x64):
    student, teacher = draw((2, 3, 4, 6), (2, 3, 4, 5))

    def cosines(x):
        x = x.reshape(len(x), 12, -1)
        length = np.linalg.norm(x, axis=-1)
        return np.einsum("bic,bjc->bij", x, x) / (length[:, :, None] * length[:, None])

    expected = ((cosines(student) - cosines(teacher)) ** 2).mean((1, 2))
    found = self_similarity_loss(jnp.asarray(student), jnp.asarray(teacher))
    assert found == pytest.approx(expected.mean(), rel=1e-12)
    module = build(SelfSimilarity, (3, 4, 6), (12, 5))
    np.testing.assert_allclose(compare(module, student, as_tokens(teacher)), expected, rtol=1e-12)
    direction, h = draw(student.shape, seed=1)[0], 1e-6
    ends = [self_similarity_loss(jnp.asarray(student + s * direction), jnp.asarray(teacher)) for s in (h, -h)]
    gradient = jax.grad(self_similarity_loss)(jnp.asarray(student), jnp.asarray(teacher))
    assert (gradient * direction).sum() == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-6)


def test_self_similarity_of_another_grid_is_that_of_the_students_map_resized():
    student, teacher = two((2, 3, 4, 6), (2, 25, 5))
    module = build(SelfSimilarity, (3, 4, 6), (25, 5))
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(student)).movedim(-1, 1), (5, 5), mode="bilinear"
    )
    expected = self_similarity_loss(jnp.asarray(resized.movedim(1, -1).numpy()), teacher.reshape(2, 5, 5, 5))
    np.testing.assert_allclose(compare(module, student, teacher).mean(), expected, rtol=1e-5)
    assert not jax.tree.leaves(nnx.state(module))


@pytest.mark.parametrize("loss", [resized_loss, self_similarity_loss])
def test_positions_without_features_have_a_finite_gradient_and_images_that_do_not_count_have_none(loss):
    student, teacher = two((2, 3, 4, 6), (2, 3, 4, 6))
    student = student.at[0, 0].set(0)
    options = {"distance": "cosine"} if loss is resized_loss else {}
    where = jnp.array([True, False])
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(student), teacher, where=where, **options)
    assert value == pytest.approx(float(loss(student[:1], teacher[:1], **options)), rel=1e-6)
    assert jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], 0)
    half = loss(*(jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)), **options)
    assert half.dtype == jnp.float32


def test_maps_that_cannot_be_compared_are_named(unchecked):
    x = jnp.zeros((2, 3, 4, 6))
    with pytest.raises(ValueError, match=r"channels: \(2, 3, 4, 5\) and \(2, 3, 4, 6\)"):
        resized_loss(x[..., 1:], x)
    with pytest.raises(ValueError, match="distance='l1': it is 'mse' or 'cosine'"):
        resized_loss(x, x, distance="l1")
    with pytest.raises(ValueError, match=r"positions: \(2, 2, 4, 6\) and \(2, 3, 4, 6\)"):
        self_similarity_loss(x[:, 1:], x)


# A training


def test_a_config_compares_taps_of_two_grids_in_all_three_ways():
    taps = {"student_tap": "layer2", "teacher_tap": "layer1"}
    config = config_of(task="classification")
    config.losses = {
        "tat": {"any": base.loss("tat", weight=0.5, asks="teacher", scale="1/sqrt(d)", **taps)},
        "resized": {"any": base.loss("resized", weight=0.3, distance="cosine", **taps)},
        "self_similarity": {"any": base.loss("self_similarity", weight=0.2, **taps)},
    }
    student, teacher = (Tiny(width, classes=10, rngs=nnx.Rngs(width)) for width in (4, 8))
    built = build_training(
        config,
        sharding.make_mesh(jax.devices()[:1]),
        num_classes=10,
        steps_per_epoch=1,
        student=student,
        teacher=teacher,
    )
    batch = Batch(jnp.zeros((8, 16, 16, 3), jnp.uint8), jnp.zeros(8, jnp.int32), jnp.ones(8, bool))
    step = functools.partial(train_step, built.recipe)
    _, metrics = jax.eval_shape(step, built.state, built.teacher, batch)
    assert {"tat_any", "resized_any", "self_similarity_any"} <= metrics.keys()
    parameters = {path[1:3] for path, _ in nnx.to_flat_state(built.state.params) if path[0] == "losses"}
    assert parameters == {("tat_any", "query"), ("tat_any", "value"), ("resized_any", "project")}
