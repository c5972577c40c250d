"""What features are worth: by the labelled images of `config.probe`, or without any by those held out."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from tat_jax import representations, sharding
from tat_jax.batch import Batch
from tat_jax.build import Built
from tat_jax.data.folders import open_folder
from tat_jax.data.pipeline import Pipeline, check_same, pipeline_of
from tat_jax.data.source import class_names
from tat_jax.data.sources import open_source
from tat_jax.distill import TrainState
from tat_jax.metrics import progress
from tat_jax.networks.view import Outputs
from tat_jax.representations import K, Labelled
from tat_jax.tasks.classification import Classification

Viewed = tuple[nnx.GraphDef, nnx.State]  # a network's View, its arrays whole on every device
_OF_SOURCE = ("source", "root", "tfds_name", "labels_per_class", "classes")
_SPLIT_BY_FOLDERS = ("imagefolder", "webdataset")  # which may lack val/


class Measured(NamedTuple):
    """What was measured on so many `images`; `skipped` ones could not be read."""

    measures: dict[str, float]
    images: int
    skipped: int


class Probe:
    """Labelled images by which features are measured, the student's and the teacher's, which stay.

    Neighbours and the linear probe are of `train`, and counted on `val`. Where there is no `val/`, each image
    of `train` is classified by its neighbours among all others, and the linear probe is fitted to four fifths
    of the images, and counted on every fifth.

    Args:
        config: has the `probe`, and how images are transformed.
        mesh: the devices.
        built: the training whose teacher is measured, too; None where there is none.

    Raises:
        FileNotFoundError: the images are not there.
        ValueError: they are too few, or `val` has other classes than `train`.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, built: Built | None = None):
        self._config, self._mesh = config.probe, mesh
        self._teacher = None
        if built is not None and built.recipe.teacher is not None and built.teacher is not None:
            self._teacher = built.recipe.teacher, built.teacher
        self._of_teacher: dict[str, float] | None = None
        self._splits = [_open(config, split, mesh) for split in _splits(config.probe)]
        train = self._splits[0].source
        if len(train) <= K:
            raise ValueError(
                f"probe: {config.probe.root} has {len(train)} images in train, and k-NN takes more than {K}"
            )
        for other in self._splits[1:]:
            if (
                class_names(other.source) != class_names(train)
                or other.source.num_classes != train.num_classes
            ):
                raise ValueError(f"probe: {config.probe.root} has other classes in val than in train")
        check_same(config, *self._splits)

    def close(self) -> None:
        """End the processes that read."""
        for split in self._splits:
            split.close()

    def measure(
        self, student: Viewed, trained: TrainState | None, *, show: bool, listen: Callable[[], None]
    ) -> Measured:
        """Return the k-NN and the linear probe of a student, and of the teacher."""
        measured = self._measure(student, self._config.student_tap, show=show, listen=listen)
        if self._teacher is not None and self._of_teacher is None:
            theirs = self._measure(self._teacher, self._config.teacher_tap, show=show, listen=listen)
            self._of_teacher = {f"teacher_{name}": value for name, value in theirs.measures.items()}
        return measured._replace(measures=measured.measures | (self._of_teacher or {}))

    def _measure(self, network: Viewed, tap: str, *, show: bool, listen: Callable[[], None]) -> Measured:
        found = [extract(network, tap, data, self._mesh, show=show, listen=listen) for data in self._splits]
        (train, _), classes = found[0], self._splits[0].source.num_classes
        counted = found[-1][0]
        fitted, probed = (train, counted) if found[1:] else representations.part(train)
        measures = {
            "knn": representations.knn_hits(train, counted if found[1:] else None, classes)
            / len(counted.labels),
            "probe": representations.probe_hits(fitted, probed, classes) / len(probed.labels),
        }
        return Measured(measures, len(counted.labels), sum(skipped for _, skipped in found))


class HeldOut:
    """The images held out, by which a student is measured where nobody labelled any.

    Args:
        config: says which tap of the student has the features.
        data: the images, without augmentation.
        mesh: the devices.
        built: the training; None measures features alone.
    """

    def __init__(self, config: ConfigDict, data: Pipeline, mesh: Mesh, built: Built | None = None):
        self._tap, self._data, self._mesh, self._built = config.probe.student_tap, data, mesh, built

    def close(self) -> None:
        """Do nothing: whoever opened the images ends what reads them."""

    def measure(
        self, student: Viewed, trained: TrainState | None, *, show: bool, listen: Callable[[], None]
    ) -> Measured:
        """Return the negative loss and each of its terms, and the effective rank of the features."""
        losses = {}
        if self._built is not None and trained is not None:
            losses = self._losses(self._built, student, trained, listen)
        found, skipped = extract(student, self._tap, self._data, self._mesh, show=show, listen=listen)
        rank = representations.effective_rank(found.features)
        return Measured(losses | {"effective_rank": rank}, len(found.features), skipped)

    def _losses(
        self, built: Built, student: Viewed, trained: TrainState, listen: Callable[[], None]
    ) -> dict[str, float]:
        """Return the losses of the whole split; of one that compares images, batch by batch."""
        totals, images = dict.fromkeys(built.recipe.weights, 0.0), 0
        for batch in sharding.put_batches(self._data.epoch(0), self._mesh):
            listen()
            values, count = jax.device_get(self._loss_step(*student, trained, built.teacher, batch))
            images += int(count)
            for name, value in values.items():
                totals[name] += float(value)
        means = {name: total / max(images, 1) for name, total in totals.items()}
        weights = built.recipe.weights
        loss = sum(float(w(trained.step) if callable(w) else w) * means[name] for name, w in weights.items())
        return {"minus_loss": -loss, **{f"loss_{name}": value for name, value in means.items()}}

    @functools.cached_property
    def _loss_step(self) -> Any:
        assert self._built is not None
        recipe, mesh = self._built.recipe, self._mesh

        def step(
            graph: nnx.GraphDef,
            state: nnx.State,
            trained: TrainState,
            teacher: nnx.State | None,
            batch: Batch,
        ) -> tuple[dict[str, Array], Array]:
            outputs = nnx.merge(graph, state)(batch.image)
            told = Outputs(None, {})
            if recipe.teacher is not None:
                told = nnx.merge(recipe.teacher, sharding.gathered(teacher, mesh))(batch.image)
            model = nnx.merge(recipe.distillation, trained.params, trained.variables)
            count = jnp.sum(batch.where)
            values = {name: model.losses[name](outputs, told, batch, train=False) for name in recipe.weights}
            return {
                name: jnp.sum(value, where=batch.where) if value.ndim else value * count
                for name, value in values.items()
            }, count

        return jax.jit(step, static_argnums=0, out_shardings=sharding.replicated(mesh))


