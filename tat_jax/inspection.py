"""What a training is made of, looked at before it starts: config, folder, devices, networks, losses.

Each function returns what it finds in words, and what it built.
"""

import math
import os
import shutil
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import (
    bucket_lock,
    experiment,
    failures,
    mirror,
    pictures,
    probe,
    provenance,
    quantities,
    representations,
    run_folder,
    sharding,
)
from tat_jax.buckets import Bucket, Place
from tat_jax.build import Built, all_terms, build_student, build_teacher, put_teacher, shapes_of
from tat_jax.checkpoints import read_provenance
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.sample import Sample
from tat_jax.data.source import class_names
from tat_jax.evaluate import evaluate
from tat_jax.losses import Own
from tat_jax.networks import Network, OwnNetwork
from tat_jax.networks.view import watch
from tat_jax.parts import build_for
from tat_jax.tasks import TASKS, task_of
from tat_jax.usage import other_classes
from tat_jax.weights import folders
from tat_jax.weights.remote import at_hand, step_of, whole
from tat_jax.weights.store import network_weights

# Whoever has no data does not know how many classes a head has.
_UNKNOWN_HEAD = "not known without the data, of one class here"
_TAPS = ("student_tap", "teacher_tap")


def check_config(config: ConfigDict, losses: Own | None) -> tuple[str, ConfigDict]:
    """Check every field of a config, and the losses of one's own beside them.

    Raises:
        ValueError: some are not allowed.
    """
    experiment.check(config)
    all_terms(config, losses)
    notes = (f"NOTE: {line}" for line in experiment.notes(config))
    return "\n".join(["every field is known and allowed", *notes]), config


def describe_folder(config: ConfigDict, folder: Place) -> tuple[str, Place]:
    """Say what a training in the folder would continue, and what its config changes.

    Raises:
        ValueError: the folder is another training's.
        OSError: it cannot be written, or the bucket cannot be reached.
    """
    differences = [f"changed: {line}" for line in run_folder.changes(config, folder, experiment.FIELDS)]
    notes = []
    if isinstance(folder, Bucket):
        works_in = mirror.scratch(folder)
        there = whole(folder.objects())
        saved = sorted({step for name in there if (step := step_of(name)) is not None})
        if bucket_lock.NAME in there:
            owner = bucket_lock.said_by(folder.read(bucket_lock.NAME)).get("owner", "nobody known")
            notes = [f"NOTE: locked by {owner}; a run waits for up to a minute to see whether it is at work"]
    else:
        works_in, saved = folder, folders.steps(folder)
    existing = next(place for place in (works_in, *works_in.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise OSError(f"cannot write in {existing}; choose another --workdir")
    state = f"continues from step {saved[-1]}" if saved else "starts"
    free = quantities.size(shutil.disk_usage(existing).free)
    where = "" if works_in is folder else f" in {works_in}, where it works"
    return "\n".join([f"{folder}: {state}; {free} free{where}", *notes, *differences]), folder


def draw_crops(data: Pipeline, sample: Sample, folder: Place) -> tuple[str, None]:
    """Draw the first training crops with their labels into the run's folder, and say where.

    Args:
        data: the training images.
        sample: of them, which could be read.
        folder: the run's.

    Raises:
        DecodeError: one of them is no image, unless `data.skip_broken`.
    """
    if isinstance(folder, Bucket):
        return f"not drawn: {folder} is in a bucket", None
    path = folder / run_folder.CHECK
    try:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            pictures.draw_crops(data, path)
    except OSError as error:
        return f"not drawn: {failures.explain(error)}", None
    return f"the first training crops with their labels: {path}", None


def describe_devices(config: ConfigDict, mesh: Mesh) -> tuple[str, Mesh]:
    """Say which devices share a batch.

    Raises:
        ValueError: they cannot share it evenly.
    """
    sharding.check_batch_size(config.batch_size, mesh)
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} × {kind}{processes}, {config.batch_size // mesh.size} images a step on each", mesh


def inspect_student(
    config: ConfigDict, num_classes: int | None, own: OwnNetwork | None
) -> tuple[str, Network]:
    """Build the student, and say what it is.

    Raises:
        FileNotFoundError: its weights are missing.
        ValueError: they are another network's, or not finite.
    """
    network = build_student(config, 1 if num_classes is None else num_classes, own)
    head = _UNKNOWN_HEAD if num_classes is None else network.origin["head"]
    return describe_network(network, head=head), network


def inspect_teacher(
    config: ConfigDict, num_classes: int | None, own: OwnNetwork | None, losses: Own | None
) -> tuple[str, Network | None]:
    """Build the teacher likewise, where a term of the loss reads it."""
    network = build_teacher(config, 1 if num_classes is None else num_classes, own, all_terms(config, losses))
    if network is None:
        return "none: no loss term uses the teacher", None
    return describe_network(network, head=network.origin["head"]), network


def describe_network(network: Network, *, head: str) -> str:
    """Say what a network is.

    Raises:
        ValueError: some of its weights are not finite.
    """
    source = network.origin["source"]
    weights = network_weights(network.view.network)
    wrong = [name for name, value in weights.items() if not np.isfinite(np.asarray(value, np.float32)).all()]
    if wrong:
        raise ValueError(
            f"{source} holds weights that are not finite; convert or train it anew: {', '.join(wrong)}"
        )
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network.view, nnx.Param)))
    return f"{network.name} from {source}, head {head}, {parameters:,} parameters, all finite"


