"""This package's own training step, started from weights that carry PyTorch's names."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh

from tat_jax import distill, networks, sharding
from tat_jax.batch import Batch
from tat_jax.build import Built
from tat_jax.distill import Distillation, TrainState
from tat_jax.networks.view import View
from tat_jax.step import jit_train_step
from tat_jax.weights import store
from tat_jax.weights.names import convert_entries, to_ours, to_torch, torch_name

# Our attributes of an embedding, and the published ones.
_EMBEDDING = {"conv": "conv2d", "norm": "l2norm"}
_OF_LOGITS = ("cross_entropy", "kd")


def network(
    entries: Mapping[str, np.ndarray],
    architecture: str,
    *,
    dtype: str,
    bn_group: int | None = None,
    seed: int = 0,
    **options: Any,
) -> View:
    """Return the network that the converter makes of entries under PyTorch's names, with `options`."""
    converted = convert_entries(entries, architecture, source="entries")
    arguments = converted.arguments | options
    model = networks.construct(arguments, dtype=dtype, bn_group=bn_group, rngs=nnx.Rngs(seed))
    store.set_weights(model, converted.weights, source="entries")
    return View(model)


def entries_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the tensors of a module of PyTorch by name."""
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def with_embeddings(
    built: Built, entry: Callable[[str, str, tuple[int, ...]], np.ndarray], term: str = "tat_layer4"
) -> Built:
    """Set the embeddings of a term to `entry(module, key, shape)`, under the published names."""
    model = trained(built, built.state)
    for name, embedding in _embeddings(model, term).items():
        weights = {}
        for path, leaf in store.network_weights(embedding).items():
            shape = to_torch(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
            weights[path] = to_ours(path, entry(name, _published_name(path), shape))
        store.set_weights(embedding, weights, source=name)
    state = distill.init_state(model, built.recipe.optimizer)
    return built._replace(state=jax.device_put(state, built.state.step.sharding))


def steps(
    built: Built, batches: Iterable[Batch], mesh: Mesh, *, states: Iterable[TrainState] | None = None
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """Take a step on each batch; yield the state after it, and what it measured.

    Args:
        built: where to start.
        batches: one a step.
        mesh: the devices.
        states: those to take the steps from, instead of the one that the step before led to.
    """
    step = jit_train_step(built.recipe, mesh)
    given = iter(states) if states is not None else None
    state = built.state
    for batch in sharding.put_batches(batches, mesh):
        if given is not None:
            state = jax.device_put(next(given), sharding.replicated(mesh))
        state, metrics = step(state, built.teacher, batch)
        yield state, {name: float(value) for name, value in metrics.items()}


def train(built: Built, batches: Iterable[Batch], mesh: Mesh) -> tuple[Distillation, list[dict[str, float]]]:
    """Take a step on each batch; return what was trained, and what each step measured."""
    state, measured = built.state, []
    for after, metrics in steps(built, batches, mesh):
        state = after
        measured.append(metrics)
    return trained(built, state), measured


def trained(built: Built, state: TrainState) -> Distillation:
    """Return what is trained, as a state has it."""
    return nnx.merge(built.recipe.distillation, state.params, state.variables, copy=True)


def kd_loss(built: Built, metrics: Mapping[str, float]) -> float:
    """Return the KD loss as published, α·CE + β·T²·KL, of what a step measured of its terms."""
    return sum(term.weight * metrics[term.name] for term in built.terms if term.name in _OF_LOGITS)


def published_tensors(model: Distillation, term: str = "tat_layer4") -> dict[str, np.ndarray]:
    """Return the tensors of the student and of a term's embeddings, in float64, under the published names."""
    modules = {"student": model.student.network, **_embeddings(model, term)}
    return {
        f"{name}.{_published_name(path)}": to_torch(path, np.asarray(array, np.float64))
        for name, module in modules.items()
        for path, array in store.network_weights(module).items()
    }


def _embeddings(model: Distillation, term: str) -> dict[str, nnx.Module]:
    found = {name: getattr(model.losses[term], name) for name in ("query", "key", "value")}
    return {name: embedding for name, embedding in found.items() if embedding is not None}


def _published_name(path: str) -> str:
    module, leaf = torch_name(path).rsplit(".", 1)
    return f"{_EMBEDDING.get(module, module)}.{leaf}"
