"""CIFAR's networks beside the figures recorded of RepDistiller's: forward, taps, gradients, statistics."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from proofs.fidelity import our_step
from proofs.fidelity.claim import Claim
from proofs.fidelity.recorded_inputs import (
    channels_first,
    channels_last,
    draw,
    draw_entries,
    draw_integers,
    norm_and_sum,
    norm_of_all,
)
from proofs.rounding import largest_relative_error, relative_error
from tat_jax.losses import cross_entropy
from tat_jax.networks.layers import BatchNorm
from tat_jax.networks.view import Outputs, View
from tat_jax.weights import store
from tat_jax.weights.names import to_torch, torch_names

BOUND = 1e-10
# What they are called here, where RepDistiller's names are others.
OURS = {
    "ResNet50": "cifar_resnet50",
    "MobileNetV2": "cifar_mobilenet_v2",
    "ShuffleV1": "shufflenet_v1",
    "ShuffleV2": "shufflenet_v2",
}


def ours(name: str) -> str:
    """Return our name of a network of RepDistiller's."""
    return OURS.get(name, name)


def drawn_network(name: str, shapes: Mapping[str, Any], prefix: str) -> View:
    """Return RepDistiller's network with the entries that are drawn from their names."""
    entries = draw_entries(prefix, {key: shape for key, shape in shapes.items() if "num_batches" not in key})
    return our_step.network(entries, ours(name), dtype="float64")


def stages_of(outputs: Outputs) -> tuple[str, ...]:
    """Return the names of the stages' maps, from the shallowest to the deepest."""
    return tuple(sorted(name for name in outputs.taps if name.startswith("stage") and name[5:].isdigit()))


def taps_of(outputs: Outputs, *, preact: bool) -> list[np.ndarray]:
    """Return the taps in RepDistiller's order: the stem, the stages and the vectors."""
    names = ["stem", *stages_of(outputs), "pooled"]
    if preact:
        names = [f"{name}_preact" if f"{name}_preact" in outputs.taps else name for name in names]
    return [channels_first(np.asarray(outputs.taps[name])) for name in names]


def claims(figures: Mapping[str, Any]) -> Iterator[Claim]:
    """Compare every network of a file of golden figures, in float64, and the names and shapes of all."""
    for name, shapes in figures["network_keys"].items():
        yield _of_names(name, shapes)
    for recorded in figures["networks"]:
        shapes = figures["network_keys"][recorded["net"]]
        with jax.enable_x64(True):
            yield from _of_figures(recorded, shapes)


def _of_names(name: str, shapes: Mapping[str, Any]) -> Claim:
    """Compare the names and shapes of a network's entries with RepDistiller's."""
    with jax.enable_x64(True):
        view = drawn_network(name, shapes, f"net/{name}")
    found = {
        torch_names(path, ours(name))[0]: to_torch(path, np.asarray(leaf)).shape
        for path, leaf in store.network_weights(view.network).items()
    }
    expected = {key: tuple(shape) for key, shape in shapes.items() if "num_batches" not in key}
    wrong = len(found.items() ^ expected.items())
    return Claim(f"{name}: names and shapes that differ", "RepDistiller", float(wrong), 0.0)


def _of_figures(recorded: Mapping[str, Any], shapes: Mapping[str, Any]) -> Iterator[Claim]:
    name = recorded["net"]
    images = jnp.asarray(channels_last(draw("net/image", (2, 3, 32, 32))))
    labels = draw_integers("net/label", 0, 100, 2)

    def claim(what: str, error: float) -> Claim:
        return Claim(f"{name}: {what}", "RepDistiller", error, BOUND)

    view = drawn_network(name, shapes, f"net/{name}")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(view, nnx.Param)))
    yield claim("parameters", abs(parameters - recorded["parameters"]))
    seen, told = nnx.jit(lambda view: view(images))(view), recorded["eval"]
    assert seen.logits is not None
    yield claim("logits", relative_error(np.ravel(seen.logits)[:8], told["logits_first8"]))
    yield claim("all logits", largest_relative_error(norm_and_sum(np.asarray(seen.logits)), told["logits"]))
    expected = [tuple(tap["shape"]) for tap in told["taps"]]
    wrong = [tap.shape for tap in taps_of(seen, preact=False)] != expected
    yield claim("shapes of taps", float(wrong))
    for kind, preact in (("taps", False), ("preact_taps", True)):
        found = [norm_and_sum(tap) for tap in taps_of(seen, preact=preact)]
        there = [tap["norm_sum"] if isinstance(tap, Mapping) else tap for tap in told[kind]]
        yield claim(kind, largest_relative_error(np.ravel(found), np.ravel(there)))
    graph, state = nnx.split(view)
    params, rest = (nnx.filter_state(state, which) for which in (nnx.Param, nnx.Not(nnx.Param)))

    def loss(params: nnx.State) -> tuple[jax.Array, tuple[Outputs, nnx.State]]:
        model = nnx.merge(graph, params, rest, copy=True)
        outputs = model(images, train=True)
        assert outputs.logits is not None
        return cross_entropy(outputs.logits, jnp.asarray(labels)), (outputs, nnx.state(model, nnx.BatchStat))

    (ce, (seen, statistics)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    told = recorded["train"]
    yield claim("cross-entropy in training", relative_error(ce, told["ce"]))
    yield claim("logits in training", relative_error(np.ravel(seen.logits)[:8], told["logits_first8"]))
    found = [norm_and_sum(tap) for tap in taps_of(seen, preact=False)]
    yield claim("taps in training", largest_relative_error(np.ravel(found), np.ravel(told["taps"])))
    logits = norm_and_sum(np.asarray(seen.logits))
    yield claim("all logits in training", largest_relative_error(logits, told["logits"]))
    norm = norm_of_all(map(np.asarray, jax.tree.leaves(gradients)))
    yield claim("norm of the gradient", relative_error(norm, told["grad_norm_all"]))
    first = np.asarray(_first_kernel(name, shapes, gradients))
    norm = float(np.linalg.norm(first))
    yield claim("norm of the first kernel's gradient", relative_error(norm, told["grad_first_conv_norm"]))
    for kind in ("mean", "var"):
        after = nnx.merge(graph, params, nnx.merge_state(rest, statistics))
        norms = [module for _, module in nnx.iter_modules(after) if isinstance(module, BatchNorm)]
        norm = norm_of_all(np.asarray(getattr(module, kind)[...]) for module in norms)
        yield claim(f"running {kind}", relative_error(norm, told[f"running_{kind}_norm_after"]))


def _first_kernel(name: str, shapes: Mapping[str, Any], gradients: nnx.State) -> jax.Array:
    """Return of gradients that of the kernel which is the first among RepDistiller's entries."""
    first = next(key for key, shape in shapes.items() if len(shape) == 4)
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(gradients)}
    (found,) = [
        leaf
        for path, leaf in leaves.items()
        if torch_names(path.removeprefix("network."), ours(name))[0] == first
    ]
    return found.get_value()
