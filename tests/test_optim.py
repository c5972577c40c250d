"""Optimisers, their schedules and their rates by path are PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch.optim import lr_scheduler

from tat_jax import fields, optim
from tat_jax.distill import Distillation
from tat_jax.losses import Loss
from tat_jax.networks.view import View

EPOCHS, STEPS = 6, 5
START = {"backbone": {"fc": [1.0, 2.0, 3.0], "fc2": [-1.0, 0.5]}, "losses": {"mine": [4.0, 5.0]}}


def config_of(**changes):
    config = fields.defaults(optim.FIELDS)
    config.update({"learning_rate": 0.1, "weight_decay": 0.05, "milestones": (2, 4)} | changes)
    assert list(fields.wrong(optim.FIELDS, config.to_dict())) == []
    return config


def rate_of(config):
    return optim.learning_rate(config, STEPS, EPOCHS)


def schedule_in_pytorch(config, optimizer):
    """Return the scheduler that a user of PyTorch would write, to be stepped after every batch."""
    warmup = round(config.warmup_epochs * STEPS)
    left = EPOCHS * STEPS - warmup
    schedule = {
        "multistep": lambda: lr_scheduler.MultiStepLR(
            optimizer, [epoch * STEPS - warmup for epoch in config.milestones], config.gamma
        ),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, left, eta_min=config.minimum_rate),
        "polynomial": lambda: lr_scheduler.PolynomialLR(optimizer, left, config.power),
    }[config.schedule]()
    if not warmup:
        return schedule
    rise = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, schedule], [warmup])


def optimizer_in_pytorch(config, groups):
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        nesterov=config.nesterov,
    )


def gradients_of(count):
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda number: rng.normal(), START) for _ in range(count)]


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree, is_leaf=lambda leaf: isinstance(leaf, list))


def descend(config, gradients):
    """Return the parameters after every gradient, in one row each."""
    parameter = arrays(START)
    optimizer = optim.optimizer(config, rate_of(config), parameter)
    update = jax.jit(optimizer.update)
    state, path = optimizer.init(parameter), []
    for gradient in gradients:
        updates, state = update(arrays(gradient), state, parameter)
        parameter = optax.apply_updates(parameter, updates)
        path.append(np.concatenate(jax.tree.leaves(parameter)))
    return np.stack(path)


def descend_in_pytorch(config, gradients, factors=(1.0, 1.0, 1.0)):
    """Do so with a group of parameters for each leaf of `START`, at its factor of the rate."""
    rows = [[START["backbone"]["fc"], START["backbone"]["fc2"], START["losses"]["mine"]]]
    rows += [[g["backbone"]["fc"], g["backbone"]["fc2"], g["losses"]["mine"]] for g in gradients]
    leaves, *rows = [[torch.tensor(leaf, dtype=torch.float64) for leaf in row] for row in rows]
    for leaf in leaves:
        leaf.requires_grad_()
    groups = [
        {"params": [leaf], "lr": config.learning_rate * factor}
        for leaf, factor in zip(leaves, factors, strict=True)
    ]
    optimizer = optimizer_in_pytorch(config, groups)
    schedule = schedule_in_pytorch(config, optimizer)
    path = []
    for batch, row in enumerate(rows, 1):
        due = batch % config.accumulate == 0
        for leaf, gradient in zip(leaves, row, strict=True):
            # As after backward() on loss / accumulate; a leaf without a gradient is left as it is.
            leaf.sum_of_gradients = getattr(leaf, "sum_of_gradients", 0) + gradient / config.accumulate
            leaf.grad = leaf.sum_of_gradients if due else None
            leaf.sum_of_gradients = 0 if due else leaf.sum_of_gradients
        optimizer.step()
        schedule.step()
        path.append(torch.cat(leaves).detach().numpy().copy())
    return np.stack(path)


@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0, 1.3])
@pytest.mark.parametrize(
    "schedule",
    [
        {"schedule": "multistep"},
        {"schedule": "cosine"},
        {"schedule": "cosine", "minimum_rate": 0.003},
        {"schedule": "polynomial"},
        {"schedule": "polynomial", "power": 2.0},
    ],
)
def test_the_rate_of_every_step_is_pytorchs(schedule, warmup, x64):
    config = config_of(warmup_epochs=warmup, **schedule)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    scheduler, theirs = schedule_in_pytorch(config, optimizer), []
    for _ in range(EPOCHS * STEPS):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = jax.vmap(jax.jit(rate_of(config)))(jnp.arange(EPOCHS * STEPS, dtype=jnp.int32))
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("optimizer", [{"name": "adamw"}, {"name": "sgd"}, {"name": "sgd", "nesterov": True}])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("schedule", "warmup"), [("multistep", 0.0), ("multistep", 1.0), ("cosine", 0.5), ("polynomial", 0.0)]
)
def test_every_update_of_every_optimiser_is_pytorchs(optimizer, accumulate, warmup, schedule, x64):
    config = config_of(accumulate=accumulate, warmup_epochs=warmup, schedule=schedule, **optimizer)
    gradients = gradients_of(EPOCHS * STEPS)
    ours, theirs = descend(config, gradients), descend_in_pytorch(config, gradients)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "optimizer",
    [{"name": "adamw"}, {"name": "sgd", "nesterov": True, "schedule": "cosine", "accumulate": 2}],
)
@pytest.mark.parametrize(
    ("rates", "factors"),
    [
        ((("losses", 10.0),), (1.0, 1.0, 10.0)),
        ((("backbone.fc", 10.0),), (10.0, 1.0, 1.0)),  # fc2 is another
        ((("backbone", 0.5), ("backbone.fc2", 3)), (0.5, 3.0, 1.0)),
        ((("backbone", 0.0),), (0.0, 0.0, 1.0)),
    ],
)
def test_rates_by_path_are_pytorchs_groups_of_parameters(optimizer, rates, factors, x64):
    config = config_of(rates=rates, warmup_epochs=1.0, **optimizer)
    gradients = gradients_of(EPOCHS * STEPS)
    ours, theirs = descend(config, gradients), descend_in_pytorch(config, gradients, factors)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_the_cosine_and_the_polynomial_of_published_segmentation_have_its_rates(x64):
    cosine, polynomial = (
        optim.learning_rate(config_of(learning_rate=0.007, schedule=schedule), 661, 100)
        for schedule in ("cosine", "polynomial")
    )
    assert float(cosine(50 * 661)) == pytest.approx(0.0035, rel=1e-12)
    assert float(cosine(100 * 661 - 1)) == pytest.approx(3.95307337e-12, rel=1e-7)
    rates = [float(polynomial(step)) for step in (1, 50 * 661, 100 * 661 - 1)]
    assert rates == pytest.approx([0.00699990469, 0.00375120712, 3.2130444e-07], rel=1e-8)


def test_the_rate_drops_at_the_first_step_after_each_milestone():
    rate = rate_of(config_of(milestones=(1, 3)))
    rates = [float(rate(step)) for step in (0, 4, 5, 14, 15, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_milestones_are_epochs_of_the_run_with_a_warm_up_too():
    with_warm_up, without = rate_of(config_of(warmup_epochs=1.5)), rate_of(config_of())
    after = range(8, EPOCHS * STEPS)
    assert [float(with_warm_up(step)) for step in after] == [float(without(step)) for step in after]


@pytest.mark.parametrize("schedule", ["multistep", "cosine", "polynomial"])
def test_a_warm_up_that_is_longer_than_the_run_rises_to_its_end(schedule):
    rate = rate_of(config_of(schedule=schedule, warmup_epochs=2.0 * EPOCHS))
    assert float(rate(EPOCHS * STEPS)) == pytest.approx(0.1 * (0.01 + 0.99 / 2), rel=1e-6)


def test_clipping_bounds_the_norm_of_the_whole_gradient():
    config = config_of(name="sgd", weight_decay=0.0, clip_norm=1.0)
    gradient = {"backbone": {"fc": [30.0, 0.0, 0.0], "fc2": [0.0, 0.0]}, "losses": {"mine": [0.0, 40.0]}}
    before = np.concatenate(jax.tree.leaves(arrays(START)))
    np.testing.assert_allclose(
        before - descend(config, [gradient])[0], [0.06, 0, 0, 0, 0, 0, 0.08], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adam7"}, r"optimizer.name='adam7': allowed is 'adamw' or 'sgd'"),
        (
            {"schedule": "cos"},
            r"optimizer.schedule='cos': allowed is 'multistep' or 'cosine' or 'polynomial'",
        ),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(changes, message):
    config = config_of()
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        optim.optimizer(config, rate_of(config), arrays(START))


@pytest.mark.parametrize(
    "rates",
    [
        ("losses", 10.0),
        (("losses",),),
        (("losses", -1.0),),
        (("losses", "10"),),
        (("", 1.0),),
        ((1, 1.0),),
        (("losses", 1.0), ["losses", 2.0]),
        {"losses": 1.0},
    ],
)
def test_rates_that_are_no_pairs_of_path_and_factor_are_refused(rates):
    values = config_of().to_dict() | {"rates": rates}
    (line,) = fields.wrong(optim.FIELDS, values)
    assert line.endswith("allowed is pairs of a path and a number from 0 on, each path once")


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
        self.fc = nnx.Linear(2, 3, rngs=rngs)


class Regressor(Loss):
    def __init__(self, rngs):
        self.regressor = nnx.Linear(2, 2, rngs=rngs)


@pytest.fixture
def trained():
    rngs = nnx.Rngs(0)
    return nnx.state(Distillation(View(Network(rngs)), {"mine": Regressor(rngs)}), nnx.Param)


def test_paths_are_those_of_the_student_and_of_the_losses(trained):
    rates = (("student.network.fc", 10.0), ("student.network.blocks.1", 2), ("losses", 3.0))
    config = config_of(name="sgd", weight_decay=0.0, rates=rates)
    optimizer = optim.optimizer(config, lambda step: 1.0, trained)
    ones = jax.tree.map(jnp.ones_like, trained)
    updates, _ = optimizer.update(ones, optimizer.init(trained), trained)
    assert {".".join(map(str, path[:-1])): -leaf[...].max() for path, leaf in nnx.to_flat_state(updates)} == {
        "student.network.blocks.0": 1.0,
        "student.network.blocks.1": 2.0,
        "student.network.fc": 10.0,
        "losses.mine.regressor": 3.0,
    }


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("fc", "student.network.fc"),
        ("student.network.head", "student.network"),
        ("student.network.block", "student.network.blocks"),
        ("student.network.blocks.2", "student.network.blocks.1"),
        ("loses", "losses"),
        ("student.network.f", "student.network.fc"),
        ("student.network.fc.kernel.value", "student.network.fc.kernel"),
    ],
)
def test_a_path_without_parameters_is_answered_with_the_nearest_ones(path, near, trained):
    config = config_of(rates=(("losses", 1.0), (path, 10.0)))
    with pytest.raises(
        ValueError, match=rf"optimizer.rates: no parameter is at or below {path}; near is"
    ) as e:
        optim.optimizer(config, lambda step: 1.0, trained)
    assert near in str(e.value).split("near is ")[1].split(", ")


@pytest.mark.parametrize("rates", [(), (("losses", 10.0),)])
@pytest.mark.parametrize(
    ("changes", "earlier"),
    [
        ({"name": "adamw"}, optax.adamw(lambda step: 1.0)),
        ({"name": "sgd"}, optax.chain(optax.add_decayed_weights(0.1), optax.sgd(lambda step: 1.0, 0.9))),
        ({"clip_norm": 1.0}, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 1.0))),
        ({"accumulate": 2}, optax.MultiSteps(optax.adamw(lambda step: 1.0), 2)),
    ],
)
def test_the_moments_have_the_tree_of_earlier_checkpoints_whatever_the_rates(
    changes, earlier, rates, trained
):
    ours = optim.optimizer(config_of(rates=rates, **changes), lambda step: 1.0, trained).init(trained)
    assert jax.tree.structure(ours) == jax.tree.structure(earlier.init(trained))


def test_every_parameter_decays_biases_and_norms_included():
    parameters = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    optimizer = optim.optimizer(config_of(learning_rate=1.0), lambda step: 1.0, parameters)
    zero = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(zero, optimizer.init(parameters), parameters)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.05, rtol=1e-6)


def test_a_rate_of_losses_may_be_said_where_none_that_is_switched_on_has_parameters():
    config, rate = config_of(rates=(("losses", 10.0),)), optax.constant_schedule(0.1)
    optim.optimizer(config, rate, nnx.state(nnx.Dict(student=nnx.Linear(2, 3, rngs=nnx.Rngs(0))), nnx.Param))
