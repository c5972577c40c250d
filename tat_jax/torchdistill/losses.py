"""`criterion`: the sum of losses, of labels and logits in `org_term` and of taps in `sub_terms`."""

from collections.abc import Iterator
from typing import Any

from tat_jax.torchdistill.networks import EMBEDDED, Embedding, Side
from tat_jax.torchdistill.section import Section


def losses(criterion: Section, student: Side, teacher: Side) -> dict[str, Any]:
    """Return the fields of the losses.

    Raises:
        ValueError: there is no such loss here, or it compares what is no pair of taps.
    """
    criterion.one_of("type", "GeneralizedCustomLoss")
    criterion.allow("func2extract_org_loss", None)
    cross_entropy, kd = _of_logits(criterion.section("org_term"))
    tat: dict[str, Any] = {}
    for term in criterion.section("sub_terms").sections().values():
        for tap, fields in _tat(term, student, teacher):
            if tap in tat:
                raise term.wrong("criterion", f"compares {tap} a second time")
            tat[tap] = fields
    return {"cross_entropy": {"weight": cross_entropy}, "kd": kd, "tat": tat}


def _of_logits(term: Section) -> tuple[float, dict[str, float]]:
    """Return the weight of the cross-entropy and the fields of KD."""
    factor = term.number("factor") if "factor" in term else 0.0  # without one, the term is not added
    term.allow("factor", None)
    loss = term.section("criterion")
    params = loss.section("params")
    if "type" not in loss:
        return 0.0, {"weight": 0.0}
    if loss.one_of("type", "KDLoss", "CrossEntropyLoss") == "CrossEntropyLoss":
        params.allow("reduction", "mean")
        return factor, {"weight": 0.0}
    params.allow("reduction", "batchmean")
    temperature = params.number("temperature")
    if temperature <= 0:
        raise params.wrong("temperature", "is not greater than 0")
    alpha = params.number("alpha") if "alpha" in params else None
    beta = params.number("beta") if "beta" in params else None
    params.allow("alpha", None)
    params.allow("beta", None)
    if alpha is None and beta is None:
        raise params.wrong("alpha", "and beta say nothing")
    if not alpha:  # the published code then leaves out T² and beta with the labels
        return 0.0, {"weight": factor / temperature**2, "temperature": temperature}
    return factor * alpha, {
        "weight": factor * (1 - alpha if beta is None else beta),
        "temperature": temperature,
    }


def _tat(term: Section, student: Side, teacher: Side) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the fields of the TaT of each pair of taps."""
    loss = term.section("criterion")
    loss.one_of("type", "MaskedFM")
    term.allow("params", None, {})
    factor = term.number("factor")
    params = loss.section("params")
    heads = params.whole("heads")
    for pair in params.section("feature_pairs").sections().values():
        ours, embeddings = _tapped(pair.section("student"), student, ("feature", "query", "value"))
        theirs, _ = _tapped(pair.section("teacher"), teacher, ("feature", "key"))
        channels = student.channels(ours), teacher.channels(theirs)
        if len(embeddings) != 2 or any(embedding.channels != channels for embedding in embeddings):
            what = f"a query and a value embedded from {channels[0]} channels into {channels[1]}"
            raise pair.section("student").wrong("path", f"has not {what}")
        fields = {"weight": factor * pair.number("factor", 1.0), "heads": heads}
        yield ours, fields if ours == theirs else {**fields, "student_tap": ours, "teacher_tap": theirs}


def _tapped(section: Section, side: Side, meant: tuple[str, ...]) -> tuple[str, list[Embedding]]:
    """Return the tap of a pair's side, and the embeddings of it that are compared."""
    section.one_of("io", "output")
    paths = section.several("path", str)
    taps = {side.tap(path) for path in paths}
    tap = taps.pop() if len(taps) == 1 else None
    if tap is None or len(paths) != len(meant) or paths[0] != side.prefix + tap:
        raise section.wrong("path", f"is not {', '.join(meant)} of one tap, all hooked")
    embedded = [path.removeprefix(EMBEDDED) for path in paths[1:] if path.startswith(EMBEDDED)]
    return tap, [side.embeddings[name] for name in embedded]
