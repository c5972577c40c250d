"""Optimisers, their rates by step and by path, with PyTorch's constants."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

from tat_jax.fields import (
    NOT_NEGATIVE,
    POSITIVE,
    RISING_EPOCHS,
    SHARE,
    TEXT,
    YES_OR_NO,
    Field,
    Fields,
    Rule,
    one_of,
    or_none,
    whole,
)

_LOSSES = "losses"  # where the parameters of losses are, if those that are switched on have any
_WARMUP_FROM = 0.01  # of the learning rate, at the first step: torchvision's


def _multistep(config: ConfigDict, steps_per_epoch: int, begin: int, length: int) -> optax.Schedule:
    drops = {epoch * steps_per_epoch - begin: config.gamma for epoch in config.milestones}
    return optax.piecewise_constant_schedule(config.learning_rate, drops)


def _cosine(config: ConfigDict, steps_per_epoch: int, begin: int, length: int) -> optax.Schedule:
    least = config.minimum_rate / config.learning_rate
    return optax.cosine_decay_schedule(config.learning_rate, length, alpha=least)


def _polynomial(config: ConfigDict, steps_per_epoch: int, begin: int, length: int) -> optax.Schedule:
    # The length as a float, here and below: optax divides by it, and a step / int would be float32 always.
    return optax.polynomial_schedule(config.learning_rate, 0.0, config.power, float(length))


def _adamw(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=config.weight_decay)


def _sgd(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(rate, momentum=config.momentum, nesterov=config.nesterov),
    )


_SCHEDULES: Mapping[str, Callable[[ConfigDict, int, int, int], optax.Schedule]] = {
    "multistep": _multistep,
    "cosine": _cosine,
    "polynomial": _polynomial,
}
_OPTIMIZERS: Mapping[str, Callable[[ConfigDict, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}


def _are_rates(value: Any) -> bool:
    def is_pair(pair: Any) -> bool:
        return isinstance(pair, tuple | list) and len(pair) == 2

    return (
        isinstance(value, tuple | list)
        and all(is_pair(pair) and TEXT.holds(pair[0]) and NOT_NEGATIVE.holds(pair[1]) for pair in value)
        and len({path for path, _ in value}) == len(value)
    )


_SGD = ("name", one_of("sgd"))
_MULTISTEP = ("schedule", one_of("multistep"))

FIELDS: Fields = {
    "name": Field("adamw", one_of(*_OPTIMIZERS), "the optimiser"),
    "learning_rate": Field(1.6e-3, POSITIVE, "not scaled by devices or batch", may_change=True),
    "weight_decay": Field(5e-4, NOT_NEGATIVE, "of every parameter, biases and norms too", may_change=True),
    "momentum": Field(0.9, SHARE, "of the gradients before", may_change=True, only_with=_SGD),
    "nesterov": Field(False, YES_OR_NO, "look ahead by the momentum", may_change=True, only_with=_SGD),
    "schedule": Field("multistep", one_of(*_SCHEDULES), "of the rate, by step", may_change=True),
    "milestones": Field(
        (30, 60, 90),
        RISING_EPOCHS,
        "after each the rate is times gamma",
        may_change=True,
        only_with=_MULTISTEP,
    ),
    "gamma": Field(0.1, POSITIVE, "of the milestones", may_change=True, only_with=_MULTISTEP),
    "power": Field(
        0.9,
        POSITIVE,
        "the rate falls as (1 - t/T)^power",
        may_change=True,
        only_with=("schedule", one_of("polynomial")),
    ),
    "minimum_rate": Field(
        0.0,
        NOT_NEGATIVE,
        "where the rate ends",
        may_change=True,
        only_with=("schedule", one_of("cosine")),
    ),
    "warmup_epochs": Field(
        0.0, NOT_NEGATIVE, "over which the rate rises, before the schedule begins", may_change=True
    ),
    "rates": Field(
        (),
        Rule("pairs of a path and a number from 0 on, each path once", _are_rates),
        "factors of the rate by path, as ('student.network.fc', 10.0); the longest path wins",
        may_change=True,
    ),
    "clip_norm": Field(float, or_none(POSITIVE), "of the whole gradient; None: no clipping"),
    "accumulate": Field(1, whole(1), "batches an update"),
}


def _named(functions: Mapping[str, Callable], field: str, config: ConfigDict) -> Callable:
    if config[field] not in functions:
        raise ValueError(f"optimizer.{field}={config[field]!r}: allowed is {one_of(*functions).allowed}")
    return functions[config[field]]


def learning_rate(config: ConfigDict, steps_per_epoch: int, epochs: int) -> optax.Schedule:
    """Return the rate by step: a warm-up, then the schedule that a config names.

    The warm-up is linear from a hundredth of `learning_rate` at the first step. At step t of the T that
    follow, PyTorch's schedulers of the same names, stepped after every batch, have the rates

    - `multistep`: learning_rate · gamma^k, when k of the `milestones` are over; these are epochs of the run,
      those of the warm-up included;
    - `cosine`: minimum_rate + (learning_rate − minimum_rate) · (1 + cos(π t/T)) / 2;
    - `polynomial`: learning_rate · (1 − t/T)^power.

    Args:
        config: the fields named here.
        steps_per_epoch: batches an epoch.
        epochs: of the run.

    Raises:
        ValueError: no such schedule.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    length = max(1, epochs * steps_per_epoch - warmup)
    schedule = _named(_SCHEDULES, "schedule", config)(config, steps_per_epoch, warmup, length)
    if warmup == 0:
        return schedule
    rise = optax.linear_schedule(_WARMUP_FROM * config.learning_rate, config.learning_rate, float(warmup))
    return optax.join_schedules([rise, schedule], [warmup])


