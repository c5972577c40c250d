"""What a config trains: the networks, what the losses hold, the optimiser, the first state."""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import distill, networks, optim, sharding
from tat_jax.distill import Distillation, Recipe, TrainState
from tat_jax.losses import Own, Term, own_terms, terms_of
from tat_jax.losses.loss import Loss
from tat_jax.mixing import Mixing
from tat_jax.networks import Network, OwnNetwork
from tat_jax.networks.precision import narrow
from tat_jax.networks.view import Outputs, OutputShapes, watch
from tat_jax.schedules import weight_at
from tat_jax.step import places_of
from tat_jax.tasks import task_of
from tat_jax.usage import other_classes
from tat_jax.weights.store import digest, flatten

_Arrays = TypeVar("_Arrays", nnx.State, nnx.State | None)
Labels = Callable[[], np.ndarray]  # of all images that are trained on


class Built(NamedTuple):
    """A training with its arrays, whole on every device, but for `Rows` and a teacher that is sharded.

    Attributes:
        recipe: the static parts of the step.
        state: the state before the first step.
        teacher: the arrays of the teacher's view; None where no term of the loss reads it.
        student: how the student is built.
        terms: what the loss is made of.
        teacher_digest: the SHA-256 of the teacher's arrays, wherever they lie.
    """

    recipe: Recipe
    state: TrainState
    teacher: nnx.State | None
    student: Network
    terms: list[Term]
    teacher_digest: str | None


def build(
    config: ConfigDict,
    mesh: Mesh,
    *,
    num_classes: int,
    steps_per_epoch: int,
    classes: Sequence[str] | None = None,
    student: OwnNetwork | Network | None = None,
    teacher: OwnNetwork | Network | None = None,
    losses: Own | None = None,
    labels: Labels | None = None,
) -> Built:
    """Build what `config` trains.

    Args:
        config: as the functions in `configs/` return it.
        mesh: the devices.
        num_classes: of the data; 0 where its images have no labels.
        steps_per_epoch: batches an epoch.
        classes: their names, by label; None where they have none.
        student: a network instead of the config's.
        teacher: likewise.
        losses: further terms, as in `train.run`.
        labels: gives those of all images that are trained on, if a term of the loss asks for them.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: parts do not fit; both are named.
    """
    _check_batches(config, steps_per_epoch)
    terms = all_terms(config, losses)
    _check_labels(terms, num_classes)
    mixing = _mixing(config, terms)
    learner = build_student(config, num_classes, student)
    master = build_teacher(config, num_classes, teacher, terms)
    _check_logits(terms, master, num_classes, classes)
    _prepare(terms, learner, master)
    distillation = Distillation(learner.view, _build_losses(config, terms, learner, master, labels))
    learning_rate = optim.learning_rate(config.optimizer, steps_per_epoch, config.epochs)
    optimizer = optim.optimizer(config.optimizer, learning_rate, nnx.state(distillation, nnx.Param))
    teacher_graph, teacher_state = nnx.split(master.view) if master else (None, None)
    recipe = Recipe(
        distillation=nnx.graphdef(distillation),
        teacher=teacher_graph,
        teacher_has_head=master is not None and _is_comparable(master, num_classes, classes),
        weights={term.name: weight_at(term.weight, steps_per_epoch) for term in terms},
        task=task_of(config),
        optimizer=optimizer,
        learning_rate=learning_rate,
        leave_out_not_finite=config.steps_left_out > 0,
        teacher_in_training=config.teacher_mode == "train",
        mixing=mixing,
        ema_decay=config.ema_decay,
    )
    state = distill.init_state(distillation, optimizer, with_ema=config.ema_decay is not None)
    return Built(
        recipe,
        sharding.put(state, places_of(state, mesh), what="the student's weights"),
        put_teacher(config, teacher_state, mesh),
        learner,
        terms,
        None if teacher_state is None else digest(flatten(teacher_state)),
    )


def all_terms(config: ConfigDict, own: Own | None = None) -> list[Term]:
    """Return the terms of a config's loss, and the user's own.

    Raises:
        ValueError: there is none, or one of the user's is not allowed.
    """
    terms = terms_of(config.losses) + own_terms(own or {})
    if not terms:
        raise ValueError(
            "every loss has weight 0: give one another, as --config.losses.cross_entropy.weight=1"
        )
    return terms


