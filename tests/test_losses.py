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
@settings(max_examples=25, deadline=None)
def test_kl_is_not_negative_and_zero_for_equal_logits(seed, temperature):
    student, teacher = logits_of(seed), logits_of(seed + 1)
    assert kl_divergence(student, teacher, temperature=temperature) >= 0
    assert kl_divergence(student, student, temperature=temperature) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_losses_are_finite_float32_at_extreme_logits(dtype):
    logits = jnp.array([[1e4, -1e4, 0.0]], dtype)
    for loss in (cross_entropy(logits, jnp.array([1])), kl_divergence(logits, -logits, temperature=1.0)):
        assert loss.dtype == jnp.float32
        assert jnp.isfinite(loss)


def test_rows_that_do_not_count_change_neither_loss_nor_gradient():
    student, teacher, labels = logits_of(0, batch=6), logits_of(1, batch=6), np.arange(6)
    where = np.array([True] * 4 + [False] * 2)
    options = {"temperature": 2.0, "alpha": 0.3, "beta": 0.7}
    loss, gradient = jax.value_and_grad(kd_loss)(student, teacher, labels, where=where, **options)
    expected, part = jax.value_and_grad(kd_loss)(student[:4], teacher[:4], labels[:4], **options)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(gradient[:4], part, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(gradient[4:], 0)


def test_shapes_that_do_not_match_are_named():
    with pytest.raises(ValueError, match=r"\(5, 7\) and \(4,\)"):
        cross_entropy(logits_of(0), jnp.zeros(4, int))
    with pytest.raises(ValueError, match=r"\(5, 7\) and \(5, 6\)"):
        kl_divergence(logits_of(0), logits_of(0, classes=6))
