"""Several seeds of one training at once on one device: their steps are one program, mapped over the seeds."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import distill, sharding
from tat_jax.batch import Batch
from tat_jax.distill import Metrics, Recipe, TrainState
from tat_jax.metrics import Row
from tat_jax.parts import Parts, open_parts
from tat_jax.signals import Interrupted, StopSignals
from tat_jax.step import options_for
from tat_jax.train import Training

_Tree = TypeVar("_Tree")


def run(config: ConfigDict, folders: Mapping[int, Path]) -> dict[int, dict[str, Row]]:
    """Train a config's student from several seeds at once, each in its folder, as `train.run` would alone.

    Only the steps are taken together: `jax.vmap` of the training step over states and batches, under one
    teacher. Order, crops, rows, evaluations and checkpoints are each seed's own, so that it continues alone
    as well as with others. Seeds that are behind go first, to the end of an epoch, until all are there.

    Args:
        config: of the training, but for its `seed`.
        folders: by seed.

    Returns:
        What `train.run` returns, by seed.

    Raises:
        ValueError: the seeds do not go together, or as `train.run` raises. One that fails ends them all.
        Interrupted: a signal came, and every seed is saved.
    """
    check(config)
    configs = {seed: _with_seed(config, seed) for seed in folders}
    parts = _share_teacher({seed: open_parts(of_seed) for seed, of_seed in configs.items()})
    signals = StopSignals()
    with contextlib.ExitStack() as opened:
        trainings = {
            seed: opened.enter_context(Training(configs[seed], folder, parts[seed], signals))
            for seed, folder in folders.items()
        }
        _train(list(trainings.values()), _Steps(next(iter(parts.values()))))
        return {seed: training.finish() for seed, training in trainings.items()}


def check(config: ConfigDict) -> None:
    """Check that seeds of a training can be trained at once, here.

    Raises:
        ValueError: there are several devices, or images are mixed.
    """
    if jax.device_count() > 1:
        raise ValueError(
            f"seeds that are trained at once share one device, and there are {jax.device_count()}: set "
            "study.seeds_at_once to 1, or start a process for each device, with no other in sight"
        )
    for name in ("mixup", "cutmix"):
        if config[name]:
            raise ValueError(
                f"{name}={config[name]:g}: how images are mixed is drawn from one seed, within the step; set "
                f"study.seeds_at_once to 1, or {name} to 0"
            )


def _with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.seed = seed
    return config


def _share_teacher(parts: Mapping[int, Parts]) -> dict[int, Parts]:
    """Return parts of which all have the arrays of one teacher.

    Raises:
        ValueError: there are several.
    """
    (first, one), *_ = parts.items()
    shared = {}
    for seed, of_seed in parts.items():
        if of_seed.built.teacher_digest != one.built.teacher_digest:
            raise ValueError(
                f"seeds {first} and {seed} have other teachers, as one of random weights is another for each "
                "seed: name its weights, or set study.seeds_at_once to 1"
            )
        shared[seed] = of_seed._replace(built=of_seed.built._replace(teacher=one.built.teacher))
    return shared


def _train(trainings: Sequence[Training], steps: "_Steps") -> None:
    """Take all steps that are left, the seeds that are behind first."""
    try:
        while waiting := [training for training in trainings if not training.is_done()]:
            behind = min(training.step for training in waiting)
            group = [training for training in waiting if training.step == behind]
            steps.take_epoch([training for training in group if not training.is_evaluation_due()])
            for training in group:
                if training.is_evaluation_due():
                    training.log_and_save(training.evaluate())
    except Interrupted:  # one of them is saved
        for training in waiting:
            training.save()
        raise


class _Steps:
    """The steps of several trainings at once; those of one alone are its own."""

    def __init__(self, parts: Parts):
        self._teacher = parts.built.teacher
        self._step = jit_train_steps(parts.built.recipe, parts.mesh)
        whole = sharding.replicated(parts.mesh)
        self._stack = jax.jit(_stack, out_shardings=whole)
        self._at = jax.jit(_at, out_shardings=whole)

    def take_epoch(self, trainings: Sequence[Training]) -> None:
        """Take what is left of an epoch, in which all are at one step, and save where that is asked for."""
        if len(trainings) == 1:
            (alone,) = trainings
            for batch in alone.batches():
                alone.take_step(batch)
                alone.save_if_asked()
            return
        states = self._stack([training.state for training in trainings]) if trainings else None
        for batches in zip(*(training.batches() for training in trainings), strict=True):
            with jax.transfer_guard("disallow"):
                states, metrics = self._step(states, self._teacher, batches)
            for index, training in enumerate(trainings):
                # Taken out of the stack where it is asked for, which is seldom, and then once.
                read_state = functools.cache(functools.partial(self._at, states, index))
                training.count_step(read_state, metrics[index])
            for training in trainings:
                training.save_if_asked()


def jit_train_steps(recipe: Recipe, mesh: Mesh) -> jax.stages.Wrapped:
    """Return the step of several trainings of one recipe, compiled for a device.

    It takes their states, stacked along a leading axis and donated, the teacher, and a batch of each; it
    returns the states after it, stacked, and the measurements of each.
    """

    def train_steps(
        states: TrainState, teacher: nnx.State | None, batches: Sequence[Batch]
    ) -> tuple[TrainState, list[Metrics]]:
        step = jax.vmap(functools.partial(distill.train_step, recipe), in_axes=(0, None, 0))
        after, metrics = step(states, teacher, _stack(batches))
        return after, [_at(metrics, index) for index in range(len(batches))]

    whole = sharding.replicated(mesh)
    return jax.jit(
        train_steps,
        donate_argnums=0,
        out_shardings=(whole, whole),
        compiler_options=options_for(mesh),
    )


def _stack(trees: Sequence[_Tree]) -> _Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _at(tree: _Tree, index: Any) -> _Tree:
    return jax.tree.map(lambda leaf: leaf[index], tree)
