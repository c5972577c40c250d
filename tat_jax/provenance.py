"""What a run was made of besides its config: the classes, the teacher's weights, the versions of the code.

A checkpoint remembers it, so that a run goes on only with the classes and the teacher with which it began.
"""

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from tat_jax.buckets import Place

Provenance = dict[str, Any]

_PACKAGES = ("tat-jax", "jax", "flax", "optax")


def provenance_of(
    classes: Sequence[str] | None, teacher: str | None, to_validate: int | None = None
) -> Provenance:
    """Return what a run is made of, as JSON has it.

    Args:
        classes: the names of the classes by label; None where the data has none.
        teacher: the SHA-256 of its arrays; None where no loss term uses it.
        to_validate: how many images accuracies are of.
    """
    return {
        "classes": None if classes is None else list(classes),
        "teacher": teacher,
        "to_validate": to_validate,
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def changes(before: Mapping[str, Any], now: Provenance, folder: Place) -> list[str]:
    """Return, a line each, what is new about a run that continues and may be.

    Args:
        before: what its checkpoint remembers; runs of before 2026-11-26 remember nothing.
        now: what it would go on with.
        folder: the run's, for errors.

    Raises:
        ValueError: the classes or the teacher are others.
    """
    if changed := _classes_changed(before.get("classes"), now["classes"]):
        raise ValueError(
            f"{folder} was trained on other classes: {changed}; give the class folders their names "
            "of then, or choose another --workdir"
        )
    was, teacher = before.get("teacher"), now["teacher"]
    if was and teacher and was != teacher:
        raise ValueError(
            f"{folder} was trained under another teacher: the SHA-256 of its weights was {was[:8]}…, it is "
            f"{teacher[:8]}… now; name the former weights, or choose another --workdir"
        )
    lines = []
    images, validated = before.get("to_validate"), now.get("to_validate")
    if images and validated and images != validated:
        lines.append(
            f"images to validate: {images:,} there, {validated:,} now, and `best` compares accuracies on both"
        )
    versions: Mapping[str, str] = before.get("versions", {})
    return lines + [
        f"{name}: {versions[name]} there, {version} now"
        for name, version in now["versions"].items()
        if versions.get(name, version) != version
    ]


def _classes_changed(before: Sequence[str] | None, now: Sequence[str] | None) -> str:
    if before is None or now is None or list(before) == list(now):
        return ""
    label = next((i for i, (was, name) in enumerate(zip(before, now, strict=False)) if was != name), None)
    if label is None:
        return f"{len(before):,} there, {len(now):,} now"
    return f"label {label} was {before[label]!r}, it is {now[label]!r} now"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # of a folder that is not installed
        return "unknown"