def build_student(config: ConfigDict, num_classes: int, own: OwnNetwork | Network | None = None) -> Network:
    """Build the student of a config, unless there is one of your `own`.

    Raises:
        FileNotFoundError: its weights are missing.
        ValueError: they are another network's.
    """
    if own is not None:
        return networks.own(_copied(own), num_classes=num_classes, seed=config.seed)
    return networks.build(
        config.student,
        num_classes=num_classes,
        dtype=config.dtype,
        bn_group=config.bn_group,
        seed=config.seed,
        fit_head=True,
    )


def build_teacher(
    config: ConfigDict,
    num_classes: int,
    own: OwnNetwork | Network | None = None,
    terms: Sequence[Term] = (),
) -> Network | None:
    """Build the teacher of a config likewise, with its own head; None where no term of the loss reads it.

    Its kernels are of `config.teacher_dtype`, and one that is to be sharded is in the machine's own memory.
    """
    if not read_teacher(terms):
        return None
    with sharding.on_host() if _is_sharded(config) else contextlib.nullcontext():
        if own is not None:
            network = networks.own(_copied(own), num_classes=num_classes, seed=config.seed)
        else:
            network = networks.build(
                config.teacher,
                num_classes=num_classes,
                dtype=config.dtype,
                bn_group=config.bn_group if config.teacher_mode == "train" else None,
                seed=config.seed,
                fit_head=False,
            )
        if config.teacher_dtype != "float32":  # in which, or in float64, they are
            narrow(network.view, config.teacher_dtype)
    return network


def put_teacher(config: ConfigDict, arrays: _Arrays, mesh: Mesh) -> _Arrays:
    """Return the arrays of a teacher where `config.teacher_sharding` has them."""
    return sharding.put(arrays, teacher_places(config, arrays, mesh), what="the teacher's weights")


def teacher_places(config: ConfigDict, arrays: Any, mesh: Mesh) -> Any:
    """Return where each array of the teacher lies by `config.teacher_sharding`."""
    if _is_sharded(config):
        return jax.tree.map(functools.partial(sharding.split, mesh=mesh), arrays)
    return sharding.everywhere(arrays, mesh)


def _is_sharded(config: ConfigDict) -> bool:
    return config.teacher_sharding == "sharded"


def read_teacher(terms: Iterable[Term]) -> bool:
    """Return whether a term of a loss reads the teacher."""
    return any(term.loss.needs_teacher for term in terms)


def _copied(module: Any) -> Any:
    """Return a copy of what a user brought along: the step takes the memory of the state that it is given."""
    if not isinstance(module, nnx.Module):
        return module
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def _check_labels(terms: Sequence[Term], num_classes: int) -> None:
    names = [term.name for term in terms if term.loss.needs_labels]
    if names and not num_classes:
        raise ValueError(
            f"{' and '.join(names)} {_reads(names)} labels, and the images have none: set the weight to 0, "
            f"as by --config.losses.{names[0]}.weight=0, and give one to a loss that compares taps"
        )


def _check_heads(terms: Sequence[Term], student: OutputShapes, teacher: OutputShapes) -> None:
    names = [term.name for term in terms if term.loss.needs_logits]
    of_teacher = [term.name for term in terms if term.loss.needs_logits and term.loss.needs_teacher]
    for which, outputs, found in (("student", student, names), ("teacher", teacher, of_teacher)):
        if found and outputs.logits is None:
            raise ValueError(
                f"{' and '.join(found)} {_reads(found)} logits, and the {which} gives none, as it has no "
                f"head: set the weight to 0, or take a {which} with a head"
            )


def _reads(names: Sequence[str]) -> str:
    return "read" if names[1:] else "reads"


def _check_logits(
    terms: Sequence[Term], teacher: Network | None, num_classes: int, classes: Sequence[str] | None
) -> None:
    if teacher is None:
        return
    source = teacher.origin["source"]
    for term in terms:
        if not (term.loss.needs_teacher and term.loss.needs_logits):
            continue
        way_out = f"{term.name} compares its logits: take another teacher, or set its weight to 0"
        if not teacher.has_trained_head:
            raise ValueError(f"the teacher from {source} has no trained head, and {way_out}")
        if wrong := other_classes(teacher, num_classes, classes):
            raise ValueError(f"the teacher from {source} is one of other classes: {wrong}; {way_out}")


