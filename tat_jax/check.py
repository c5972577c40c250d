"""All that a training needs, tried before it starts: a line for each item, and nothing is written."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from tat_jax import inspection, networks, sharding, study, trial
from tat_jax.buckets import Place, place
from tat_jax.data import sample
from tat_jax.losses import Own
from tat_jax.networks import OwnNetwork
from tat_jax.quantities import duration
from tat_jax.weights import folders

_COLUMN = 18  # where findings begin
_BEAT = 10.0  # seconds from one sign of life to the next


class _Failed(NamedTuple):
    """Stands in for what an item would have found."""

    item: str


def run(
    config: ConfigDict,
    folder: str | Place,
    *,
    student: OwnNetwork | None = None,
    teacher: OwnNetwork | None = None,
    losses: Own | None = None,
) -> bool:
    """Check all that training `config` in `folder` needs, first steps included; of a study, every training.

    Prints a line for each item as it goes. One that fails leaves out only those that need it, so that one
    call finds all that is wrong. The teacher of a study is random here until it is trained.

    Args:
        config: as the functions in `configs/` return it.
        folder: of the run, on this machine or in a bucket; of a study only its teacher's is looked at.
        student: a network of your own instead of the config's, as in `train.run`.
        teacher: likewise.
        losses: further terms of the loss, as in `train.run`.

    Returns:
        Whether all items hold.
    """
    if "study" not in config:
        return _check(config, place(folder), student, teacher, losses)
    study.check(config)
    here = study.folder_of(folder)
    trainings = {name: of_seeds[0] for name, of_seeds in study.students_of(config, here).items()}
    if of_teacher := study.teacher_of(config):
        trainings = {"teacher": of_teacher, **trainings}
        if not folders.steps(here / "teacher"):  # it is yet to be trained
            for training in trainings.values():
                training.teacher.weights = networks.RANDOM
    hold = []
    for name, training in trainings.items():
        if jax.process_index() == 0:
            print(f"study, {name}:", flush=True)
        hold.append(_check(training, None, student, teacher, losses))
    return all(hold)


def _check(
    config: ConfigDict,
    folder: Place | None,
    student: OwnNetwork | None,
    teacher: OwnNetwork | None,
    losses: Own | None,
) -> bool:
    mesh = sharding.make_mesh()
    items = _Items()
    checked = items.check("config", inspection.check_config, config, losses)
    if folder:
        items.check("folder", inspection.describe_folder, checked, folder)
    devices = items.check("devices", inspection.describe_devices, config, mesh)
    train_data = items.check("training data", sample.open_data, config, "train")
    items.check("training sample", sample.read_sample, config, train_data, "train")
    eval_data = items.check("validation data", sample.open_data, config, "val")
    eval_sample = items.check("validation sample", sample.read_sample, config, eval_data, "val")
    # Weights can be read without the data; only the head depends on its classes.
    classes = None if isinstance(train_data, _Failed) else train_data.source.num_classes
    learner = items.check("student", inspection.inspect_student, config, classes, student)
    master = items.check("teacher", inspection.inspect_teacher, config, classes, teacher, losses)
    measure = f"teacher's {inspection.title_of_measure(config)}"
    items.check(measure, inspection.measure_teacher, config, master, eval_sample, mesh)
    built = items.check(
        "task", inspection.build_training, checked, train_data, learner, master, losses, mesh, folder
    )
    items.check("taps", inspection.describe_taps, config, built, learner, master)
    reading = items.check("reading", trial.time_reading, config, train_data)
    few = items.check("first look", trial.look, config, built, reading, devices)
    step = items.check("memory", trial.compile_step, built, reading, devices)
    first = items.check("loss at step 0", trial.take_first_step, config, built, step, few)
    items.check("time", trial.time_steps, config, train_data, reading, step, first)
    return items.hold()


@contextlib.contextmanager
def _heartbeat(name: str) -> Iterator[None]:
    """Say on stderr which item is at work, and for how long already, wherever one takes long."""
    ended, since = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(_BEAT):
            print(f"{name} … {duration(time.monotonic() - since)}", file=sys.stderr, flush=True)

    if jax.process_index() > 0:
        yield
        return
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Items:
    """Check one item after the other in all processes alike; of the others only failures are printed."""

    def __init__(self) -> None:
        self._failed: list[str] = []

    def check(self, name: str, find: Callable[..., tuple[str, Any]], *arguments: Any) -> Any:
        """Print the finding of `find(*arguments)` and return what else it returns.

        Where it fails, or one of the arguments is of an item that has, return a `_Failed`.
        """
        missing = [argument.item for argument in arguments if isinstance(argument, _Failed)]
        if missing:
            self._print(name, f"left out: needs {', '.join(missing)}")
            return _Failed(name)
        try:
            with _heartbeat(name):
                finding, found = find(*arguments)
        except Exception as error:  # Whatever it is, it would have stopped the training.
            logging.debug("in full:", exc_info=error)
            # Of these the message says all; it may be little of others.
            known = isinstance(error, ValueError | OSError | FloatingPointError | MemoryError)
            kind = "" if known else f"{type(error).__name__}: "
            finding, found = f"FAILED {kind}{error}", _Failed(name)
            if jax.process_index() > 0:
                print(f"process {jax.process_index()}: {name} {finding}", flush=True)
        failed = isinstance(found, _Failed)
        # A process that left an item out alone would keep the others waiting.
        if jax.process_count() > 1:
            somewhere = multihost_utils.process_allgather(np.array(failed)).any()
            if somewhere and not failed:
                finding, found, failed = "FAILED in another process", _Failed(name), True
        self._print(name, finding)
        if failed:
            self._failed.append(name)
        return found

    def hold(self) -> bool:
        """Print how it ended, and return whether nothing failed."""
        wrong = f"{len(self._failed)} FAILED: {', '.join(self._failed)}"
        self._print("check", wrong if self._failed else "all hold")
        return not self._failed

    def _print(self, name: str, finding: str) -> None:
        if jax.process_index() == 0:
            print(name.ljust(_COLUMN) + finding.replace("\n", "\n" + " " * _COLUMN), flush=True)
