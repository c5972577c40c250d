"""What a config trains: the networks, the embeddings that their taps need, the optimiser, the first state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import distill, networks, optim, sharding
from tat_jax.distill import Distillation, LossWeights, Task, TatWeight, TrainState
from tat_jax.networks import BuiltNetwork
from tat_jax.tat import TargetAwareTransformer


class Prepared(NamedTuple):
    """A task with its arrays, which lie whole on every device.

    Attributes:
        task: the static parts of the step.
        state: the state before the first step.
        teacher: the teacher's arrays; None where no term needs one.
        student: how the student is built.
    """

    task: Task
    state: TrainState
    teacher: nnx.State | None
    student: BuiltNetwork


def prepare(
    config: ConfigDict,
    mesh: Mesh,
    *,
    num_classes: int,
    steps_per_epoch: int,
    student: nnx.Module | BuiltNetwork | None = None,
    teacher: nnx.Module | BuiltNetwork | None = None,
) -> Prepared:
    """Build what `config` trains.

    Args:
        config: as the functions in `configs/` return it.
        mesh: the devices.
        num_classes: of the data.
        steps_per_epoch: batches an epoch.
        student: a network instead of the config's.
        teacher: likewise.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: parts do not fit; both are named.
    """
    group = config.bn_group
    if group and config.batch_size > group and config.batch_size % group:
        raise ValueError(f"bn_group={group} does not divide batch_size={config.batch_size}")
    weights = loss_weights(config)
    learner = build_student(config, num_classes, student)
    master = build_teacher(config, num_classes, teacher)
    if master:
        _check_logits(weights, master, num_classes)
    distillation = Distillation(
        learner.model, _embeddings(config, weights, learner.model, master.model) if master else {}
    )
    learning_rate = optim.learning_rate(config.optimizer, steps_per_epoch)
    optimizer = optim.optimizer(config.optimizer, learning_rate)
    teacher_graph, teacher_state = nnx.split(master.model) if master else (None, None)
    task = Task(
        distillation=nnx.graphdef(distillation),
        teacher=teacher_graph,
        teacher_has_head=master is not None and master.origin["head"] == "trained",
        weights=weights,
        optimizer=optimizer,
        learning_rate=learning_rate,
        leave_out_not_finite=config.steps_left_out > 0,
    )
    state = distill.init_state(distillation, optimizer)
    state, teacher_state = jax.device_put((state, teacher_state), sharding.replicated(mesh))
    return Prepared(task, state, teacher_state, learner)


def loss_weights(config: ConfigDict) -> LossWeights:
    """Return what the loss of a config is made of."""
    return LossWeights(
        alpha=config.loss.alpha,
        beta=config.loss.beta,
        temperature=config.loss.temperature,
        tat={tap: TatWeight(**tat.to_dict()) for tap, tat in config.tat.items()},
    )


def build_student(
    config: ConfigDict, num_classes: int, own: nnx.Module | BuiltNetwork | None = None
) -> BuiltNetwork:
    """Build the student of a config, unless there is one of your `own`.

    Raises:
        FileNotFoundError: its weights are missing.
        ValueError: they are another network's.
    """
    return _own(own) or networks.student(
        config.student,
        num_classes=num_classes,
        dtype=config.dtype,
        bn_group=config.bn_group,
        seed=config.seed,
    )


def build_teacher(
    config: ConfigDict, num_classes: int, own: nnx.Module | BuiltNetwork | None = None
) -> BuiltNetwork | None:
    """Build the teacher of a config likewise; None where no term of the loss needs one."""
    if not loss_weights(config).need_teacher():
        return None
    return _own(own) or networks.teacher(
        config.teacher, num_classes=num_classes, dtype=config.dtype, seed=config.seed
    )


def _own(model: nnx.Module | BuiltNetwork | None) -> BuiltNetwork | None:
    if model is None or isinstance(model, BuiltNetwork):
        return model
    return BuiltNetwork(model, arguments={}, origin={"head": "trained", "source": type(model).__name__})


def _check_logits(weights: LossWeights, teacher: BuiltNetwork, num_classes: int) -> None:
    if "kl" not in weights.of_logits():
        return
    source = teacher.origin["source"]
    way_out = "the KL term compares its logits: take another teacher, or set loss.beta=0"
    if teacher.origin["head"] != "trained":
        raise ValueError(f"the teacher from {source} has no trained head, and {way_out}")
    classes = teacher.arguments.get("num_classes", num_classes)
    if classes != num_classes:
        raise ValueError(
            f"the teacher from {source} knows {classes} classes, the data {num_classes}; {way_out}"
        )


def _embeddings(
    config: ConfigDict, weights: LossWeights, student: nnx.Module, teacher: nnx.Module
) -> dict[str, TargetAwareTransformer]:
    """Return the embeddings of every TaT term, made for the shapes of its taps."""
    size = config.data.image_size
    shapes = {"student": tap_shapes(student, size), "teacher": tap_shapes(teacher, size)}
    embeddings = {}
    for i, (tap, tat) in enumerate(weights.of_taps().items()):
        for network, taps in shapes.items():
            if tap not in taps:
                raise ValueError(f"tat.{tap}: the {network} has no such tap; it sows {', '.join(taps)}")
        *student_size, student_features = shapes["student"][tap]
        *teacher_size, teacher_features = shapes["teacher"][tap]
        if student_size != teacher_size:
            raise ValueError(
                f"tat.{tap}: the taps differ in height and width: the student's is {student_size}, "
                f"the teacher's {teacher_size}"
            )
        options = tat._asdict()
        del options["weight"]
        try:
            embeddings[tap] = TargetAwareTransformer(
                student_features,
                teacher_features,
                **options,
                dtype=jnp.dtype(config.dtype),
                bn_group=config.bn_group,
                rngs=nnx.Rngs(jax.random.fold_in(jax.random.key(config.seed), i)),
            )
        except ValueError as error:
            raise ValueError(f"tat.{tap}: {error}") from None
    return embeddings


def tap_shapes(model: nnx.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """Return [height, width, channels] of every tap of a model, without computing it."""
    graph, state = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)

    def taps(state: nnx.State, image: jax.Array) -> distill.Taps:
        return distill.forward(nnx.merge(graph, state), image)[1]

    return {name: tap.shape[1:] for name, tap in jax.eval_shape(taps, state, image).items()}
