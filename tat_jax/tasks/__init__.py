"""Tasks: what a label is and what is measured. A module here with a `Task` is all that a new one takes."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from ml_collections import ConfigDict

from tat_jax.fields import Field, one_of
from tat_jax.tasks.task import Task


def _tasks() -> Iterator[tuple[str, type[Task]]]:
    for found in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(found.name)
        for name, value in inspect.getmembers(module, inspect.isclass):
            if not issubclass(value, Task) or value is Task or value.__module__ != module.__name__:
                continue
            if name[0] != "_":
                yield name.lower(), value


# By the names that a config gives them: those of their classes, in small letters.
TASKS: dict[str, type[Task]] = dict(_tasks())


def task_of(config: ConfigDict) -> Task:
    """Return the task that a config names."""
    return TASKS[config.task].of(config)


FIELD = Field("classification", one_of(*TASKS), "what a label is, and what is measured")