def open_probe(config: ConfigDict, data: Pipeline, mesh: Mesh, built: Built | None) -> Probe | HeldOut:
    """Open the labelled images that a config names; where it names none, take the images held out."""
    if config.probe.source is None:
        return HeldOut(config, data, mesh, built)
    return Probe(config, mesh, built)


def extract(
    network: Viewed,
    tap: str,
    data: Pipeline,
    mesh: Mesh,
    *,
    show: bool = False,
    listen: Callable[[], None] = lambda: None,
) -> tuple[Labelled, int]:
    """Return the features of every image of a split, once and in order, and how many could not be read.

    Args:
        network: its view.
        tap: of it, a vector for each image, or maps or tokens, whose mean over positions it is.
        data: the split, without augmentation; images without labels count as of class 0.
        mesh: the devices.
        show: draw a progress bar.
        listen: is called before each batch, and may raise.

    Raises:
        FloatingPointError: features are not finite.
        RuntimeError: the images seen are not those of the split.
        ValueError: the network has no such tap, or no image could be read.
    """
    graph, state = network
    forward = _jit_features(mesh)
    features: list[np.ndarray] = []
    labels: list[np.ndarray] = []

    def add(found: Any) -> int:
        if found is None:
            return 0
        value, label, where = map(np.asarray, found)
        features.append(value[where])
        labels.append(label[where])
        return len(features[-1])

    pending = None
    with progress(len(data.source), description=f"features {tap}", leave=False, show=show) as bar:
        for batch in sharding.put_batches(data.epoch(0), mesh):
            listen()
            started = forward(graph, tap, state, batch)
            bar.update(add(pending))
            pending = started
        bar.update(add(pending))
    skipped = len(data.skipped)
    if jax.process_count() > 1:
        skipped = int(multihost_utils.process_allgather(skipped).sum())
    found = Labelled(np.concatenate(features), np.concatenate(labels))
    if len(found.labels) + skipped != len(data.source):
        raise RuntimeError(f"saw {len(found.labels)} and skipped {skipped} of {len(data.source)} images")
    if not len(found.labels):
        raise ValueError("no image could be read, of which to take features")
    if not np.isfinite(found.features).all():
        raise FloatingPointError(f"features of the tap {tap} are not finite")
    return found, skipped


@functools.cache
def _jit_features(mesh: Mesh) -> jax.stages.Wrapped:
    def features(graph: nnx.GraphDef, tap: str, state: nnx.State, batch: Batch) -> tuple[Array, Array, Any]:
        view = nnx.merge(graph, sharding.gathered(state, mesh))
        view.taps = tuple(dict.fromkeys((*view.taps, tap)))
        value = pooled(view(batch.image).taps[tap])
        label = jnp.zeros(len(value), jnp.int32) if batch.label is None else jnp.asarray(batch.label)
        return value, label, batch.where

    return jax.jit(features, static_argnums=(0, 1), out_shardings=sharding.replicated(mesh))


def pooled(tap: Float[Array, "batch ..."]) -> Float[Array, "batch channels"]:
    """Return the mean of a tap over its positions, in float32."""
    return reduce(tap.astype(jnp.float32), "b ... c -> b c", "mean")


def _splits(probe: ConfigDict) -> tuple[str, ...]:
    """Return the splits of the labelled images: of folders, `val` where there is one."""
    if probe.source in _SPLIT_BY_FOLDERS and "val" not in open_folder(probe.root, "").folders():
        return ("train",)
    return ("train", "val")


def _open(config: ConfigDict, split: str, mesh: Mesh) -> Pipeline:
    """Open a split of the labelled images, which are transformed as the training's are to be evaluated."""
    config = config.copy_and_resolve_references()
    with config.ignore_type():
        for name in _OF_SOURCE:
            config.data[name] = config.probe[name]
    try:
        source = open_source(config.data, split)
    except (OSError, ValueError) as error:
        raise type(error)(f"probe: {error}") from None
    batch_size = sharding.round_up(config.batch_size, mesh)
    return pipeline_of(config, source, Classification(), batch_size=batch_size, train=False)
