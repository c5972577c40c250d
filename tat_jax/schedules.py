"""Weights of losses that change during training, as configs hold them: by epoch or by step.

A weight is a number, or a mapping as `linear`, `cosine` and `step` return it. It goes from `first` at `begin`
to `last` at `end`, constant before and after. By epoch it is constant within each; the first is epoch 0.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import optax

from tat_jax.fields import NOT_NEGATIVE, Rule, is_number, one_of, whole

# The share of `first` that is left, by what has passed since `begin`.
_SHARES: Mapping[str, Callable[[int], optax.Schedule]] = {
    # The length as a float: optax divides by it, and a step / int would be float32 always.
    "linear": lambda length: optax.linear_schedule(1.0, 0.0, float(length)),
    "cosine": lambda length: optax.cosine_decay_schedule(1.0, length),
    "step": lambda length: optax.constant_schedule(0.0),
}
_RULES: Mapping[str, Rule] = {
    "shape": one_of(*_SHARES),
    "first": NOT_NEGATIVE,
    "last": NOT_NEGATIVE,
    "begin": whole(0),
    "end": whole(1),
    "by": one_of("epoch", "step"),
}


def linear(first: float, last: float, *, begin: int = 0, end: int, by: str = "epoch") -> dict[str, Any]:
    """Return a weight that goes straight from `first` to `last`."""
    return {"shape": "linear", "first": first, "last": last, "begin": begin, "end": end, "by": by}


def cosine(first: float, last: float, *, begin: int = 0, end: int, by: str = "epoch") -> dict[str, Any]:
    """Return a weight that goes from `first` to `last` by half a cosine, flat at both ends."""
    return {"shape": "cosine", "first": first, "last": last, "begin": begin, "end": end, "by": by}


def step(first: float, last: float, *, begin: int, by: str = "epoch") -> dict[str, Any]:
    """Return a weight that is `first` before `begin`, and `last` from it on."""
    return {"shape": "step", "first": first, "last": last, "begin": begin, "by": by}


def _is_weight(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return NOT_NEGATIVE.holds(value)
    names = _RULES.keys() - ({"end"} if value.get("shape") == "step" else set())
    return (
        value.keys() == names
        and all(_RULES[name].holds(value[name]) for name in names)
        and value["begin"] < value.get("end", math.inf)
    )


WEIGHT = Rule(
    f"{NOT_NEGATIVE.allowed}, or a schedule of shape ({_RULES['shape'].allowed}), first and last (each "
    f"{NOT_NEGATIVE.allowed}), begin and end (whole numbers, 0 ≤ begin < end; no end for 'step') and by "
    f"({_RULES['by'].allowed})",
    _is_weight,
)


def is_zero(weight: Any) -> bool:
    """Return whether a weight is 0 throughout."""
    return weight == 0 if is_number(weight) else weight["first"] == weight["last"] == 0


def weight_at(weight: Any, steps_per_epoch: int) -> float | optax.Schedule:
    """Return a number as it is, and a schedule as a function of the step, which may be traced."""
    if is_number(weight):
        return weight
    begin, first, last = weight["begin"], weight["first"], weight["last"]
    share = optax.join_schedules(
        [optax.constant_schedule(1.0), _SHARES[weight["shape"]](weight.get("end", begin) - begin)], [begin]
    )
    steps = steps_per_epoch if weight["by"] == "epoch" else 1

    def at(step: Any) -> Any:
        left = share(step // steps)
        return left * first + (1 - left) * last

    return at
