"""Rivals' trainings beside those recorded of RepDistiller's own loop: our train step, four steps each."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from proofs.fidelity import our_step
from proofs.fidelity.claim import Claim
from proofs.fidelity.recorded_inputs import (
    channels_last,
    draw,
    draw_entry,
    draw_integers,
    norm_and_sum,
    norm_of_all,
)
from proofs.fidelity.rival_losses import norm_paths, turn
from proofs.fidelity.rival_memory import Given
from proofs.fidelity.rival_networks import drawn_network, stages_of
from proofs.rounding import largest_relative_error, relative_error
from tat_jax import distill, sharding
from tat_jax.batch import Batch
from tat_jax.build import Built, build
from tat_jax.configs import base
from tat_jax.distill import Distillation
from tat_jax.losses.crd import Memory
from tat_jax.networks.layers import BatchNorm
from tat_jax.networks.view import View
from tat_jax.weights import store
from tat_jax.weights.names import to_ours

BOUND = 1e-9
Run = Mapping[str, Any]
_LINEAR = {"weight": "kernel", "bias": "bias"}
Stages = tuple[str, ...]


class _Method(NamedTuple):
    """The term of a config that a method of RepDistiller's is, and its parameters.

    Attributes:
        term: its name in `config.losses`.
        options: besides the weight, of the names of both networks' stages.
        tap: where a term is one pair of taps.
        paths: of its parameters, by the recorded names.
    """

    term: str
    options: Callable[[Stages, Stages], Mapping[str, Any]] = lambda student, teacher: {}
    tap: str | None = None
    paths: Mapping[str, str] = MappingProxyType({})


def _every(student: Stages, teacher: Stages) -> Mapping[str, Any]:
    """Return all stages, as many as both have."""
    pairs = list(zip(student, teacher, strict=False))
    return {"student_taps": tuple(s for s, _ in pairs), "teacher_taps": tuple(t for _, t in pairs)}


def _last(student: Stages, teacher: Stages) -> Mapping[str, Any]:
    return {"student_tap": student[-1], "teacher_tap": teacher[-1]}


def _paths_of_embeddings() -> dict[str, str]:
    sides = {"embed_s": "student", "embed_t": "teacher"}
    return {f"{s}/linear.{leaf}": f"{o}.{name}" for s, o in sides.items() for leaf, name in _LINEAR.items()}


def _paths_of_vid() -> dict[str, str]:
    paths = {}
    for i in range(4):
        paths[f"vid{i}/log_scale"] = f"predictors.{i}.log_scale"
        for j in range(3):
            paths[f"vid{i}/regressor.{2 * j}.weight"] = f"predictors.{i}.regressor.{j}.kernel"
    return paths


def _paths_of_fitnet() -> dict[str, str]:
    paths = {f"conv.{leaf}": f"conv.{name}" for leaf, name in _LINEAR.items()} | norm_paths("norm", "bn")
    return {f"regress/{name}": path for name, path in paths.items()}


_CRD = _Method(
    "crd", lambda student, teacher: {"features": 16, "negatives": 16}, paths=_paths_of_embeddings()
)
METHODS: Mapping[str, _Method | None] = {
    "kd": None,
    "hint": _Method("fitnet", tap="stage2", paths=_paths_of_fitnet()),
    "attention": _Method("at", _every),
    "similarity": _Method("sp", _last),
    "correlation": _Method("cc", paths=_paths_of_embeddings()),
    "vid": _Method("vid", _every, paths=_paths_of_vid()),
    "rkd": _Method("rkd"),
    "pkt": _Method("pkt"),
    "crd": _CRD,
    "crd+kd": _CRD,
}


def claims(figures: Mapping[str, Any]) -> Iterator[Claim]:
    """Train as every recorded run did, in float64, and compare all that it recorded."""
    for run in figures["trajectories"]:
        if run["method"] not in METHODS:
            yield Claim(f"{run['id']}: {run['method']} is not here", "RepDistiller", np.nan, None)
            continue
        with jax.enable_x64(True):
            yield from _of_run(run, figures["network_keys"])


def _of_run(run: Run, shapes: Mapping[str, Any]) -> Iterator[Claim]:
    def claim(what: str, error: float) -> Claim:
        return Claim(f"{run['id']}: {what}", "RepDistiller's training loop", error, BOUND)

    mesh = sharding.make_mesh(jax.devices()[:1])
    built = _built(run, shapes, mesh)
    model, measured = our_step.train(built, _batches(run), mesh)
    yield claim("losses", largest_relative_error([m["loss"] for m in measured], run["losses"]))
    student = model.student.network
    yield claim("parameters", _error_of(student, run["student_param_norm_sum"]))
    for part, told in run["extra_param_norm_sum"].items():
        yield claim(f"parameters of {part}", _error_of(_part(run, model, part), told))
    norms = [module for _, module in nnx.iter_modules(student) if isinstance(module, BatchNorm)]
    for kind in ("mean", "var"):
        norm = norm_of_all(np.asarray(getattr(module, kind)[...]) for module in norms)
        yield claim(f"running {kind}", relative_error(norm, run[f"student_running_{kind}_norm"]))
    images = jnp.asarray(channels_last(draw(f"{_pair(run)}/eval/image", (2, 3, 32, 32))))
    logits = np.asarray(model.student(images).logits)
    yield claim("logits in evaluation", relative_error(logits.ravel()[:8], run["eval_logits_first8"]))
    if "Z" in run:
        loss: Any = model.losses["crd"]
        memory = loss.memory
        scales = [float(memory.student_scale), float(memory.teacher_scale)]
        yield claim("normalising constants", largest_relative_error(scales, run["Z"]))
        rows = [float(np.linalg.norm(rows)) for rows in (memory.student, memory.teacher)]
        yield claim("memories", largest_relative_error(rows, run["memory_norms"]))


def _error_of(module: nnx.Module, told: tuple[float, float]) -> float:
    """Return the error of the norm and the sum of a module's parameters, by the norm."""
    leaves = [np.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]
    found = norm_and_sum(np.concatenate(leaves))
    return float(np.max(np.abs(np.subtract(found, told))) / told[0])


