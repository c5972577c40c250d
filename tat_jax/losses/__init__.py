"""Losses, one idea a module; the formulas are functions, and configs find the modules by name.

A loss is added by one class in a module here, and switched on by one line of a config.
"""

import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tat_jax.batch import Batch
from tat_jax.fields import Field, Fields, Rule
from tat_jax.losses.attention_transfer import attention_transfer
from tat_jax.losses.class_attention import class_attention
from tat_jax.losses.crd import crd
from tat_jax.losses.dist import dist
from tat_jax.losses.dkd import dkd
from tat_jax.losses.ickd import ickd
from tat_jax.losses.labels import cross_entropy, pixel_cross_entropy
from tat_jax.losses.logits import kd, kd_loss, kd_weights, kl_divergence, logit_standardization
from tat_jax.losses.loss import TAP_OPTIONS, FunctionLoss, Loss, Value
from tat_jax.losses.maps import resized_loss
from tat_jax.losses.nkd import nkd
from tat_jax.losses.patches import anchor_loss, patch_group_loss
from tat_jax.losses.pkt import pkt
from tat_jax.losses.relations import self_similarity_loss
from tat_jax.losses.review import hierarchical_context_loss
from tat_jax.losses.rkd import rkd
from tat_jax.losses.similarity_preserving import similarity_preserving
from tat_jax.losses.tat import target_aware_attention, tat_loss
from tat_jax.networks.view import Outputs
from tat_jax.schedules import WEIGHT, is_zero

__all__ = [
    "FIELDS",
    "LOSSES",
    "Batch",
    "FunctionLoss",
    "Loss",
    "Outputs",
    "Term",
    "anchor_loss",
    "attention_transfer",
    "class_attention",
    "crd",
    "cross_entropy",
    "dist",
    "dkd",
    "hierarchical_context_loss",
    "ickd",
    "kd",
    "kd_loss",
    "kd_weights",
    "kl_divergence",
    "logit_standardization",
    "nkd",
    "own_terms",
    "patch_group_loss",
    "pixel_cross_entropy",
    "pkt",
    "resized_loss",
    "rkd",
    "self_similarity_loss",
    "similarity_preserving",
    "target_aware_attention",
    "tat_loss",
    "terms_of",
]

LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for module in iter_modules(__path__)
    for loss in vars(import_module(f"{__name__}.{module.name}")).values()
    if isinstance(loss, type) and issubclass(loss, Loss) and "name" in vars(loss)
}


_ON = Rule("other than 0", lambda weight: not is_zero(weight))


class Term(NamedTuple):
    """A term of the loss.

    Attributes:
        name: what rows, pictures and errors call it.
        loss: the class that builds it; or a loss of the user's own, which is built.
        weight: a number, or a schedule as in `schedules`.
        options: what the class is built with.
    """

    name: str
    loss: type[Loss] | Loss
    weight: Any
    options: dict[str, Any]

    def __str__(self) -> str:
        number = isinstance(self.weight, int | float)
        weight = f"{self.weight:g}" if number else "({first:g}…{last:g})".format(**self.weight)
        return f"{weight}·{self.name}"


Own = Mapping[str, tuple[Any, Loss | Callable[[Outputs, Outputs, Batch], Value]]]


@functools.cache
def fields_of(loss: type[Loss]) -> dict[str, Field]:
    """Return the fields of a term of the loss: its weight and its options."""

    def may_change(before: Any, after: Any) -> bool:
        return not loss.has_parameters or is_zero(before) == is_zero(after)

    weight = Field(0.0, WEIGHT, f"of {loss.name} in the sum of the losses", may_change, optional=True)
    options = {name: option._replace(only_with=("weight", _ON)) for name, option in loss.options.items()}
    return {"weight": weight, **options}


FIELDS: Fields = {
    name: {"*": fields_of(loss)} if loss.compares_taps else fields_of(loss)
    for name, loss in sorted(LOSSES.items())
}


def terms_of(config: ConfigDict) -> list[Term]:
    """Return the terms of a config's `losses` whose weight is not 0."""
    found = []
    for name, entry in config.to_dict().items():
        loss = LOSSES[name]
        if loss.compares_taps:
            named = {f"{name}_{tap}": _of_taps(tap) | _said(options) for tap, options in entry.items()}
        else:
            named = {name: _usual_taps(loss) | _said(entry)}
        for term, options in named.items():
            weight = options.pop("weight", 0.0)
            if not is_zero(weight):
                found.append(Term(term, loss, weight, options))
    return found


def _usual_taps(loss: type[Loss]) -> dict[str, Any]:
    """Return the taps that a loss compares unless a config says others."""
    return {name: option.default for name, option in loss.options.items() if name in TAP_OPTIONS}


def _of_taps(name: str) -> dict[str, Any]:
    return {"student_tap": name, "teacher_tap": name}


def _said(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are set; one that is None is as good as left out."""
    return {name: value for name, value in entry.items() if value is not None}


def own_terms(losses: Own) -> list[Term]:
    """Return losses of the user's own as terms.

    Raises:
        ValueError: a name or a weight is not allowed.
    """
    found = []
    for name, (weight, loss) in losses.items():
        if not name.isidentifier() or name in LOSSES:
            raise ValueError(f"a loss of your own cannot be called {name!r}; take another word")
        if not WEIGHT.holds(weight):
            raise ValueError(f"the weight of the loss {name} is {weight!r}: allowed is {WEIGHT.allowed}")
        if not is_zero(weight):
            found.append(Term(name, loss if isinstance(loss, Loss) else FunctionLoss(loss), weight, {}))
    return found
