"""Weights of losses go where papers' warm-ups and decays go, beside PyTorch's schedulers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

from tat_jax import fields
from tat_jax.schedules import WEIGHT, cosine, is_zero, linear, step, weight_at

LINEAR = linear(0.0, 1.0, end=20)


def values(weight, steps, steps_per_epoch=1):
    """Return the weight of every step, as the compiled training step computes it."""
    return np.array(jax.vmap(jax.jit(weight_at(weight, steps_per_epoch)))(jnp.arange(steps, dtype=jnp.int32)))


def in_pytorch(make, steps):
    """Return the learning rates of a scheduler, from 1 on."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("number", [0, 1, 0.2])
def test_a_number_stays_that_number(number):
    assert weight_at(number, 10) is number


def test_a_linear_weight_by_epoch_is_the_warm_up_of_dkd(x64):
    epochs, steps = 25, 3
    dkd = [min((epoch + 1) / 20, 1.0) for epoch in range(epochs) for _ in range(steps)]
    ours = values(linear(1 / 20, 1.0, end=19), epochs * steps, steps_per_epoch=steps)
    np.testing.assert_allclose(ours, dkd, rtol=1e-12)


def test_a_linear_weight_by_step_is_pytorchs_linear_lr(x64):
    theirs = in_pytorch(lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.25, 1.0, total_iters=30), 40)
    ours = values(linear(0.25, 1.0, end=30, by="step"), 40, steps_per_epoch=7)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_cosine_weight_by_step_is_pytorchs_cosine_annealing_and_stays_at_its_end(x64):
    theirs = in_pytorch(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30, eta_min=0.1), 31)
    ours = values(cosine(1.0, 0.1, end=30, by="step"), 40, steps_per_epoch=7)
    np.testing.assert_allclose(ours, theirs + [0.1] * 9, rtol=1e-12)


def test_a_rising_cosine_is_the_falling_one_from_above(x64):
    rising, falling = (values(cosine(*ends, begin=3, end=9), 12) for ends in [(0.0, 2.0), (2.0, 0.0)])
    np.testing.assert_allclose(rising, 2 - falling, atol=1e-12)
    assert falling[4] == pytest.approx(1 + np.cos(np.pi / 6), rel=1e-12)


@pytest.mark.parametrize(("by", "begin"), [("epoch", 2), ("step", 10)])
def test_a_step_is_constant_before_and_from_its_begin_on(by, begin):
    ours = values(step(0.0, 0.3, begin=begin, by=by), 20, steps_per_epoch=5)
    np.testing.assert_array_equal(ours, np.float32([0.0] * 10 + [0.3] * 10))


@pytest.mark.parametrize("shape", [linear, cosine])
def test_a_weight_is_constant_before_its_begin_and_after_its_end(shape):
    ours = values(shape(0.3, 0.7, begin=4, end=8), 20)
    np.testing.assert_array_equal(ours[:5], np.float32(0.3))
    np.testing.assert_array_equal(ours[8:], np.float32(0.7))
    assert np.all(np.diff(ours[4:9]) > 0)


@pytest.mark.parametrize("weight", [LINEAR, cosine(0.0, 1.0, end=20), step(0.0, 1.0, begin=3)])
def test_a_weight_has_the_type_that_is_computed_in(weight, x64):
    assert jax.eval_shape(weight_at(weight, 5), jnp.int32(7)).dtype == jnp.float64
    with jax.enable_x64(False):
        assert jax.eval_shape(weight_at(weight, 5), jnp.int32(7)).dtype == jnp.float32


@pytest.mark.parametrize(
    "weight",
    [
        0,
        0.5,
        LINEAR,
        linear(1, 0, begin=5, end=6, by="step"),
        cosine(1.0, 0.0, end=240),
        step(0.0, 1.0, begin=20),
    ],
)
def test_a_number_and_what_the_functions_return_are_weights_from_a_file_too(weight):
    assert WEIGHT.holds(weight)
    assert WEIGHT.holds(json.loads(ConfigDict({"weight": weight}).to_json())["weight"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": "exponential"},
        {"first": -1.0},
        {"last": float("nan")},
        {"begin": -1},
        {"begin": 20},
        {"begin": 0.5},
        {"end": 0},
        {"by": "image"},
        {"shape": "step"},  # it has no end
        {"power": 2.0},
    ],
)
def test_what_is_no_weight_is_named_with_what_is_allowed(wrong):
    weight = LINEAR | wrong
    (line,) = fields.wrong({"weight": fields.Field(0.0, WEIGHT, "of a loss")}, {"weight": weight})
    assert line.startswith(
        f"weight={weight!r}: allowed is a number from 0 on, or a schedule of shape ('linear'"
    )


@pytest.mark.parametrize("missing", LINEAR)
def test_a_schedule_says_everything(missing):
    assert not WEIGHT.holds({name: value for name, value in LINEAR.items() if name != missing})


@pytest.mark.parametrize("wrong", [-0.1, float("inf"), None, True, "1", (0.0, 1.0), {}])
def test_what_is_neither_number_nor_schedule_is_no_weight(wrong):
    assert not WEIGHT.holds(wrong)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0, True),
        (0.0, True),
        (0.1, False),
        (linear(0.0, 0.0, end=3), True),
        (step(0.0, 0.0, begin=3), True),
        (LINEAR, False),
        (cosine(1.0, 0.0, end=3), False),
    ],
)
def test_a_weight_is_zero_if_it_is_so_throughout(weight, expected):
    assert is_zero(weight) is expected