def _is_comparable(teacher: Network, num_classes: int, classes: Sequence[str] | None) -> bool:
    return teacher.has_trained_head and not other_classes(teacher, num_classes, classes)


def _mixing(config: ConfigDict, terms: Sequence[Term]) -> Mixing | None:
    """Return how images are mixed; None where they are not.

    Raises:
        ValueError: a term of the loss reads one label for each image, or a batch has but one.
    """
    if not (config.mixup or config.cutmix):
        return None
    said = " and ".join(f"{name}={config[name]:g}" for name in ("mixup", "cutmix") if config[name])
    for term in terms:
        if term.loss.needs_labels and not term.loss.takes_mixed_labels:
            raise ValueError(
                f"{said}: {term.name} reads one label for each image, and mixed images have two; set both to "
                "0, or its weight"
            )
    if config.batch_size == 1:
        raise ValueError(f"{said}: a batch of one image has nothing to mix it with; take a larger batch_size")
    return Mixing(config.mixup, config.cutmix, config.seed)


def _check_batches(config: ConfigDict, steps_per_epoch: int) -> None:
    group = config.bn_group
    if group and config.batch_size > group and config.batch_size % group:
        raise ValueError(f"bn_group={group} does not divide batch_size={config.batch_size}")
    steps = config.epochs * steps_per_epoch
    if config.optimizer.accumulate > steps:
        raise ValueError(
            f"optimizer.accumulate={config.optimizer.accumulate} batches are more than the {steps:,} of the "
            "training, so that no update would ever be made: accumulate fewer, or train for more epochs"
        )


def _build_losses(
    config: ConfigDict,
    terms: Sequence[Term],
    student: Network,
    teacher: Network | None,
    labels: Labels | None,
) -> dict[str, Loss]:
    """Return the loss of every term, made for the shapes of what both networks give."""
    shapes = shapes_of(config, terms, student, teacher)
    _check_heads(terms, *shapes)
    built = {}
    for term in terms:
        if isinstance(term.loss, Loss):
            built[term.name] = _copied(term.loss)
            continue
        # By its name, so that another term more changes none of the others.
        key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(term.name.encode()))
        try:
            options = term.options | _labels_for(term, labels)
            built[term.name] = term.loss.build(
                *shapes,
                dtype=jnp.dtype(config.dtype),
                bn_group=config.bn_group,
                rngs=nnx.Rngs(key),
                **options,
            )
        except ValueError as error:
            raise ValueError(f"{term.name}: {error}") from None
    return built


def _prepare(terms: Sequence[Term], student: Network, teacher: Network | None) -> None:
    for term in terms:
        try:
            term.loss.prepare(student, teacher)
        except ValueError as error:
            raise ValueError(f"{term.name}: {error}") from None


def _labels_for(term: Term, labels: Labels | None) -> dict[str, Any]:
    if term.loss.needs_all_labels and labels is None:
        raise ValueError("it reads the class of every image, and `labels` were not given")
    return {"labels": labels()} if term.loss.needs_all_labels and labels else {}


def _taps_of(term: Term, which: str) -> tuple[str, ...]:
    """Return the taps of the student or the teacher that a term compares."""
    one = term.options.get(f"{which}_tap")
    return tuple(term.options.get(f"{which}_taps", (one,) if one else ()))


def shapes_of(
    config: ConfigDict, terms: Sequence[Term], student: Network, teacher: Network | None
) -> tuple[OutputShapes, OutputShapes]:
    """Return the shapes of what both networks give for an image, with the taps that the terms compare.

    Raises:
        ValueError: a network has no such tap.
    """
    found = []
    for which, network in (("student", student), ("teacher", teacher)):
        if network is None:
            found.append(Outputs(None, {}))
            continue
        taps = {tap: term.name for term in terms for tap in _taps_of(term, which)}
        try:
            shapes = watch(network.view, tuple(taps), config.data.image_size)
        except ValueError as error:
            of_terms = f" of {', '.join(taps.values())}" if taps else ""
            raise ValueError(f"the {which}{of_terms}: {error}") from None
        if shapes.logits is None and not shapes.taps:
            raise ValueError(
                f"the {which} {network.name} gives nothing to learn from: let it return logits, or name taps "
                "of it"
            )
        found.append(shapes)
    return found[0], found[1]