def optimizer(
    config: ConfigDict, learning_rate: optax.Schedule, params: optax.Params
) -> optax.GradientTransformation:
    """Return the optimiser a config names, over every parameter, biases and norms included.

    `adamw` decays weights decoupled from the gradient; `sgd` adds the decay to the gradient and takes
    momentum, plain or Nesterov's, all as PyTorch does. Gradients are first clipped to the global norm
    `clip_norm` unless None. With `accumulate` = k, the mean gradient of k batches makes one update, at the
    rate of the last. `rates` multiply the rate of what is at or below a path, as the `lr` of a group of
    parameters does in PyTorch, decay included; of several paths the longest counts.

    Args:
        config: the fields named here.
        learning_rate: the rate by step, that is by batch.
        params: what is trained; its dotted paths, whole, as `student.network.fc` or `losses.tat_layer4`, are
            what `rates` names.

    Raises:
        ValueError: no such optimiser, or no parameter at or below a path of `rates`.
    """

    def rate(update: Any) -> Any:
        return learning_rate((update + 1) * config.accumulate - 1)

    update = _named(_OPTIMIZERS, "name", config)(config, rate)
    if config.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    if config.accumulate > 1:
        update = optax.MultiSteps(
            update,
            config.accumulate,
            accumulator_dtype=None,  # that of the parameters, so that float64 stays float64
        ).gradient_transformation()
    if config.rates:
        _check_paths([path for path, _ in config.rates], params)
        update = _scaled(update, config.rates)
    return update


def _scaled(
    optimizer: optax.GradientTransformation, rates: Sequence[tuple[str, float]]
) -> optax.GradientTransformation:
    """Multiply updates by the factors of their paths, without a state, so that a run may change them."""
    longest_first = sorted(rates, key=lambda rate: -len(rate[0]))

    def factor(name: str) -> float:
        return next((factor for path, factor in longest_first if f"{name}.".startswith(f"{path}.")), 1.0)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map_with_path(lambda path, x: factor(_dotted(path)) * x, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def _check_paths(paths: Sequence[str], params: optax.Params) -> None:
    leaves = jax.tree.leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    names = [_dotted(path).split(".") for path, _ in leaves]
    there = sorted({".".join(name[:depth]) for name in names for depth in range(1, len(name) + 1)})
    for path in paths:
        if path not in there and path != _LOSSES:
            within = [name for name in there if name.endswith(f".{path}")]
            near = within or difflib.get_close_matches(path, there, n=3, cutoff=0)
            raise ValueError(
                f"optimizer.rates: no parameter is at or below {path}; near is {', '.join(near[:3])}"
            )


def _dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
