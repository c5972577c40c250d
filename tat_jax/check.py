"""All that a training needs, tried before it starts: a line for each item, and nothing is written."""

import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import checkpoint, fields, sharding
from tat_jax.data.pipeline import Pipeline, open_pipeline
from tat_jax.data.sources import Example, Source
from tat_jax.distill import Batch, TrainState
from tat_jax.evaluate import evaluate
from tat_jax.networks import RANDOM, BuiltNetwork
from tat_jax.study import variant
from tat_jax.task import Prepared, build_student, build_teacher, prepare, tap_shapes
from tat_jax.train import changes, jit_train_step

_IMAGES = 64  # of each split that are read, and that the teacher classifies
_SECONDS = 1.0  # that reading is timed for, at least
_STEPS = 3  # that are timed after the first: as many in each process, for they wait for each other
_COLUMN = 18  # where findings begin


class _Failed(NamedTuple):
    """Stands in for what an item would have found."""

    item: str


class _Batches(NamedTuple):
    """The first batch of a training, and the images/s of all processes."""

    first: Batch
    rate: float


class _Step(NamedTuple):
    """The compiled step of a training, and what it takes besides the state."""

    program: Any
    others: tuple[nnx.State | None, Batch]


def run(
    config: ConfigDict,
    folder: str | Path,
    *,
    student: nnx.Module | None = None,
    teacher: nnx.Module | None = None,
) -> bool:
    """Check all that training `config` in `folder` needs, first steps included; of a study, every training.

    Prints a line for each item as it goes. One that fails leaves out only those that need it, so that one
    call finds all that is wrong. The teacher of a study is yet to be trained, and random here.

    Args:
        config: as the functions in `configs/` return it.
        folder: of the run; of a study not looked at.
        student: a network of your own instead of the config's, as in `train.run`.
        teacher: likewise.

    Returns:
        Whether all items hold.
    """
    if "study" not in config:
        return _check(config, Path(folder), student, teacher)
    hold = []
    for name, different in {"teacher": config.study.teacher, **config.study.students}.items():
        training = variant(config, different.to_dict())
        training.teacher.weights = RANDOM
        if jax.process_index() == 0:
            print(f"study, {name}:", flush=True)
        hold.append(_check(training, None, student, teacher))
    return all(hold)


def _check(
    config: ConfigDict, folder: Path | None, student: nnx.Module | None, teacher: nnx.Module | None
) -> bool:
    mesh = sharding.make_mesh()
    items = _Items()
    checked = items.check("config", _fields, config)
    if folder:
        items.check("folder", _folder, checked, folder)
    devices = items.check("devices", _devices, config, mesh)
    train_data = items.check("training data", _data, config, "train")
    items.check("training sample", _sample, config, train_data, "train")
    eval_data = items.check("validation data", _data, config, "val")
    eval_sample = items.check("validation sample", _sample, config, eval_data, "val")
    # Weights can be read without the data; only the head depends on its classes.
    classes = None if isinstance(train_data, _Failed) else train_data.source.num_classes
    learner = items.check("student", _student, config, classes, student)
    master = items.check("teacher", _teacher, config, classes, teacher)
    items.check("teacher's top-1", _accuracy, config, master, eval_sample, mesh)
    prepared = items.check("task", _task, checked, train_data, learner, master, mesh)
    items.check("taps", _taps, config, prepared, learner, master)
    batches = items.check("reading", _read, config, train_data, devices)
    step = items.check("memory", _compile, prepared, batches, mesh)
    first = items.check("loss at step 0", _first_step, prepared, step)
    items.check("time", _time, config, train_data, batches, step, first)
    return items.hold()


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


class _Sample:
    """Images of a source, evenly spaced over it."""

    def __init__(self, source: Source):
        self.num_classes = source.num_classes
        self._source = source
        self._indices = np.unique(np.linspace(0, len(source) - 1, _IMAGES).astype(int)).tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._indices[index]]


def _fields(config: ConfigDict) -> tuple[str, ConfigDict]:
    fields.check(config)
    return "every field is known and allowed", config


def _folder(config: ConfigDict, folder: Path) -> tuple[str, None]:
    """Say what a training in the folder would continue, and what its config changes."""
    differences = [f"changed: {line}" for line in changes(config, folder)]
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise OSError(f"cannot write in {existing}; choose another --workdir")
    saved = checkpoint.steps(folder)
    state = f"continues from step {saved[-1]}" if saved else "starts"
    return "\n".join(
        [f"{folder}: {state}; {_size(shutil.disk_usage(existing).free)} free", *differences]
    ), None