def _part(run: Run, model: Distillation, part: str) -> nnx.Module:
    """Return the module of a loss that has the parameters which were recorded as `part`."""
    method = METHODS[run["method"]]
    assert method is not None
    loss: Any = model.losses[_term(method)]
    if part.startswith("vid"):
        return loss.predictors[int(part.removeprefix("vid"))]
    return loss if part == "regress" else getattr(loss, {"embed_s": "student", "embed_t": "teacher"}[part])


def _term(method: _Method) -> str:
    return f"{method.term}_{method.tap}" if method.tap else method.term


def _pair(run: Run) -> str:
    return run["id"].rpartition("/")[0]


def _built(run: Run, shapes: Mapping[str, Any], mesh: jax.sharding.Mesh) -> Built:
    method, weights = METHODS[run["method"]], run["weights"]
    config = base.base()
    config.dtype = "float64"
    config.batch_size = run["batch"]
    config.data.update({"image_size": 32, "eval_resize": 32})
    config.optimizer.update({"name": "sgd", "learning_rate": 0.05, "weight_decay": 5e-4})
    student, teacher = (
        drawn_network(run[which], shapes[run[which]], f"{_pair(run)}/{which}")
        for which in ("student", "teacher")
    )
    terms: dict[str, Any] = {
        "cross_entropy": {"weight": weights["r"]},
        "kd": {"weight": weights["a"], "temperature": 4.0},
    }
    if method is not None:
        said = {"weight": weights["b"], **method.options(_stages(student), _stages(teacher))}
        terms[method.term] = {method.tap: said} if method.tap else said
    base.update_losses(config, terms)
    built = build(
        config,
        mesh,
        num_classes=100,
        steps_per_epoch=run["steps"],
        student=student,
        teacher=teacher,
        labels=lambda: np.arange(64),
    )
    model = our_step.trained(built, built.state)
    if method is not None and method.paths:
        name = _term(method)
        if method.term == "crd":
            model.losses[name] = _with_memory(run, model.losses[name])
        store.set_weights(model.losses[name], _entries(run, method, model.losses[name]), source=run["id"])
    recipe = built.recipe._replace(distillation=nnx.graphdef(model))
    return built._replace(recipe=recipe, state=distill.init_state(model, recipe.optimizer))


def _stages(view: View) -> Stages:
    return stages_of(nnx.eval_shape(lambda view: view(jnp.zeros((1, 32, 32, 3))), view))


def _entries(run: Run, method: _Method, loss: Any) -> dict[str, np.ndarray]:
    """Return the parameters and statistics of a loss as they were drawn; others as they are."""
    entries = {path: np.asarray(leaf) for path, leaf in store.network_weights(loss).items()}
    for name, shape in run["extra_shapes"].items():
        path = method.paths[name.removeprefix(f"{run['id']}/")]
        if not name.endswith("log_scale"):
            drawn = draw_entry(name, shape)
            is_turned = name.endswith("regress/conv.weight") and isinstance(loss.conv, nnx.ConvTranspose)
            entries[path] = to_ours(path, turn(drawn) if is_turned else drawn)
    return entries


def _with_memory(run: Run, loss: Any) -> Given:
    """Return CRD with the negatives and the memories of a run."""
    given = Given(
        loss.student.in_features,
        loss.teacher.in_features,
        np.arange(64),
        features=16,
        negatives=16,
        dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    negatives = [
        draw_integers(f"{_pair(run)}/batch{i}/negatives", 0, 64, (run["batch"], 16))
        for i in range(run["steps"])
    ]
    given.give(np.stack(negatives))
    student, teacher = (
        jnp.asarray(draw(f"{run['id']}/memory_{which}", (64, 16), 0.3)) for which in ("v1", "v2")
    )
    given.remember(Memory(student, teacher, jnp.zeros(()), jnp.zeros(())))
    return given


def _batches(run: Run) -> Iterator[Batch]:
    count = run["batch"]
    for step in range(run["steps"]):
        path = f"{_pair(run)}/batch{step}"
        images = channels_last(draw(f"{path}/image", (count, 3, 32, 32)))
        labels = draw_integers(f"{path}/label", 0, 100, count).astype(np.int32)
        indices = np.arange(count * step, count * (step + 1), dtype=np.int32)
        yield Batch(images, labels, np.ones(count, bool), indices)
