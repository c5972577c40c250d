"""This package's own training step, started from weights that carry PyTorch's names."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import Mesh

from tat_jax import checkpoint, distill, sharding
from tat_jax.convert import convert_entries, to_ours, to_torch, torch_name
from tat_jax.data.pipeline import Batch
from tat_jax.distill import Distillation, TrainState
from tat_jax.resnet import ResNet
from tat_jax.task import Prepared
from tat_jax.train import jit_train_step

# Our attributes of an embedding, and the published ones.
_EMBEDDING = {"conv": "conv2d", "norm": "l2norm"}


def network(
    entries: Mapping[str, np.ndarray], architecture: str, *, dtype: str, bn_group: int | None = None
) -> ResNet:
    """Return the network that the converter makes of entries under torchvision's names."""
    converted = convert_entries(entries, architecture, source="entries")
    model = ResNet(**converted.arguments, dtype=jnp.dtype(dtype), bn_group=bn_group, rngs=nnx.Rngs(0))
    checkpoint.set_weights(model, converted.weights, source="entries")
    return model


def entries_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the tensors of a module of PyTorch by name."""
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def with_embeddings(prepared: Prepared, entry: Callable[[str, str, tuple[int, ...]], np.ndarray]) -> Prepared:
    """Set the embeddings of `layer4` to `entry(module, key, shape)`, under the published names."""
    model = nnx.merge(prepared.task.distillation, prepared.state.params, prepared.state.batch_stats)
    for name, embedding in _embeddings(model).items():
        weights = {}
        for path, leaf in checkpoint.network_weights(embedding).items():
            shape = to_torch(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
            weights[path] = to_ours(path, entry(name, _published_name(path), shape))
        checkpoint.set_weights(embedding, weights, source=name)
    state = distill.init_state(model, prepared.task.optimizer)
    return prepared._replace(state=jax.device_put(state, prepared.state.step.sharding))


def steps(
    prepared: Prepared, batches: Iterable[Batch], mesh: Mesh, *, states: Iterable[TrainState] | None = None
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """Take a step on each batch; yield the state after it, and what it measured.

    Args:
        prepared: where to start.
        batches: one a step.
        mesh: the devices.
        states: those to take the steps from, instead of the one that the step before led to.
    """
    step = jit_train_step(prepared.task, mesh)
    given = iter(states) if states is not None else None
    state = prepared.state
    for batch in sharding.put_batches(batches, mesh):
        if given is not None:
            state = jax.device_put(next(given), sharding.replicated(mesh))
        state, metrics = step(state, prepared.teacher, distill.Batch(**batch))
        yield state, {name: float(value) for name, value in metrics.items()}


def train(
    prepared: Prepared, batches: Iterable[Batch], mesh: Mesh
) -> tuple[Distillation, list[dict[str, float]]]:
    """Take a step on each batch; return what was trained, and what each step measured."""
    state, measured = prepared.state, []
    for after, metrics in steps(prepared, batches, mesh):
        state = after
        measured.append(metrics)
    return nnx.merge(prepared.task.distillation, state.params, state.batch_stats), measured


def published_tensors(model: Distillation) -> dict[str, np.ndarray]:
    """Return every tensor of student, query and value, in float64, under the published names."""
    modules = {"student": model.student, **_embeddings(model)}
    return {
        f"{name}.{_published_name(path)}": to_torch(path, np.asarray(array, np.float64))
        for name, module in modules.items()
        for path, array in checkpoint.network_weights(module).items()
    }


def _embeddings(model: Distillation) -> dict[str, nnx.Module]:
    return {name: getattr(model.tat["layer4"], name) for name in ("query", "value")}


def _published_name(path: str) -> str:
    module, leaf = torch_name(path).rsplit(".", 1)
    return f"{_EMBEDDING.get(module, module)}.{leaf}"
