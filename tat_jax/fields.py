"""What each field of a config may be, checked before anything is computed or written."""

import difflib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tat_jax.data.sources import SOURCES
from tat_jax.resnet import ARCHITECTURES


class Rule(NamedTuple):
    """Which values a field may have, in words and as a function."""

    allowed: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int) -> Rule:
    return Rule(f"a whole number from {least} on", lambda value: type(value) is int and value >= least)


def _or_none(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or None", lambda value: value is None or rule.holds(value))


def _one_of(*values: Any) -> Rule:
    return Rule(
        " or ".join(map(repr, values)),
        lambda value: any(type(value) is type(known) and value == known for known in values),
    )


def _range(most: float, words: str) -> Rule:
    return Rule(
        words,
        lambda value: (
            isinstance(value, tuple | list)
            and len(value) == 2
            and all(map(_is_number, value))
            and 0 < value[0] <= value[1] <= most
        ),
    )


def _are_milestones(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and all(type(epoch) is int and epoch > 0 for epoch in value)
        and all(first < second for first, second in pairwise(value))
    )


_POSITIVE = Rule("a number greater than 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = Rule("a number from 0 on", lambda value: _is_number(value) and value >= 0)
_SHARE = Rule("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_TEXT = Rule("a text that is not empty", lambda value: isinstance(value, str) and value != "")
_YES_OR_NO = Rule("True or False", lambda value: isinstance(value, bool))

_NETWORK = {
    "architecture": _one_of(*ARCHITECTURES),
    "weights": _TEXT,
    "small_images": _YES_OR_NO,
    "width": _whole(1),
}

# The fields of configs/base.py, where their meanings stand; `*` is any tap.
RULES = {
    "seed": _whole(0),
    "epochs": _whole(1),
    "batch_size": _whole(1),
    "dtype": _one_of("float32", "bfloat16", "float64"),
    "bn_group": _or_none(_whole(1)),
    "eval_every": _whole(1),
    "log_every": _whole(1),
    "steps_left_out": _whole(0),
    "checkpoint_minutes": _NOT_NEGATIVE,
    **{f"student.{name}": rule for name, rule in _NETWORK.items()},
    **{f"teacher.{name}": rule for name, rule in _NETWORK.items()},
    "loss.alpha": _NOT_NEGATIVE,
    "loss.beta": _or_none(_NOT_NEGATIVE),
    "loss.temperature": _POSITIVE,
    "tat.*.weight": _NOT_NEGATIVE,
    "tat.*.heads": _whole(1),
    "tat.*.embedding_kernel": _one_of(0, 1, 3),
    "tat.*.trainable_key": _YES_OR_NO,
    "tat.*.per_teacher_position": _YES_OR_NO,
    "optimizer.name": _one_of("adamw", "sgd"),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.momentum": _SHARE,
    "optimizer.milestones": Rule("rising epochs, each a whole number from 1 on", _are_milestones),
    "optimizer.gamma": _POSITIVE,
    "optimizer.clip_norm": _or_none(_POSITIVE),
    "optimizer.accumulate": _whole(1),
    "data.source": _one_of(*SOURCES),
    "data.root": _TEXT,
    "data.tfds_name": _TEXT,
    "data.labels_per_class": _or_none(_whole(1)),
    "data.image_size": _whole(1),
    "data.eval_resize": _whole(1),
    "data.crop_scale": _range(1, "two numbers greater than 0 and up to 1, the second not less"),
    "data.crop_ratio": _range(math.inf, "two numbers greater than 0, the second not less"),
    "data.flip": _YES_OR_NO,
    "data.threads": _whole(0),
    "data.skip_broken": _YES_OR_NO,
}


def check(config: ConfigDict) -> None:
    """Check every field of a training's config; what a `study` says of its runs is not a field of one.

    Raises:
        ValueError: fields are missing, unknown or have values that are not allowed; each is named, with what
            is allowed.
    """
    values = flatten_dict(config.to_dict(), sep=".")
    values = {name: value for name, value in values.items() if not name.startswith("study.")}
    lines = [f"{name} is missing" for name in RULES if "*" not in name and name not in values]
    for name, value in values.items():
        rule = RULES.get(_pattern(name))
        if rule is None:
            near = difflib.get_close_matches(_pattern(name), RULES, n=1)
            lines.append(f"{name} is no field" + (f"; did you mean {near[0]}?" if near else ""))
        elif not rule.holds(value):
            lines.append(f"{name}={value!r}: allowed is {rule.allowed}")
    if lines:
        raise ValueError("in the config, " + "\n  ".join(lines))


def _pattern(name: str) -> str:
    """Return the name under which the rule of a field stands."""
    parts = name.split(".")
    return ".".join([parts[0], "*", *parts[2:]]) if parts[0] == "tat" and len(parts) > 2 else name