def _devices(config: ConfigDict, mesh: Mesh) -> tuple[str, Mesh]:
    sharding.check_batch_size(config.batch_size, mesh)
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} × {kind}{processes}, {config.batch_size // mesh.size} images a step on each", mesh


def _data(config: ConfigDict, split: str) -> tuple[str, Pipeline]:
    data = open_pipeline(config, split)
    steps = f", {data.steps_per_epoch:,} steps an epoch" if split == "train" else ""
    return f"{len(data.source):,} images, {data.source.num_classes:,} classes{steps}", data


def _sample(config: ConfigDict, data: Pipeline, split: str) -> tuple[str, _Sample]:
    """Read images one by one, so that each one that cannot be read is named."""
    sample = _Sample(data.source)
    reader = Pipeline(sample, config.data, batch_size=1, train=split == "train", seed=config.seed, threads=0)
    wrong = []
    since = time.monotonic()
    for i in range(len(sample)):
        try:
            next(reader.epoch(0, start_step=i))
        except (ValueError, OSError) as error:
            wrong.append(str(error))
    rate = len(sample) / (time.monotonic() - since)
    if wrong:
        way_out = "replace them; --config.data.skip_broken=True goes on without files that are no images"
        raise ValueError(
            "\n".join([f"{len(wrong)} of {len(sample)} images cannot be read; {way_out}", *wrong])
        )
    skipped = "".join(f"\nskipped, for it is no image: {name}" for name in reader.skipped.values())
    found = f"{len(sample)} images over the whole split, {rate:,.0f} images/s in one thread{skipped}"
    return found, sample


def _student(config: ConfigDict, classes: int | None, own: nnx.Module | None) -> tuple[str, BuiltNetwork]:
    network = build_student(config, classes or 1, own)
    head = network.origin["head"] if classes else "not known without the data, of one class here"
    return _describe(network, head=head), network


def _teacher(
    config: ConfigDict, classes: int | None, own: nnx.Module | None
) -> tuple[str, BuiltNetwork | None]:
    network = build_teacher(config, classes or 1, own)
    if network is None:
        return "none, for no term of the loss needs one", None
    head = "random" if _is_random(config, network) else network.origin["head"]
    return _describe(network, head=head), network


def _is_random(config: ConfigDict, teacher: BuiltNetwork) -> bool:
    """Return whether nobody has trained the config's teacher; a network of one's own has no arguments."""
    return bool(teacher.arguments) and config.teacher.weights == RANDOM


def _describe(network: BuiltNetwork, head: str) -> str:
    """Say what a network is.

    Raises:
        ValueError: some of its weights are no numbers.
    """
    source = network.origin["source"]
    weights = checkpoint.network_weights(network.model)
    wrong = [name for name, value in weights.items() if not np.isfinite(np.asarray(value, np.float32)).all()]
    if wrong:
        raise ValueError(
            f"{source} holds weights that are not finite; convert or train it anew: {', '.join(wrong)}"
        )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network.model, nnx.Param)))
    name = network.arguments.get("architecture", type(network.model).__name__)
    return f"{name} from {source}, head {head}, {parameters:,} parameters, all finite"


def _accuracy(
    config: ConfigDict, teacher: BuiltNetwork | None, sample: _Sample, mesh: Mesh
) -> tuple[str, None]:
    """Evaluate the teacher on the images of the sample, as `evaluate` does a run."""
    if teacher is None:
        return "left out: there is no teacher", None
    classes = teacher.arguments.get("num_classes", sample.num_classes)
    if teacher.origin["head"] != "trained":
        return "left out: its head is not trained", None
    if _is_random(config, teacher):
        return "left out: its weights are random", None
    if classes != sample.num_classes:
        return f"left out: it knows {classes:,} classes, the data {sample.num_classes:,}", None
    data = Pipeline(
        sample,
        config.data,
        batch_size=sharding.round_up(min(config.batch_size, len(sample)), mesh),
        train=False,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
    )
    graph, weights = nnx.split(teacher.model)
    accuracy = evaluate(graph, jax.device_put(weights, sharding.replicated(mesh)), data, mesh, show=False)
    # A teacher of few classes is right by chance often: a fifth of the way from there to always.
    chance = 1 / classes
    poor = accuracy.top1 < chance + (1 - chance) / 5
    note = (
        f"\nNOTE: a trained teacher has far more, chance is {chance:.2%}: are the classes of the data in the "
        "order of those it was trained on?"
    )
    return f"{accuracy}{note if poor else ''}", None


def _task(
    config: ConfigDict, data: Pipeline, student: BuiltNetwork, teacher: BuiltNetwork | None, mesh: Mesh
) -> tuple[str, Prepared]:
    prepared = prepare(
        config,
        mesh,
        num_classes=data.source.num_classes,
        steps_per_epoch=data.steps_per_epoch,
        student=student,
        teacher=teacher,
    )
    terms = " + ".join(f"{weight:g}·{name}" for name, weight in _terms(prepared).items())
    parameters = sum(leaf.size for leaf in jax.tree.leaves(prepared.state.params))
    return f"{terms}; {config.optimizer.name} trains {parameters:,} parameters", prepared


