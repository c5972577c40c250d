"""Fields of a config, each declared once: default, what is allowed, meaning, whether a run may change it.

A tree of fields is a mapping of names to fields and to further trees; `*` stands for any name. What a config
holds, what is checked, what `--help` lists and what a continued run may do otherwise all follow from it.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tat_jax import paths


class Rule(NamedTuple):
    """Which values a field may have, in words and as a function."""

    allowed: str
    holds: Callable[[Any], bool]


class Former(NamedTuple):
    """A field that another one replaced, as configs written before have it.

    Attributes:
        name: what it was called, beside the one that replaced it.
        rule: which values were allowed.
        values: of each of those, the value now.
    """

    name: str
    rule: Rule
    values: Mapping[Any, Any]


class Field(NamedTuple):
    """One field of a config.

    Attributes:
        default: its value if nobody says otherwise; a type for a field that is None until it is set.
        rule: which values are allowed.
        meaning: what it says, in a line.
        may_change: whether a run may go on with another value; or a function of the values before and after.
        optional: whether a config may lack it.
        none_is: what None stands for, of the fields beside it.
        only_with: the field beside it, and which values that must have for this one to be read at all.
        former: the field that this one replaced.
    """

    default: Any
    rule: Rule
    meaning: str
    may_change: bool | Callable[[Any, Any], bool] = False
    optional: bool = False
    none_is: Callable[[Mapping[str, Any]], Any] | None = None
    only_with: tuple[str, Rule] | None = None
    former: Former | None = None


# Of each name a field, or further fields.
Fields = Mapping[str, Any]


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int) -> Rule:
    """Return the rule of whole numbers from `least` on."""
    return Rule(f"a whole number from {least} on", lambda value: type(value) is int and value >= least)


def or_none(rule: Rule) -> Rule:
    """Return a rule that takes None, too."""
    return Rule(f"{rule.allowed}, or None", lambda value: value is None or rule.holds(value))


def one_of(*values: Any) -> Rule:
    """Return the rule of some values of their types."""
    return Rule(
        " or ".join(map(repr, values)),
        lambda value: any(type(value) is type(known) and value == known for known in values),
    )


def numbers(count: int, allowed: str, holds: Callable[..., bool]) -> Rule:
    """Return the rule of so many numbers for which `holds`."""
    return Rule(
        allowed,
        lambda value: (
            isinstance(value, tuple | list)
            and len(value) == count
            and all(map(is_number, value))
            and holds(*value)
        ),
    )


def _are_rising(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and all(type(epoch) is int and epoch > 0 for epoch in value)
        and all(first < second for first, second in pairwise(value))
    )


POSITIVE = Rule("a number greater than 0", lambda value: is_number(value) and value > 0)
NOT_NEGATIVE = Rule("a number from 0 on", lambda value: is_number(value) and value >= 0)
SHARE = Rule("a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
TEXT = Rule("a text that is not empty", lambda value: isinstance(value, str) and value != "")
FOLDER = Rule(
    f"a folder {paths.ANYWHERE}",
    lambda value: TEXT.holds(value) and (not paths.is_address(value) or paths.is_in_bucket(value)),
)
YES_OR_NO = Rule("True or False", lambda value: isinstance(value, bool))
RISING_EPOCHS = Rule("rising epochs, each a whole number from 1 on", _are_rising)


def defaults(fields: Fields) -> ConfigDict:
    """Return a config of all fields that it must have, at their defaults."""
    config = ConfigDict()
    for name, field in fields.items():
        if not isinstance(field, Field):
            if name != "*":
                config[name] = defaults(field)
        elif not field.optional:
            config[name] = default(field)
    return config


def default(field: Field) -> Any:
    """Return the default of a field as a config holds it."""
    return placeholder(field.default) if isinstance(field.default, type) else field.default


def find(fields: Fields, name: str) -> Field | None:
    """Return the field of a dotted name; of a value within a field that holds several, that field."""
    found = _find(fields, name.split("."))
    return found if isinstance(found, Field) else None


def _find(fields: Fields, parts: Sequence[str]) -> Any:
    """Return what a path leads to: fields, a field, or None; of a path within a field, that field."""
    here: Any = fields
    for part in parts:
        if isinstance(here, Field) or here is None:
            break
        here = here.get(part, here.get("*"))
    return here


def find_former(fields: Fields, name: str) -> tuple[str, Former] | None:
    """Return, of the dotted name of a field that was replaced, that of the one now, and what it was."""
    above, _, last = name.rpartition(".")
    here = _find(fields, above.split(".") if above else ())
    if isinstance(here, Field) or here is None:
        return None
    for now, field in here.items():
        if isinstance(field, Field) and field.former and field.former.name == last:
            return f"{above}.{now}" if above else now, field.former
    return None


def renew(fields: Fields, values: Any) -> None:
    """Write what a config or a mapping says of replaced fields as the fields now say it, in place."""
    for name, field in fields.items():
        was = field.former if isinstance(field, Field) else None
        if was and was.name in values and was.rule.holds(values[was.name]):
            values[name] = was.values[values[was.name]]
            del values[was.name]
    for name, value in values.items():
        below = fields.get(name, fields.get("*"))
        if isinstance(below, Mapping) and isinstance(value, Mapping | ConfigDict):
            renew(below, value)


def wrong(fields: Fields, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a line for each field that is missing, unknown or not allowed."""
    for name, field in fields.items():
        if name not in values and name != "*":
            yield from (f"{missing} is missing" for missing in _required(field, prefix + name))
    for name, value in values.items():
        found = fields.get(name, fields.get("*"))
        if isinstance(found, Field):
            if not found.rule.holds(value):
                yield f"{prefix}{name}={value!r}: allowed is {found.rule.allowed}"
        elif found is not None and isinstance(value, Mapping):
            yield from wrong(found, value, f"{prefix}{name}.")
        elif found is not None:
            yield f"{prefix}{name}={value!r}: it has fields of its own, {', '.join(found)}"
        elif replaced := find_former(fields, name):
            now, was = replaced
            instead = " or ".join(f"{new!r} for {old!r}" for old, new in was.values.items())
            yield f"{prefix}{name}={value!r}: {prefix}{now} has replaced it, {instead}"
        else:
            yield unknown(name, fields, prefix)