def title_of_measure(config: ConfigDict) -> str:
    """Return what the best measure of a config's task is called; its task may be one that there is not."""
    if config.get("task") not in TASKS:
        return "measure"
    task = task_of(config)
    return task.titles[task.best] if task.needs_head else "rank"


def measure_teacher(
    config: ConfigDict, teacher: Network | None, sample: Sample, mesh: Mesh
) -> tuple[str, None]:
    """Evaluate the teacher on the images of a sample, as `evaluate` does a run."""
    if teacher is None:
        return "left out: there is no teacher", None
    if not task_of(config).needs_head:
        return _measure_features(config, teacher, sample, mesh)
    if teacher.origin["head"] == "fresh":
        return "left out: its head is not trained", None
    if teacher.origin["head"] == "random":
        return "left out: its weights are random", None
    if wrong := other_classes(teacher, sample.num_classes, class_names(sample)):
        return f"left out: {wrong}", None
    if watch(teacher.view, (), config.data.image_size).logits is None:
        return "left out: it gives no logits", None
    task, data = task_of(config), _read_once(config, sample, mesh)
    graph, state = nnx.split(teacher.view)
    state = put_teacher(config, state, mesh)
    evaluation = evaluate(graph, state, task, data, mesh, show=False)
    # A teacher of few classes is right by chance often: some way from there to always.
    chance = task.chance(sample.num_classes)
    poor = evaluation.measures[task.best] < chance + (1 - chance) * task.poor
    note = (
        f"\nNOTE: a trained teacher has far more, chance is {chance:.2%}: are the classes of the data in the "
        "order of those it was trained on?"
    )
    return f"{evaluation}{note if poor else ''}", None


def _measure_features(config: ConfigDict, teacher: Network, sample: Sample, mesh: Mesh) -> tuple[str, None]:
    """Say how many directions the teacher's features of a sample have.

    Raises:
        ValueError: it has no such tap.
    """
    tap = config.probe.teacher_tap
    graph, state = nnx.split(teacher.view)
    state = put_teacher(config, state, mesh)
    (found, _), skipped = probe.extract((graph, state), tap, _read_once(config, sample, mesh), mesh)
    rank, channels = representations.effective_rank(found), found.shape[1]
    left_out = f" ({skipped} unreadable skipped)" if skipped else ""
    return f"{tap}: {channels:,} channels, effective rank {rank:.1f} on {len(found)} images{left_out}", None


def _read_once(config: ConfigDict, sample: Sample, mesh: Mesh) -> Pipeline:
    """Return the images of a sample as they are evaluated."""
    return Pipeline(
        sample,
        task_of(config),
        config.data,
        batch_size=sharding.round_up(min(config.batch_size, len(sample)), mesh),
        train=False,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
    )


def build_training(
    config: ConfigDict,
    data: Pipeline,
    student: Network,
    teacher: Network | None,
    losses: Own | None,
    mesh: Mesh,
    folder: Place | None,
) -> tuple[str, Built]:
    """Build what is trained, and say by which losses, and what is new of a run that continues.

    Raises:
        ValueError: parts do not fit, and both are named; or the run in the folder was made of others.
    """
    built = build_for(config, mesh, data, student=student, teacher=teacher, losses=losses)
    lines = [describe_training(config, built)]
    if folder:
        now = provenance.provenance_of(class_names(data.source), built.teacher_digest)
        changed = provenance.changes(_provenance_of(folder), now, folder)
        lines += [f"changed: {line}" for line in changed]
    return "\n".join(lines), built


def describe_training(config: ConfigDict, built: Built) -> str:
    """Say what is trained, and by which losses."""
    terms = " + ".join(map(str, built.terms))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(built.state.params))
    return f"{terms}; {config.optimizer.name} trains {parameters:,} parameters"


def _provenance_of(folder: Place) -> provenance.Provenance:
    try:
        with at_hand(folder, ("data",)) as here:
            return read_provenance(here)
    except FileNotFoundError:
        return {}


def describe_taps(
    config: ConfigDict, built: Built, student: Network, teacher: Network | None
) -> tuple[str, None]:
    """Say what is compared where, and how; of how, not the switches that are off."""
    terms = [term for term in built.terms if set(_TAPS) <= set(term.options)]
    if teacher is None or not terms:
        return "none: no term of the loss compares them", None
    shapes = shapes_of(config, terms, student, teacher)
    lines = []
    for term in terms:
        names = [term.options[tap] for tap in _TAPS]
        ours, theirs = (of.taps[name].shape[1:] for of, name in zip(shapes, names, strict=True))
        how = "".join(f", {name}={value}" for name, value in _options(term.options) if value is not False)
        lines.append(
            f"{term.name}: student {names[0]} {_by(ours)} → teacher {names[1]} {_by(theirs)}, "
            f"{math.prod(ours[:-1]):,} positions{how}"
        )
    return "\n".join(lines), None


def _options(options: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in options.items() if name not in _TAPS]


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