def _terms(prepared: Prepared) -> dict[str, float]:
    """Return the weight of each term of the loss, by the name of its measurement."""
    weights = prepared.task.weights
    return weights.of_logits() | {f"tat_{tap}": tat.weight for tap, tat in weights.of_taps().items()}


def _taps(
    config: ConfigDict, prepared: Prepared, student: BuiltNetwork, teacher: BuiltNetwork | None
) -> tuple[str, None]:
    if teacher is None or not prepared.task.weights.of_taps():
        return "none: no term of the loss compares them", None
    ours, theirs = (tap_shapes(network.model, config.data.image_size) for network in (student, teacher))
    return "\n".join(
        f"{tap}: student {'×'.join(map(str, ours[tap]))} → teacher {'×'.join(map(str, theirs[tap]))}, "
        f"{math.prod(ours[tap][:2]):,} positions, {tat.heads} head{'s' if tat.heads > 1 else ''}"
        for tap, tat in prepared.task.weights.of_taps().items()
    ), None


def _read(config: ConfigDict, data: Pipeline, mesh: Mesh) -> tuple[str, _Batches]:
    """Read the first batches of the training as it will, with nothing else to do."""
    first, images = None, 0
    since = time.monotonic()
    for batch in data.epoch(0):
        first = first or batch
        images += int(batch["where"].sum())
        seconds = time.monotonic() - since
        if seconds > _SECONDS:
            break
    (on_devices,) = sharding.put_batches([first], mesh)
    rate = images / seconds * jax.process_count()
    return f"{rate:,.0f} images/s with data.threads={config.data.threads}", _Batches(
        Batch(**on_devices), rate
    )


def _compile(prepared: Prepared, batches: _Batches, mesh: Mesh) -> tuple[str, _Step]:
    """Compile the step, and compare what it needs with what a device has.

    Raises:
        MemoryError: that is less.
    """
    since = time.monotonic()
    others = prepared.teacher, batches.first
    program: Any = jit_train_step(prepared.task, mesh).lower(prepared.state, *others).compile()
    seconds = time.monotonic() - since
    sizes = program.memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    has = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    finding = (
        f"{_size(needed)} on each device: {_size(sizes.argument_size_in_bytes)} of arguments, "
        f"{_size(sizes.temp_size_in_bytes)} of temporaries"
    )
    if has is not None:
        finding += f"; it has {_size(has)}"
        if needed > has:
            raise MemoryError(f"{finding}: lower batch_size, set dtype=bfloat16 or take more devices")
    return f"{finding}; compiled in {_duration(seconds)}", _Step(program, others)


def _first_step(prepared: Prepared, step: _Step) -> tuple[str, TrainState]:
    """Take the first step of the training.

    Raises:
        FloatingPointError: a term of its loss or its gradient is not finite.
    """
    state, measured = step.program(prepared.state, *step.others)
    metrics = {name: float(value) for name, value in measured.items()}
    loss, norm = metrics["loss"], metrics["gradient_norm"]
    lines = [f"{loss:.4g}, gradient norm {norm:.4g}"]
    for name, weight in _terms(prepared).items():
        value = metrics[name]
        lines.append(f"{weight:g}·{name} = {weight:g} · {value:.4g}, {weight * value / loss:.1%} of the loss")
    finding = "\n".join(lines)
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f"not finite: {', '.join(wrong)}; look at the networks and the first images, "
            f"or compute in float32\n{finding}"
        )
    return finding, state


def _time(
    config: ConfigDict, data: Pipeline, batches: _Batches, step: _Step, state: TrainState
) -> tuple[str, None]:
    """Take further steps on the same batch, and reckon from them how long the training takes."""
    since = time.monotonic()
    for _ in range(_STEPS):
        state, metrics = step.program(state, *step.others)
    jax.block_until_ready((state, metrics))
    seconds, reading = (time.monotonic() - since) / _STEPS, config.batch_size / batches.rate
    total = config.epochs * data.steps_per_epoch
    pace = "reading keeps up" if reading <= seconds else "reading is slower and sets the pace"
    return (
        f"{1000 * seconds:,.0f} ms a step, {config.batch_size / seconds:,.0f} images/s, {pace}: "
        f"{total:,} steps in about {_duration(total * max(seconds, reading))}, without evaluations"
    ), None


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours} h" if hours < 48 else f"{hours // 24} days {hours % 24} h"