def idle(fields: Fields, values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a line for each field that is set, and that nothing reads, as the one beside it has its value."""
    for name, value in values.items():
        field = fields.get(name, fields.get("*"))
        if not isinstance(field, Field):
            if field is not None:
                yield from idle(field, value, f"{prefix}{name}.")
        elif field.only_with and value not in (None, default(field)):
            beside, rule = field.only_with
            there = values.get(beside, default(fields[beside]))
            if not rule.holds(there):
                yield (
                    f"{prefix}{name}={value!r} does nothing, as {prefix}{beside} is {there!r}: "
                    f"it is read where that is {rule.allowed}"
                )


def unknown(name: str, there: Iterable[str], prefix: str, fields: Fields | None = None) -> str:
    """Return what to say of a name that is none of those that are `there`.

    Args:
        name: behind `prefix`, as in "optimizer.".
        there: the fields below that prefix.
        prefix: where it was looked for.
        fields: all, among which it may lie elsewhere.
    """
    there = list(there)
    near = [prefix + match for match in difflib.get_close_matches(name, there, n=1)]
    near = near or [path for path in _names(fields or {}) if path.endswith(f".{name}")]
    if near:
        return f"{prefix}{name} is no field; did you mean {' or '.join(near)}?"
    return f"{prefix}{name} is no field; {prefix[:-1] or 'the config'} has {', '.join(there)}"


def _names(fields: Fields, prefix: str = "") -> Iterator[str]:
    for name, field in fields.items():
        yield from [prefix + name] if isinstance(field, Field) else _names(field, f"{prefix}{name}.")


def may_be_missing(fields: Field | Fields) -> bool:
    """Return whether a config may lack a field, or a section as none of its fields must be there."""
    return not any(_required(fields, ""))


def _required(field: Field | Fields, name: str) -> Iterator[str]:
    if isinstance(field, Field):
        if not field.optional:
            yield name
    else:
        for part, of_part in field.items():
            if part != "*":
                yield from _required(of_part, f"{name}.{part}")


def lines(fields: Fields, prefix: str = "") -> Iterator[str]:
    """Yield a line for each field: its name, its default, its meaning and what is allowed."""
    for name, field in fields.items():
        if isinstance(field, Field):
            value = None if isinstance(field.default, type) else field.default
            where = f"with {field.only_with[0]}={field.only_with[1].allowed}: " if field.only_with else ""
            yield f"{prefix}{name}={value!r}: {where}{field.meaning}; {field.rule.allowed}"
        else:
            yield from lines(field, f"{prefix}{name}.")
