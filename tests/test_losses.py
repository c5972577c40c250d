"""Losses on logits agree with the published code and with what their names promise."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tat_jax.batch import Batch, MixedLabels
from tat_jax.losses import cross_entropy, kd_loss, kd_weights, kl_divergence, pixel_cross_entropy
from tat_jax.losses.labels import CrossEntropy, PixelCrossEntropy
from tat_jax.losses.logits import KD
from tat_jax.networks.view import Outputs

GOLDEN = json.loads((Path(__file__).parent / "golden" / "published_code.json").read_text())["kd"]


properties = settings(max_examples=25, deadline=None)


def draw(name, shape, scale=1.0):
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * scale


def logits_of(seed, batch=5, classes=7, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, (batch, classes)).astype(np.float32)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["id"])
def test_kd_loss_and_its_gradient_are_those_of_the_published_code(case, x64):
    shape = case["batch"], case["classes"]
    student, teacher = draw(f"{case['id']}/student", shape, 2), draw(f"{case['id']}/teacher", shape, 3)
    labels = np.random.default_rng(zlib.crc32(f"{case['id']}/labels".encode())).integers(0, *shape[::-1])
    loss, gradient = jax.value_and_grad(kd_loss)(
        jnp.asarray(student),
        jnp.asarray(teacher),
        labels,
        temperature=case["temperature"],
        alpha=case["alpha"],
        beta=case["beta"],
    )
    assert loss == pytest.approx(case["loss"], rel=1e-10)
    assert np.linalg.norm(gradient) == pytest.approx(case["grad_norm"], rel=1e-10)
    np.testing.assert_allclose(gradient.ravel()[:8], case["grad_first8"], rtol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_cross_entropy_and_its_gradient_are_pytorchs(smoothing, x64):
    logits, labels = draw("smoothing", (5, 7), 3), np.array([0, 6, 2, 2, 5])
    loss, gradient = jax.value_and_grad(cross_entropy)(jnp.asarray(logits), labels, label_smoothing=smoothing)
    theirs = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(theirs, torch.tensor(labels))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_of_mixed_labels_cross_entropy_is_that_of_both_by_their_shares(smoothing, x64):
    logits, first, second = draw("mixed", (4, 7), 3), np.array([0, 6, 2, 2]), np.array([1, 1, 2, 0])
    share = np.array([0.25, 0.9, 0.5, 1.0])
    batch = Batch(np.zeros((4, 1, 1, 3), np.uint8), MixedLabels(first, second, share), np.ones(4, bool))
    loss = CrossEntropy(label_smoothing=smoothing)
    found = loss(Outputs(jnp.asarray(logits), {}), Outputs(None, {}), batch, train=True)
    told = share[:, None] * np.eye(7)[first] + (1 - share)[:, None] * np.eye(7)[second]
    cross_entropies = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")
    expected = cross_entropies(torch.tensor(logits), torch.tensor(told))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_beta_is_one_minus_alpha_by_default():
    assert kd_weights(0.9, None, 2.0) == pytest.approx((0.9, 0.4))


def test_alpha_zero_is_the_bare_kl_divergence_as_in_the_published_code():
    student, teacher = logits_of(0), logits_of(1)
    labels = np.zeros(5, int)
    expected = kl_divergence(student, teacher, temperature=4.0)
    assert kd_loss(student, teacher, labels, temperature=4.0, alpha=0.0, beta=0.3) == expected


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 8))
@properties
def test_kl_is_not_negative_and_zero_for_equal_logits(seed, temperature):
    student, teacher = logits_of(seed), logits_of(seed + 1)
    assert kl_divergence(student, teacher, temperature=temperature) >= 0
    assert kl_divergence(student, student, temperature=temperature) == 0


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 8))
@properties
def test_classes_and_images_have_no_order(seed, temperature):
    rng = np.random.default_rng(seed)
    student, teacher, labels = logits_of(seed), logits_of(seed + 1), rng.integers(0, 7, 5)
    classes, images = rng.permutation(7), rng.permutation(5)
    options = {"temperature": temperature, "alpha": 0.3}
    loss = float(kd_loss(student, teacher, labels, **options))
    renamed = np.argsort(classes)[labels]
    assert kd_loss(student[:, classes], teacher[:, classes], renamed, **options) == pytest.approx(loss, 1e-5)
    assert kd_loss(student[images], teacher[images], labels[images], **options) == pytest.approx(loss, 1e-5)


@given(st.integers(0, 2**32 - 1), st.floats(-100, 100), st.floats(0.5, 8))
@properties
def test_a_constant_added_to_all_logits_of_an_image_changes_nothing(seed, constant, temperature):
    student, teacher, labels = logits_of(seed), logits_of(seed + 1), np.arange(5)
    shifted = np.float32(constant)
    loss = float(kd_loss(student, teacher, labels, temperature=temperature, alpha=0.3))
    moved = kd_loss(student + shifted, teacher - shifted, labels, temperature=temperature, alpha=0.3)
    # Logits near 100 are rounded to 1e-5 in float32.
    assert moved == pytest.approx(loss, rel=1e-3, abs=1e-3)


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 8))
@properties
def test_temperature_divides_the_logits(seed, temperature):
    student, teacher = logits_of(seed), logits_of(seed + 1)
    scaled = kl_divergence(
        np.float32(temperature) * student, np.float32(temperature) * teacher, temperature=temperature
    )
    assert scaled == pytest.approx(float(kl_divergence(student, teacher)), rel=1e-4, abs=1e-6)


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 8), st.floats(0.01, 1))
@properties
def test_gradients_are_those_of_finite_differences_and_of_each_image_sum_to_zero(seed, temperature, alpha):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        student, teacher, direction = rng.normal(0, 3, (3, 5, 7))
        labels = rng.integers(0, 7, 5)

        def loss(student):
            return kd_loss(student, teacher, labels, temperature=temperature, alpha=alpha)

        gradient, h = jax.grad(loss)(jnp.asarray(student)), 1e-5
        slope = (loss(student + h * direction) - loss(student - h * direction)) / (2 * h)
        assert (gradient * direction).sum() == pytest.approx(float(slope), rel=1e-6, abs=1e-8)
        np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.sampled_from([jnp.float32, jnp.bfloat16]), st.floats(1, 8))
@properties
def test_losses_and_gradients_are_finite_float32_at_logits_of_1e4(seed, dtype, temperature):
    rng = np.random.default_rng(seed)
    student, teacher = (jnp.asarray(x, dtype) for x in rng.choice([-1e4, 0, 1e4], (2, 5, 7)))
    loss, gradient = jax.value_and_grad(kd_loss)(
        student, teacher, rng.integers(0, 7, 5), temperature=temperature, alpha=0.5
    )
    assert loss.dtype == jnp.float32
    assert jnp.isfinite(loss)
    assert jnp.isfinite(gradient).all()


def test_rows_that_do_not_count_change_neither_loss_nor_gradient():
    student, teacher, labels = logits_of(0, batch=6), logits_of(1, batch=6), np.arange(6)
    where = np.array([True] * 4 + [False] * 2)
    options = {"temperature": 2.0, "alpha": 0.3, "beta": 0.7}
    loss, gradient = jax.value_and_grad(kd_loss)(student, teacher, labels, where=where, **options)
    expected, part = jax.value_and_grad(kd_loss)(student[:4], teacher[:4], labels[:4], **options)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(gradient[:4], part, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(gradient[4:], 0)


def test_shapes_that_do_not_match_are_named(unchecked):
    with pytest.raises(ValueError, match=r"\(5, 7\) and \(4,\)"):
        cross_entropy(logits_of(0), jnp.zeros(4, int))
    with pytest.raises(ValueError, match=r"\(5, 7\) and \(5, 6\)"):
        kl_divergence(logits_of(0), logits_of(0, classes=6))


# Of pixels


def published_pixels():
    """Return the logits and the labels whose loss was recorded from the published code."""
    n, y, x, c = np.meshgrid(np.arange(2), np.arange(3), np.arange(3), np.arange(4), indexing="ij")
    logits = np.sin(n + 1.3 * c + 0.5 * y - 0.7 * x)
    labels = (np.arange(18) % 4).astype(np.uint8).reshape(2, 3, 3)
    labels[0, 0, 0] = labels[1, 2, 2] = 255
    return jnp.asarray(logits), labels


def test_the_loss_of_pixels_is_that_of_the_published_code(x64):
    logits, labels = published_pixels()
    assert pixel_cross_entropy(logits, labels) == pytest.approx(0.775622731, abs=5e-10)
    plain = pixel_cross_entropy(logits, labels, divide_by_batch=False)
    assert plain == pytest.approx(2 * 0.775622731, abs=1e-9)
    counts = labels != 255
    expected = cross_entropy(logits[counts], labels[counts].astype(int))
    assert plain == pytest.approx(float(expected), rel=1e-14)


def test_the_gradient_of_the_loss_of_pixels_is_that_of_the_labelled_ones(x64):
    logits, labels = published_pixels()
    gradient = jax.grad(pixel_cross_entropy)(logits, labels)
    one_hot = np.eye(4)[np.where(labels == 255, 0, labels)]
    expected = (jax.nn.softmax(logits) - one_hot) * (labels != 255)[..., None] / 16 / 2
    np.testing.assert_allclose(gradient, expected, atol=1e-15)


def test_rows_that_do_not_count_change_nothing_of_the_loss_of_pixels():
    logits, labels = (np.concatenate([x, x[::-1]]) for x in published_pixels())
    where = np.array([True, True, False, False])
    found = jax.value_and_grad(pixel_cross_entropy)(jnp.asarray(logits), labels, where=where)
    expected = jax.value_and_grad(pixel_cross_entropy)(*published_pixels())
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1][:2], expected[1], rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(found[1][2:], 0)


@pytest.mark.parametrize("where", [None, np.zeros(2, bool)])
def test_without_a_labelled_pixel_the_loss_and_its_gradient_are_zero(where):
    logits, labels = published_pixels()
    labels = np.full_like(labels, 255) if where is None else labels
    loss, gradient = jax.value_and_grad(pixel_cross_entropy)(logits, labels, where=where)
    assert loss == 0
    assert not gradient.any()


def test_the_loss_of_pixels_is_one_number_and_needs_no_teacher():
    logits, labels = published_pixels()
    batch = Batch(np.zeros((2, 3, 3, 3), np.uint8), labels, np.ones(2, bool))
    for divide, factor in ((True, 1), (False, 2)):
        loss = PixelCrossEntropy(divide_by_batch=divide)
        found = loss(Outputs(logits, {}), Outputs(None, {}), batch, train=True)
        assert found == pytest.approx(factor * 0.775622731, rel=1e-6)


def temporaries(loss, *shapes):
    """Return the bytes that a loss with its gradient needs besides arguments and results."""
    return jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere sums take in what they are of")
def test_the_loss_of_pixels_holds_no_labels_one_hot():
    logits = jax.ShapeDtypeStruct((2, 65, 65, 182), np.float32)
    labels = jax.ShapeDtypeStruct((2, 65, 65), np.uint8)
    # Exponentials and nothing else is as large as the logits; log-probabilities of labels would be so, too.
    assert temporaries(pixel_cross_entropy, logits, labels) < 1.1 * 4 * logits.size


def test_kd_of_maps_is_the_mean_over_the_pixels_of_each_image():
    student, teacher = (logits_of(seed, 2 * 3 * 4).reshape(2, 3, 4, 7) for seed in (0, 1))
    batch = Batch(np.zeros((2, 3, 4, 3), np.uint8), None, np.ones(2, bool))
    outputs = (Outputs(jnp.asarray(logits), {}) for logits in (student, teacher))
    found = KD(temperature=2.0)(*outputs, batch, train=True)
    expected = [
        4 * kl_divergence(s.reshape(-1, 7), t.reshape(-1, 7), temperature=2.0)
        for s, t in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_maps_of_logits_that_do_not_match_are_named(unchecked):
    logits, labels = published_pixels()
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 4\) and \(2, 3, 2\)"):
        pixel_cross_entropy(logits, labels[:, :, :2])
    with pytest.raises(ValueError, match=r"the loss of maps is pixel_cross_entropy"):
        cross_entropy(logits, labels)
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 4\) and \(2, 3, 2, 4\)"):
        kl_divergence(logits, logits[:, :, :2])
