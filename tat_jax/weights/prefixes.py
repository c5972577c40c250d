"""Where in a file a network lies: the prefix under which its own names are found.

Trainers put a network's names under others: `module.`, `_orig_mod.`, `model.`, `state_dict.student.`. None is
listed here. The exceptions are a moving average, which is told from the network by its prefix, and the head
of OpenMMLab's classifiers, which lies beside the body instead of in it.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_AVERAGE = re.compile(r"(^|[._])ema[._]", re.IGNORECASE)
_HEAD_OF_OPENMMLAB = "head.fc"
_NAMED = 3  # of the names that an error or a line lists


class Names(NamedTuple):
    """The names of a network.

    Attributes:
        network: what it is called.
        body: of its arrays, but for the head's.
        head: the path of its last layer.
    """

    network: str
    body: Collection[str]
    head: str


class Found(NamedTuple):
    """A network in a file.

    Attributes:
        names: in the file, by the network's own names.
        prefix: of those names.
        said: what was chosen, and what was left out; empty where there was nothing else.
    """

    names: dict[str, str]
    prefix: str
    said: str


def find(
    entries: Mapping[str, np.ndarray], own: Names, *, prefix: str | None, ema: bool, source: str
) -> Found:
    """Return where in a file the network lies.

    Args:
        entries: of the file, by name.
        own: the network's names.
        prefix: the one to take of several; its end is enough.
        ema: take the moving average.
        source: what errors call the file.

    Raises:
        ValueError: none is there, or several, of which none is chosen.
    """
    counts = _counts(entries, own.body)
    most = max(counts.values(), default=0)
    if 2 * most < len(own.body):
        raise ValueError(
            f"{source} holds no {own.network}: of the names of its {len(entries)} tensors, "
            f"{_listed(entries)}, {most} are among the {len(own.body)} of one"
        )
    prefixes = _distinct([p for p, count in counts.items() if count == most], entries, own)
    chosen = _choose(prefixes, own, prefix=prefix, ema=ema, source=source)
    others = [p for p in prefixes if p != chosen]
    names = {
        name.removeprefix(chosen): name
        for name in entries
        if name.startswith(chosen) and not any(name.startswith(p) for p in others if p.startswith(chosen))
    }
    said = [f"taken from {chosen!r}"] if chosen else []
    names |= (head := _head_beside(entries, names, own, chosen))
    said += [f"its head from {next(iter(head.values())).rpartition('.')[0]!r}"] if head else []
    if others:
        averages = any(map(_AVERAGE.search, others)) and not _AVERAGE.search(chosen)
        hint = ", which --ema takes" if averages else ""
        said.append(f"beside it lies {_listed(others)}{hint}")
    taken = {id(entries[name]) for name in names.values()}
    left = [n for n, a in entries.items() if id(a) not in taken and not any(n.startswith(p) for p in others)]
    said += [f"left out: {_listed(left)}"] if left else []
    return Found(names, chosen, "; ".join(said))


def _counts(names: Collection[str], body: Collection[str]) -> Counter[str]:
    """Return how many of a network's names each prefix has."""
    longest = max(name.count(".") for name in body) + 1
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.rsplit(".", longest)
        for i in range(len(parts) > longest, len(parts)):
            if (ending := ".".join(parts[i:])) in body:
                counts[name.removesuffix(ending)] += 1
    return counts


def _distinct(prefixes: Sequence[str], entries: Mapping[str, np.ndarray], own: Names) -> list[str]:
    """Return the first prefix of each network; one that two modules hold has two, and the same arrays."""
    names = [*own.body, f"{own.head}.weight", f"{own.head}.bias"]
    found: dict[tuple[int, ...], str] = {}
    for prefix in prefixes:
        found.setdefault(tuple(id(entries.get(prefix + name)) for name in names), prefix)
    return list(found.values())


def _choose(prefixes: Sequence[str], own: Names, *, prefix: str | None, ema: bool, source: str) -> str:
    there = _listed(prefixes)
    kept = list(prefixes)
    if prefix is not None:
        wanted = f"{prefix.rstrip('.')}." if prefix else ""
        kept = [p for p in prefixes if p == wanted or (wanted and p.endswith(f".{wanted}"))]
        if not kept:
            raise ValueError(f"{source} has no {own.network} under the prefix {wanted!r}, but under {there}")
    averages = [p for p in kept if _AVERAGE.search(p)]
    if ema and not averages:
        raise ValueError(f"{source} holds no moving average of {own.network}: the prefixes are {there}")
    kept = averages if ema else [p for p in kept if p not in averages] or averages
    if len(kept) > 1:
        raise ValueError(
            f"{source} holds {len(kept)} networks with the names of {own.network}, under {_listed(kept)}: "
            f"choose one, as with --prefix {max(kept, key=len)}"
        )
    return kept[0]


def _head_beside(
    entries: Mapping[str, np.ndarray], names: Mapping[str, str], own: Names, prefix: str
) -> dict[str, str]:
    """Return the names of a head that lies beside the body, as in `backbone.conv1` and `head.fc`."""
    if any(name.startswith(f"{own.head}.") for name in names) or not prefix:
        return {}
    beside = f"{prefix[:-1].rpartition('.')[0]}.{_HEAD_OF_OPENMMLAB}".removeprefix(".")
    leaves = [leaf for leaf in ("weight", "bias") if f"{beside}.{leaf}" in entries]
    return {f"{own.head}.{leaf}": f"{beside}.{leaf}" for leaf in leaves}


def _listed(names: Collection[str]) -> str:
    first = ", ".join(map(repr, list(names)[:_NAMED]))
    return f"{first} and {len(names) - _NAMED} more" if len(names) > _NAMED else first
