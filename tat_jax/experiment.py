"""The config of an experiment: every field it has, from the rooms that declare them."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from tat_jax import data, losses, networks, optim, tasks
from tat_jax.fields import (
    NOT_NEGATIVE,
    Field,
    Fields,
    Rule,
    idle,
    is_number,
    one_of,
    or_none,
    whole,
    wrong,
)

_DECAY = Rule("a number between 0 and 1, neither of them", lambda value: is_number(value) and 0 < value < 1)

FIELDS: Fields = {
    "task": tasks.FIELD,
    "seed": Field(0, whole(0), "of initial weights, order and crops"),
    "epochs": Field(100, whole(1), "times through the training images", may_change=True),
    "batch_size": Field(256, whole(1), "images a step, over all devices"),
    "gpus": Field(8, whole(1), "of a published YAML, whose batch size is that of one", optional=True),
    "dtype": Field(
        "float32",
        one_of("float32", "bfloat16", "float64"),
        "of activations; parameters, statistics and losses stay float32 at least",
    ),
    "bn_group": Field(int, or_none(whole(1)), "images over which BatchNorm's statistics go; None: the batch"),
    "mixup": Field(
        0.0,
        NOT_NEGATIVE,
        "α, with which images are mixed, λ ~ Beta(α, α) for each batch, the same for both networks; 0: not",
        may_change=True,
    ),
    "cutmix": Field(
        0.0,
        NOT_NEGATIVE,
        "α, with which boxes are exchanged likewise; beside mixup, one of the two for each batch; 0: not",
        may_change=True,
    ),
    "ema_decay": Field(
        float,
        or_none(_DECAY),
        "of the student's moving average, evaluated and saved beside it, as 0.9999; None: there is none",
        may_change=lambda before, after: None not in (before, after),
    ),
    "eval_every": Field(1, whole(1), "epochs from one evaluation to the next", may_change=True),
    "log_every": Field(50, whole(1), "steps a row of the log", may_change=True),
    "steps_left_out": Field(
        0, whole(0), "go on without so many steps whose loss or gradient is not finite", may_change=True
    ),
    "checkpoint_minutes": Field(
        15.0, NOT_NEGATIVE, "from one checkpoint to the next; one follows each evaluation", may_change=True
    ),
    "keep": Field(
        "all",
        one_of("all", "networks"),
        "of a finished run: all, so that more epochs may follow, or its last and its best network alone",
        may_change=True,
    ),
    "student": networks.FIELDS,
    "teacher": networks.FIELDS,
    "teacher_mode": Field(
        "eval",
        one_of("eval", "train"),
        "of the teacher; train: statistics of the batch and dropout, as published for segmentation",
    ),
    "teacher_dtype": Field(
        "float32",
        one_of("float32", "bfloat16"),
        "of the teacher's kernels in memory; its vectors and all it computes are as they would be otherwise",
    ),
    "teacher_sharding": Field(
        "replicated",
        one_of("replicated", "sharded"),
        "whether each device has the teacher's kernels whole, or its part, and gathers each as it is used",
        may_change=True,
    ),
    "losses": losses.FIELDS,
    "optimizer": optim.FIELDS,
    "data": data.FIELDS,
    "probe": data.PROBE,
}


def check(config: ConfigDict) -> None:
    """Check every field of a training's config; what a `study` says of its runs is not a field of one.

    Raises:
        ValueError: fields are missing, unknown or have values that are not allowed; each is named, with what
            is allowed. Or JAX was told nothing of float64.
    """
    if lines := list(wrong(FIELDS, _values(config))):
        raise ValueError("in the config, " + "\n  ".join(lines))
    if config.dtype == "float64" and jnp.result_type(float) != jnp.float64:
        raise ValueError("dtype='float64' needs JAX_ENABLE_X64=1 in the environment, or it is float32")


def notes(config: ConfigDict) -> Iterator[str]:
    """Yield what whoever trains with a config should have read, a line each: which fields do nothing."""
    yield from idle(FIELDS, _values(config))
    if config.probe.source is not None and config.task != "features":
        said = f"probe.source={config.probe.source!r} does nothing, as task is {config.task!r}"
        yield f"{said}: it is read where that is 'features'"


def _values(config: ConfigDict) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "study"}
