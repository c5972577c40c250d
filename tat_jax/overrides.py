"""What the command line says of a config: `--config.FIELD=VALUE`, read as the field's rule has it."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tat_jax.fields import YES_OR_NO, Field, Fields, Rule, find, find_former, may_be_missing, unknown

_FLAG = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_NOTHING = ("None", "none")
_YES_OR_NO = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Override(NamedTuple):
    """A field, and what is said of it."""

    name: str
    text: str


def split(arguments: Sequence[str], fields: Fields) -> tuple[list[str], list[Override]]:
    """Return the arguments that say nothing of fields, and what the others say.

    The value of a field may be an argument of its own; one that is True or False needs none, as in
    `--config.data.flip` and `--noconfig.data.flip`.

    Raises:
        ValueError: a value is missing.
    """
    others: list[str] = []
    overrides = []
    waiting = iter(arguments)
    for argument in waiting:
        flag = _FLAG.fullmatch(argument)
        if argument == "--":
            others += [argument, *waiting]
        elif not flag:
            others.append(argument)
        else:
            no, name, text = flag.groups()
            field, replaced = find(fields, name), find_former(fields, name)
            rule = replaced[1].rule if replaced else field and field.rule
            if text is None and rule is YES_OR_NO:
                text = str(not no)
            elif no:
                raise ValueError(f"{argument}: --config.{name}=VALUE is how to set it")
            text = next(waiting, None) if text is None else text
            if text is None:
                raise ValueError(f"--config.{name} is without a value")
            overrides.append(_renewed(Override(name, text), fields))
    return others, overrides


def _renewed(said: Override, fields: Fields) -> Override:
    """Return what is said of a field that was replaced as it is said of the one now."""
    replaced = find_former(fields, said.name)
    if replaced is None:
        return said
    now, was = replaced
    for value in _values([said.text], None):
        if was.rule.holds(value):
            return Override(now, str(was.values[value]))
    raise ValueError(f"--config.{said.name}={said.text}: allowed is {was.rule.allowed}")


def apply(config: ConfigDict, overrides: Sequence[Override], fields: Fields) -> None:
    """Set fields of a config in their order; of one that is set twice, the later value counts.

    Several numbers for a field that holds several are put together.

    Raises:
        ValueError: the config has no such field, or it may not have such a value.
    """
    said: dict[str, list[str]] = {}
    for name, text in overrides:
        said[name] = [*said.pop(name, ()), text]
    for name, texts in said.items():
        _set(config, name, texts, fields)


def _set(config: ConfigDict, name: str, texts: Sequence[str], fields: Fields) -> None:
    *above, last = name.split(".")
    here, prefix, known = config, "", fields
    for part in above:
        below = known.get(part, known.get("*"))
        if part and part not in here and isinstance(below, Mapping) and may_be_missing(below):
            with here.unlocked():  # a term or a variant that the config does not list
                here[part] = ConfigDict(sort_keys=False)
        _check_is_there(part, here, prefix, fields)
        prefix += f"{part}."
        if not isinstance(here[part], ConfigDict):
            raise ValueError(f"--config.{name}: {prefix[:-1]}={here[part]!r} has no fields of its own")
        here, known = here[part], below if isinstance(below, Mapping) else {}
    before = _value_of(last, here, known, prefix, fields)
    field = find(fields, name)
    if before is None and field and field.none_is:
        before = field.none_is(here)
    if field is None and isinstance(before, Mapping | ConfigDict):
        raise ValueError(f"--config.{name}={texts[-1]}: it has fields of its own, {', '.join(before)}")
    rule = field.rule if field else _like(before)
    for value in _values(texts, before):
        if rule.holds(value):
            with config.ignore_type(), config.unlocked():
                here[last] = float(value) if isinstance(before, float) and type(value) is int else value
            return
    raise ValueError(f"--config.{name}={texts[-1]}: allowed is {rule.allowed}")


def _value_of(name: str, here: ConfigDict, known: Fields, prefix: str, fields: Fields) -> Any:
    """Return what a field is; of one that its section may lack, the default; of a section, its fields."""
    there: Iterable[str] = here or known
    if name not in here and name and may_be_missing(known):
        declared = known.get(name, known.get("*"))
        if isinstance(declared, Field):
            return None if isinstance(declared.default, type) else declared.default
        if isinstance(declared, Mapping):
            return declared
        there = {*here, *known}
    _check_is_there(name, there, prefix, fields)
    return here[name]


def _check_is_there(name: str, there: Iterable[str], prefix: str, fields: Fields) -> None:
    if name not in there:
        raise ValueError(f"--config.{unknown(name, there, prefix, fields)}")


def _like(before: Any) -> Rule:
    """Return the rule of a field that is declared nowhere, as those of a study."""
    kinds = {float: (float, int), tuple: (tuple, list), list: (tuple, list)}.get(
        type(before), (type(before),)
    )
    return Rule(f"a value like {before!r}", lambda value: before is None or type(value) in kinds)


def _values(texts: Sequence[str], before: Any) -> Iterator[Any]:
    """Yield what a text may mean, the likeliest first."""
    text = texts[-1]
    if text in _NOTHING:
        yield None
        return
    several = isinstance(before, tuple | list)
    if several and len(texts) > 1:
        yield tuple(map(_literal, texts))
    literal = _literal(text)
    if several and not isinstance(literal, str):
        yield tuple(literal) if isinstance(literal, tuple | list) else (literal,)
    yield literal
    if text.lower() in _YES_OR_NO:
        yield _YES_OR_NO[text.lower()]
    yield text


def _literal(text: str) -> Any:
    """Return the value that a text is in Python, or the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
