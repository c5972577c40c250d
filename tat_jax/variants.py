"""What a study trains: its fields, and the configs of its teachers and of the variants of its students."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tat_jax import experiment
from tat_jax.fields import Field, Fields, Rule, is_number, one_of, renew, whole, wrong

TEACHER = "teacher"  # the field and the name of the only one
_EPOCHS = ("last", "best")


def _are_seeds(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and 0 < len(value) == len(set(value))
        and all(map(whole(0).holds, value))
    )


def _are_variants(value: Any, *taken: str) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(changes, Mapping) for changes in value.values())
        and not any("/" in name or name in (*taken, ".", "..") for name in value)
    )


def _names(value: Any) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


FIELDS: Fields = {
    "seeds": Field(
        (0,),
        Rule("one or more whole numbers from 0 on, each once", _are_seeds),
        "of each student",
        optional=True,
    ),
    "seeds_at_once": Field(
        1,
        whole(1),
        "of a student, trained in one program on one device, as fills an accelerator that one does not",
        optional=True,
    ),
    TEACHER: Field(
        {},
        Rule("what differs from the rest of the config", lambda value: isinstance(value, Mapping)),
        "trained first; a study without takes the config's teacher.weights",
        optional=True,
    ),
    "teachers": Field(
        {},
        Rule("by names without /, what differs from the rest of the config", _are_variants),
        "several, each trained once; a student's teacher.weights names the one that teaches it",
        optional=True,
    ),
    "students": Field(
        {},
        Rule(
            f"by names without / other than {TEACHER}, what differs from the rest of the config",
            lambda value: _are_variants(value, TEACHER),
        ),
        "the variants",
    ),
    "control": Field(
        str,
        Rule(
            "the name of a student, or several names",
            lambda value: (
                isinstance(value, str | tuple | list)
                and len(value) > 0
                and all(isinstance(name, str) for name in value)
            ),
        ),
        "with which those of its architecture are compared; where none is named, the first of them",
        optional=True,
    ),
    "published": {
        "*": {
            "value": Field(float, Rule("a number", is_number), "as published of a student, by its name"),
            "epoch": Field("last", one_of(*_EPOCHS), "of which that is"),
        }
    },
}


def _optional(fields: Fields) -> Fields:
    return {
        name: field._replace(optional=True) if isinstance(field, Field) else _optional(field)
        for name, field in fields.items()
    }


# What the command line may say, of variants that no file lists, too.
OVERRIDES: Fields = {
    **experiment.FIELDS,
    "study": {
        **_optional(FIELDS),
        TEACHER: _optional(experiment.FIELDS),
        "teachers": {"*": _optional(experiment.FIELDS)},
        "students": {"*": _optional(experiment.FIELDS)},
    },
}


def check(config: ConfigDict) -> None:
    """Check the fields of a config's study.

    Raises:
        ValueError: some are missing, unknown or not allowed.
    """
    study = config.study
    if lines := list(wrong(FIELDS, study.to_dict(), "study.")):
        raise ValueError("in the config, " + "\n  ".join(lines))
    if TEACHER in study and "teachers" in study:
        raise ValueError("study.teacher is the only one: put it among study.teachers, by a name")
    teachers = names_of_teachers(config)
    for name, changes in study.students.items():
        if name in teachers:
            raise ValueError(f"study, {name}: a teacher has that name, too, and both would share a folder")
        if "seed" in changes:
            raise ValueError(f"study, {name}: its seed does nothing, study.seeds are those of every student")
        weights = _weights_of_teacher(changes)
        if teachers and weights not in (None, *teachers):
            raise ValueError(
                f"study, {name}: teacher.weights={weights!r} is none of the teachers that the study trains, "
                f"{', '.join(teachers)}"
            )
    about = {"control": _names(study.get("control", ())), "published": study.get("published", ())}
    for field, names in about.items():
        if strangers := [name for name in names if name not in study.students]:
            raise ValueError(f"study.{field}: {strangers[0]!r} is none of study.students")


def names_of_teachers(config: ConfigDict) -> list[str]:
    """Return the names of the teachers that a study trains."""
    return [TEACHER] if TEACHER in config.study else list(config.study.get("teachers", ()))


def teachers_of(config: ConfigDict) -> dict[str, ConfigDict]:
    """Return the configs of the teachers that a study trains, by name."""
    said = {TEACHER: config.study.teacher} if TEACHER in config.study else config.study.get("teachers", {})
    teachers = {}
    for name, changes in said.items():
        with named(name):
            teachers[name] = _variant(config, changes)
    return teachers


def students_of(config: ConfigDict, folder: Path) -> dict[str, list[ConfigDict]]:
    """Return the configs of each variant of a study's students, one for each seed."""
    teachers = names_of_teachers(config)
    students: dict[str, list[ConfigDict]] = {}
    for name, changes in config.study.students.items():
        students[name] = []
        for seed in config.study.get("seeds", FIELDS["seeds"].default):
            with named(name):
                student = _variant(config, changes)
            student.seed = seed
            if len(teachers) == 1:
                student.teacher.weights = teachers[0]
            if student.teacher.weights in teachers:
                student.teacher.weights = str(folder / student.teacher.weights)
            students[name].append(student)
    return students


def config_of_training(config: ConfigDict) -> ConfigDict:
    """Return a study's config without what it says of its trainings."""
    return _variant(config, ConfigDict())


def controls(config: ConfigDict, students: Mapping[str, Sequence[ConfigDict]]) -> dict[str, str]:
    """Return by variant the control that it is compared with, a student of the same architecture."""
    architectures = {name: of_seeds[0].student.architecture for name, of_seeds in students.items()}
    chosen: dict[str, str] = {}
    for name in (*_names(config.study.get("control", ())), *students):
        chosen.setdefault(architectures[name], name)
    return {name: chosen[architecture] for name, architecture in architectures.items()}


@contextmanager
def named(training: str | Path) -> Iterator[None]:
    """Add to an error of one of the trainings which one it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"study, {training}: {error}") from error


def _weights_of_teacher(changes: ConfigDict) -> str | None:
    of_teacher = changes.get("teacher")
    return of_teacher.get("weights") if isinstance(of_teacher, ConfigDict) else None


def _variant(config: ConfigDict, changes: ConfigDict) -> ConfigDict:
    """Return the config of a training, of which the study says what `changes`."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked(), changed.ignore_type():  # `experiment.check` says what is wrong, and where
        del changed.study
        try:
            changed.update(changes.to_dict())
            renew(experiment.FIELDS, changed)
        except AttributeError as error:  # of what is no mapping
            raise ValueError(f"of {changes.to_dict()}, a value stands where a config has fields") from error
    return changed
