"""Optimisers and their schedule, with PyTorch's constants."""

from typing import Any

import optax
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Return the rate by step: `learning_rate`, times `gamma` from each epoch of `milestones` on."""
    return optax.piecewise_constant_schedule(
        config.learning_rate, {epoch * steps_per_epoch: config.gamma for epoch in config.milestones}
    )


def optimizer(config: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimiser a config names, over every parameter, biases and norms included.

    `adamw` decays weights decoupled from the gradient; `sgd` adds the decay to the gradient and takes
    momentum, both as PyTorch does. Gradients are first clipped to the global norm `clip_norm` unless None.
    With `accumulate` = k, the mean gradient of k batches makes one update, at the rate of the last.

    Args:
        config: the fields named here.
        learning_rate: the rate by step, that is by batch.

    Raises:
        ValueError: no such optimiser.
    """

    def schedule(update: Any) -> Any:
        return learning_rate((update + 1) * config.accumulate - 1)

    match config.name:
        case "adamw":
            update = optax.adamw(schedule, weight_decay=config.weight_decay)
        case "sgd":
            update = optax.chain(
                optax.add_decayed_weights(config.weight_decay), optax.sgd(schedule, momentum=config.momentum)
            )
        case name:
            raise ValueError(f"optimizer.name={name!r}: allowed are 'adamw' and 'sgd'")
    if config.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    if config.accumulate > 1:
        update = optax.MultiSteps(
            update,
            config.accumulate,
            accumulator_dtype=None,  # that of the parameters, so that float64 stays float64
        ).gradient_transformation()
    return update
