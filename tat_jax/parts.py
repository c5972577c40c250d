"""What a training is made of, opened by its config: devices, networks and losses, images."""

import functools
from typing import NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import experiment, sharding
from tat_jax.build import Built, build
from tat_jax.data.held_out import SPLIT
from tat_jax.data.pipeline import Pipeline, check_same, open_pipeline
from tat_jax.data.source import all_labels, class_names
from tat_jax.losses import Own
from tat_jax.networks import Network, OwnNetwork


class Parts(NamedTuple):
    """The devices of a training, what is trained, and the images: to train on, to validate, any held out."""

    mesh: Mesh
    built: Built
    data: Pipeline
    eval_data: Pipeline
    held_out: Pipeline | None


def open_parts(
    config: ConfigDict,
    *,
    student: OwnNetwork | None = None,
    teacher: OwnNetwork | None = None,
    losses: Own | None = None,
) -> Parts:
    """Return the parts of the training of `config`; the arguments are those of `train.run`.

    Raises:
        FileNotFoundError: data or weights are missing.
        ValueError: the config is no training.
    """
    experiment.check(config)
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.batch_size, mesh)
    data, eval_data = open_pipeline(config, "train"), open_pipeline(config, "val")
    holds_out = config.data.get("held_out_of_training") is not None
    held_out = open_pipeline(config, SPLIT) if holds_out else None
    check_same(config, data, eval_data, *([held_out] if held_out else []))
    built = build_for(config, mesh, data, student=student, teacher=teacher, losses=losses)
    return Parts(mesh, built, data, eval_data, held_out)


def build_for(
    config: ConfigDict,
    mesh: Mesh,
    data: Pipeline,
    *,
    student: OwnNetwork | Network | None,
    teacher: OwnNetwork | Network | None,
    losses: Own | None,
) -> Built:
    """Build what `config` trains on these images, as `build` does.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: parts do not fit; both are named.
    """
    return build(
        config,
        mesh,
        num_classes=data.source.num_classes,
        steps_per_epoch=data.steps_per_epoch,
        classes=class_names(data.source),
        student=student,
        teacher=teacher,
        losses=losses,
        labels=functools.partial(all_labels, data.source),
    )
