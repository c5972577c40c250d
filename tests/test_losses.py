"""Losses on logits agree with the published code and with what their names promise."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tat_jax.losses import cross_entropy, kd_loss, kd_weights, kl_divergence

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
