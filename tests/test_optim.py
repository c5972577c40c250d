"""Optimisers and schedule are PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict

from tat_jax import optim


def config_of(**changes):
    config = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 0.1,
            "weight_decay": 0.05,
            "momentum": 0.9,
            "milestones": (1, 3),
            "gamma": 0.1,
            "clip_norm": None,
            "accumulate": 1,
        }
    )
    config.update(changes)
    return config


def descend(config, gradients, steps_per_epoch=2):
    """Return the parameter after every gradient."""
    optimizer = optim.optimizer(config, optim.learning_rate(config, steps_per_epoch))
    parameter = jnp.arange(1.0, 4.0)
    state, path = optimizer.init(parameter), []
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state, parameter)
        parameter = optax.apply_updates(parameter, update)
        path.append(parameter)
    return np.stack(path)


def descend_in_pytorch(make, gradients, steps_per_epoch=2):
    parameter = torch.arange(1.0, 4.0, dtype=torch.float64, requires_grad=True)
    optimizer = make([parameter])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.1)
    path = []
    for i, gradient in enumerate(gradients, 1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        path.append(parameter.detach().numpy().copy())
        if i % steps_per_epoch == 0:
            schedule.step()
    return np.stack(path)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.05)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05, momentum=0.9)),
    ],
)
def test_ten_updates_over_two_milestones_equal_pytorchs(name, make, x64):
    gradients = np.random.default_rng(0).normal(size=(10, 3))
    ours, theirs = descend(config_of(name=name), gradients), descend_in_pytorch(make, gradients)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_the_rate_drops_at_the_first_step_after_each_milestone():
    rate = optim.learning_rate(config_of(), steps_per_epoch=5)
    rates = [float(rate(step)) for step in (0, 4, 5, 14, 15, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_accumulated_batches_make_one_update_with_their_mean_at_the_rate_of_their_epoch(x64):
    gradients = np.random.default_rng(0).normal(size=(12, 3))
    accumulated = descend(config_of(name="sgd", accumulate=2), gradients, steps_per_epoch=4)
    plain = descend(config_of(name="sgd"), gradients.reshape(6, 2, 3).mean(1), steps_per_epoch=2)
    np.testing.assert_allclose(accumulated[1::2], plain, rtol=1e-12)


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    config = config_of(name="sgd", weight_decay=0.0, clip_norm=1.0)
    path = descend(config, [[30.0, 0.0, 40.0]])
    np.testing.assert_allclose(np.arange(1.0, 4.0) - path[0], [0.06, 0, 0.08], rtol=1e-6, atol=1e-7)


def test_an_unknown_optimiser_is_named():
    with pytest.raises(ValueError, match=r"adam7.*'adamw' and 'sgd'"):
        optim.optimizer(config_of(name="adam7"), lambda step: 0.1)


def test_every_parameter_decays_biases_and_norms_included():
    optimizer = optim.optimizer(config_of(learning_rate=1.0, milestones=()), lambda step: 1.0)
    parameters = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(zero, optimizer.init(parameters), parameters)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.05, rtol=1e-6)
