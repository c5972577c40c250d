"""The rivals' losses beside the figures recorded of their authors' code: values, parts and gradients."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from proofs.fidelity.claim import Claim
from proofs.fidelity.recorded_inputs import (
    channels_first,
    channels_last,
    draw,
    draw_entry,
    draw_integers,
    norm_and_sum,
)
from proofs.rounding import largest_relative_error, relative_error
from tat_jax import losses
from tat_jax.batch import Batch
from tat_jax.losses.adapt import Embedding, pool
from tat_jax.losses.correlation_congruence import CorrelationCongruence
from tat_jax.losses.ickd import ICKD
from tat_jax.losses.loss import Loss
from tat_jax.losses.maps import FitNet
from tat_jax.losses.review import Level, Review
from tat_jax.losses.tat import TargetAwareTransformer
from tat_jax.losses.vid import VID
from tat_jax.networks.heads import Projector
from tat_jax.networks.layers import BatchNorm
from tat_jax.networks.view import Outputs
from tat_jax.weights import store
from tat_jax.weights.names import to_ours, to_torch

BOUND = 1e-10
Case = Mapping[str, Any]
Arrays = dict[str, jax.Array]


class Measured(NamedTuple):
    """What our code makes of a case.

    Attributes:
        loss: its value.
        parts: likewise, by the recorded names.
        gradients: in PyTorch's layout, by the recorded names.
    """

    loss: float
    parts: dict[str, Any]
    gradients: dict[str, np.ndarray]


Methods = dict[str, Callable[[Case], Measured]]


def claims(figures: Mapping[str, Any], methods: Methods | None = None) -> Iterator[Claim]:
    """Compare every case of a loss that is here, in float64; a method that is not is named."""
    for case in figures["losses"]:
        measure = (METHODS if methods is None else methods).get(case["method"])
        if measure is None:
            yield Claim(f"{case['id']}: {case['method']} is not here", "its authors' code", math.nan, None)
            continue
        with jax.enable_x64(True):
            yield from _of_case(case, measure(case))


def _of_case(case: Case, measured: Measured) -> Iterator[Claim]:
    def claim(what: str, error: float) -> Claim:
        return Claim(f"{case['id']}: {what}", case["source"].split(",")[0], error, BOUND)

    yield claim("loss", relative_error(measured.loss, case["loss"]))
    for name, value in (case.get("parts") or {}).items():
        yield claim(name, largest_relative_error(np.ravel(measured.parts[name]), np.ravel(value)))
    # One that is 0, as that of a bias before BatchNorm, is the rounding of others.
    least = 1e-4 * max(told["norm"] for told in case["grads"].values() if "norm" in told)
    for name, told in case["grads"].items():
        if "none" in told:
            yield claim(f"gradient of {name}, of which there is none", float(name in measured.gradients))
            continue
        gradient = measured.gradients[name]
        norm, total = norm_and_sum(gradient)
        # A sum of numbers of both signs may be almost 0, so that its error is one of the norm.
        errors = [abs(norm - told["norm"]), abs(total - told["sum"])]
        errors += list(np.abs(np.ravel(gradient)[: len(told["first8"])] - told["first8"]))
        yield claim(f"gradient of {name}", max(errors) / max(told["norm"], least))


def _input(case: Case, name: str, scale: float = 1.0) -> jax.Array:
    """Draw an input of a case, in our layout."""
    path = f"{case['id']}/{name}"
    return jnp.asarray(channels_last(draw(path, case["shapes"][path], scale)))


def _function(loss: Callable[..., Any], student: jax.Array, *others: Any, parts: Any = None) -> Measured:
    value, gradient = jax.jit(jax.value_and_grad(lambda student: loss(student, *others)))(student)
    return Measured(float(value), parts or {}, {"student": channels_first(np.asarray(gradient))})


def _logits(case: Case) -> tuple[jax.Array, jax.Array, np.ndarray]:
    student, teacher = _input(case, "student", 2.0), _input(case, "teacher", 3.0)
    labels = draw_integers(f"{case['id']}/labels", 0, student.shape[1], len(student))
    return student, teacher, labels


def _kd(case: Case) -> Measured:
    student, teacher, _ = _logits(case)
    return _function(lambda s: losses.kd(s, teacher, temperature=case["hyper"]["T"]), student)


def _standardized(case: Case) -> Measured:
    student, teacher, labels = _logits(case)
    hyper = case["hyper"]
    target = losses.logit_standardization(teacher)

    def loss(s: jax.Array) -> jax.Array:
        ours = losses.logit_standardization(s)
        if "DKD" in case["method"]:
            weights = {name: hyper[name] for name in ("alpha", "beta") if name in hyper}
            return losses.dkd(ours, target, labels, temperature=hyper["base_temperature"], **weights)
        return losses.kd(ours, target, temperature=hyper["base_temperature"])

    return _function(loss, student)


def _dkd(case: Case) -> Measured:
    student, teacher, labels = _logits(case)
    hyper, temperature = case["hyper"], case["hyper"]["T"]

    def loss(s: jax.Array, alpha: float, beta: float) -> jax.Array:
        return losses.dkd(s, teacher, labels, alpha=alpha, beta=beta, temperature=temperature)

    parts = {"tckd": float(loss(student, 1.0, 0.0)), "nckd": float(loss(student, 0.0, 1.0))}
    return _function(loss, student, hyper["alpha"], hyper["beta"], parts=parts)


def _dist(case: Case) -> Measured:
    student, teacher, _ = _logits(case)
    hyper = case["hyper"]

    def loss(s: jax.Array, beta: float, gamma: float) -> jax.Array:
        return losses.dist(s, teacher, beta=beta, gamma=gamma, temperature=hyper["tau"])

    beta, gamma = float(hyper["beta"]), float(hyper["gamma"])
    parts = {"inter": float(loss(student, beta, 0.0)), "intra": float(loss(student, 0.0, gamma))}
    return _function(loss, student, beta, gamma, parts=parts)


def _nkd(case: Case) -> Measured:
    student, teacher, labels = _logits(case)
    hyper = case["hyper"]

    def loss(s: jax.Array, gamma: float) -> jax.Array:
        return losses.nkd(s, teacher, labels, gamma=gamma, temperature=hyper["temp"])

    target = float(loss(student, 0.0))
    measured = _function(loss, student, hyper["gamma"])
    parts = {"target": target, "nontarget_weighted": float(loss(student, hyper["gamma"])) - target}
    return measured._replace(parts=parts)


def _rkd(case: Case) -> Measured:
    student, teacher = _input(case, "student"), _input(case, "teacher")

    def loss(s: jax.Array, distance: float, angle: float) -> jax.Array:
        return losses.rkd(s, teacher, distance=distance, angle=angle)

    hyper = case["hyper"]
    measured = _function(loss, student, float(hyper["w_d"]), float(hyper["w_a"]))
    distance, angle = (_function(loss, student, *which) for which in ((1.0, 0.0), (0.0, 1.0)))
    parts = {"distance_unweighted": distance.loss, "angle_unweighted": angle.loss}
    alone = {
        "student_distance_only": distance.gradients["student"],
        "student_angle_only": angle.gradients["student"],
    }
    return measured._replace(parts=parts, gradients=measured.gradients | alone)


def _of_maps(loss: Callable[..., Any]) -> Callable[[Case], Measured]:
    def measure(case: Case) -> Measured:
        teacher = _input(case, "teacher")
        return _function(lambda s: loss(s, teacher), _input(case, "student"))

    return measure


def _module(
    loss: Loss,
    entries: Mapping[str, np.ndarray],
    paths: Mapping[str, str],
    student: Arrays,
    teacher: Arrays,
    names: Mapping[str, str],
) -> Measured:
    """Measure a loss with parameters.

    Args:
        loss: as built.
        entries: its arrays in PyTorch's layout, by the authors' names.
        paths: ours of those names.
        student: taps.
        teacher: likewise.
        names: of the recorded gradients of parameters, our paths.
    """
    weights = {paths[name]: to_ours(paths[name], array) for name, array in entries.items()}
    store.set_weights(loss, weights, source="the recorded module")
    graph, state = nnx.split(loss)
    params, rest = (nnx.filter_state(state, which) for which in (nnx.Param, nnx.Not(nnx.Param)))
    count = len(next(iter(student.values())))
    batch = Batch(np.zeros((count, 1, 1, 3), np.uint8), None, np.ones(count, bool))

    def value(params: nnx.State, student: Arrays) -> jax.Array:
        module = nnx.merge(graph, params, rest, copy=True)
        return jnp.mean(module(Outputs(None, student), Outputs(None, teacher), batch, train=True))

    differentiate = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
    found, (by_params, by_student) = differentiate(params, student)
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(by_params)}
    gradients = {name: channels_first(np.asarray(g)) for name, g in by_student.items()}
    for name, path in names.items():
        gradients[name] = np.asarray(to_torch(path, np.asarray(leaves[path].get_value())))
    return Measured(float(found), {}, gradients)


def _entries(case: Case, shapes: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    return {
        path.removeprefix(f"{prefix}/"): draw_entry(path, shape)
        for path, shape in shapes.items()
        if path.startswith(prefix)
    }


def norm_paths(ours: str, theirs: str) -> dict[str, str]:
    """Return our paths of a normalisation by its entries' names in PyTorch."""
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return {f"{theirs}.{leaf}": f"{ours}.{name}" for leaf, name in leaves.items()}


def _fitnet(case: Case) -> Measured:
    student, teacher = _input(case, "student"), jax.nn.relu(_input(case, "teacher"))
    loss = FitNet(
        student.shape[1:],
        teacher.shape[1:],
        student_tap="student",
        teacher_tap="teacher",
        dtype=jnp.float64,
        bn_group=None,
        rngs=nnx.Rngs(0),
    )
    entries = _entries(case, case["module"], f"{case['id']}/regress")
    paths = {"conv.weight": "conv.kernel", "conv.bias": "conv.bias", **norm_paths("norm", "bn")}
    turned = isinstance(loss.conv, nnx.ConvTranspose)
    if turned:
        entries["conv.weight"] = turn(entries["conv.weight"])
    names = {name: path for name, path in paths.items() if name in case["grads"]}
    measured = _module(loss, entries, paths, {"student": student}, {"teacher": teacher}, names)
    if turned:
        measured.gradients["conv.weight"] = turn(measured.gradients["conv.weight"])
    return measured


def turn(kernel: np.ndarray) -> np.ndarray:
    """Turn the kernel of a transposed convolution round, as PyTorch keeps it, or back."""
    return np.swapaxes(kernel, 0, 1)[:, :, ::-1, ::-1]


def _cc(case: Case) -> Measured:
    student, teacher = _input(case, "student"), _input(case, "teacher")
    entries = {
        f"{which}.{leaf}": draw_entry(path, case["shapes"][path])
        for which in ("embed_s", "embed_t")
        for leaf in ("weight", "bias")
        for path in [f"{case['id']}/{which}/linear.{leaf}"]
    }
    loss = CorrelationCongruence(
        student.shape[1],
        teacher.shape[1],
        student_tap="student",
        teacher_tap="teacher",
        features=len(entries["embed_s.bias"]),
        dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    paths = {
        f"{theirs}.{leaf}": f"{ours}.{name}"
        for theirs, ours in (("embed_s", "student"), ("embed_t", "teacher"))
        for leaf, name in (("weight", "kernel"), ("bias", "bias"))
    }
    names = {name: paths[name] for name in case["grads"] if name in paths}
    return _module(loss, entries, paths, {"student": student}, {"teacher": teacher}, names)


def _vid(case: Case) -> Measured:
    student, teacher = _input(case, "student"), _input(case, "teacher")
    loss = VID(
        [(student.shape[-1], teacher.shape[-1])],
        student_taps=("student",),
        teacher_taps=("teacher",),
        dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    entries = {}
    for i in range(3):
        path = f"{case['id']}/regressor.{2 * i}.weight"
        entries[f"regressor.{2 * i}.weight"] = draw_entry(path, case["shapes"][path])
    path = f"{case['id']}/log_scale"
    first = case["log_scale_initial_value"]
    entries["log_scale"] = first + 0.5 * draw(path, case["shapes"][path])
    paths = {f"regressor.{2 * i}.weight": f"predictors.0.regressor.{i}.kernel" for i in range(3)}
    paths["log_scale"] = "predictors.0.log_scale"
    names = {name: path for name, path in paths.items() if name in case["grads"]}
    return _module(loss, entries, paths, {"student": student}, {"teacher": teacher}, names)


def _ickd(case: Case) -> Measured:
    student, teacher = _input(case, "student"), _input(case, "teacher")
    loss = ICKD(
        student.shape[-1],
        teacher.shape[-1],
        student_tap="student",
        teacher_tap="teacher",
        divide_by_batch="imagenet" in case["id"],
        dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    entries = _entries(case, case["shapes"], f"{case['id']}/embed_s")
    statistics = {"l2norm.running_mean": loss.embed.norm.mean, "l2norm.running_var": loss.embed.norm.var}
    entries = {name: np.asarray(value[...]) for name, value in statistics.items()} | entries
    paths = {"conv2d.weight": "embed.conv.kernel", **norm_paths("embed.norm", "l2norm")}
    names = {name: path for name, path in paths.items() if name in case["grads"]}
    return _module(loss, entries, paths, {"student": student}, {"teacher": teacher}, names)


def _review(case: Case) -> Measured:
    if case["id"].endswith("hcl"):
        return _review_alone(case)
    names = sorted(path.rpartition("/")[2] for path in case["shapes"])
    ours, theirs = ([n for n in names if n.startswith(which)] for which in ("student", "teacher"))
    student = {n: _input(case, n) for n in ours}
    student = {n: x if n.endswith("pooled") else jax.nn.relu(x) for n, x in student.items()}
    teacher = {n: _input(case, n) for n in theirs}
    hyper = case["hyper"]
    levels = [Level(*pair) for pair in zip(hyper["in_channels"], hyper["out_channels"], strict=True)]
    loss = Review(
        levels,
        student_taps=tuple(ours),
        teacher_taps=tuple(theirs),
        middle=hyper["mid_channel"],
        dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    entries, paths = {}, {}
    for path, shape in case["module"].items():
        name = "abfs." + path.partition("/abfs/")[2]
        entries[name] = draw_entry(path, shape)
    for i in range(len(levels)):
        for inner, (conv, norm) in {
            "conv1": ("enter", "enter_norm"),
            "conv2": ("leave", "leave_norm"),
        }.items():
            paths[f"abfs.{i}.{inner}.0.weight"] = f"fusions.{i}.{conv}.kernel"
            paths |= norm_paths(f"fusions.{i}.{norm}", f"abfs.{i}.{inner}.1")
        paths[f"abfs.{i}.att_conv.0.weight"] = f"fusions.{i}.gates.kernel"
        paths[f"abfs.{i}.att_conv.0.bias"] = f"fusions.{i}.gates.bias"
    wanted = {name: paths[name] for name in case["grads"] if name in paths}
    return _module(loss, entries, paths, student, teacher, wanted)


def _review_alone(case: Case) -> Measured:
    names = sorted(path.rpartition("/")[2] for path in case["shapes"])
    student, teacher = ({n: _input(case, n) for n in names if n[0] == which} for which in "st")

    def loss(student: Arrays) -> tuple[jax.Array, jax.Array]:
        levels = [losses.hierarchical_context_loss(x, teacher[f"t{n[1:]}"]) for n, x in student.items()]
        return sum(levels, jnp.zeros(())), jnp.stack(levels)

    (value, levels), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    parts = {"per_level": np.asarray(levels)}
    return Measured(float(value), parts, {n: channels_first(np.asarray(g)) for n, g in gradients.items()})


def _tat(case: Case) -> Measured:
    student, teacher = (jax.nn.relu(_input(case, which)) for which in ("student", "teacher"))
    loss = TargetAwareTransformer(
        student.shape[-1],
        teacher.shape[-1],
        student_tap="student",
        teacher_tap="teacher",
        heads=case["hyper"]["heads"],
        dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    entries, paths = {}, {}
    for which in ("query", "value"):
        embedding = getattr(loss, which)
        assert isinstance(embedding, Embedding)
        path = f"{case['id']}/{which}/conv2d.weight"
        entries[f"{which}.conv2d.weight"] = draw_entry(path, case["shapes"][path])
        paths[f"{which}.conv2d.weight"] = f"{which}.conv.kernel"
        paths |= norm_paths(f"{which}.norm", f"{which}.l2norm")
        entries |= _drawn_norm(case, which, embedding.norm)
    names = {name: path for name, path in paths.items() if name in case["grads"]}
    return _module(loss, entries, paths, {"student": student}, {"teacher": teacher}, names)


def _drawn_norm(case: Case, which: str, norm: BatchNorm) -> dict[str, np.ndarray]:
    """Return a normalisation's entries: the query's are drawn small, so that attention is not saturated."""
    small = 0.05 if which == "query" else 1.0
    shape = norm.scale[...].shape
    drawn = {leaf: draw_entry(f"{case['id']}/{which}/l2norm.{leaf}", shape) for leaf in ("weight", "bias")}
    entries = {f"{which}.l2norm.{leaf}": small * array for leaf, array in drawn.items()}
    statistics = {"running_mean": norm.mean, "running_var": norm.var}
    return entries | {f"{which}.l2norm.{n}": np.asarray(value[...]) for n, value in statistics.items()}


def _catkd(case: Case) -> Measured:
    teacher, hyper = _input(case, "teacher"), case["hyper"]
    return _function(lambda s: losses.class_attention(s, teacher, **hyper), _input(case, "student"))


def _simkd(case: Case) -> Measured:
    student, target = _input(case, "student"), jax.nn.relu(_input(case, "teacher"))
    grid = min(student.shape[1:3], target.shape[1:3])
    projector = Projector(student.shape[-1], target.shape[-1], dtype=jnp.float64, rngs=nnx.Rngs(0))
    entries, paths = _entries(case, case["module"], f"{case['id']}/simkd"), {}
    for i in range(3):
        paths[f"transfer.{3 * i}.weight"] = f"convs.{i}.kernel"
        paths |= norm_paths(f"norms.{i}", f"transfer.{3 * i + 1}")
    weights = {paths[name]: to_ours(paths[name], array) for name, array in entries.items()}
    store.set_weights(projector, weights, source="the recorded module")
    graph = nnx.graphdef(projector)
    params, rest = nnx.state(projector, nnx.Param, ...)

    def value(params: nnx.State, student: jax.Array) -> jax.Array:
        module = nnx.merge(graph, params, rest, copy=True)
        projected = module(pool(student, grid), train=True)
        return jnp.mean((projected - pool(target, grid)) ** 2)

    found, by = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))(params, student)
    leaves = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(by[0])}
    gradients = {"student": channels_first(np.asarray(by[1]))}
    for name in case["grads"]:
        if name in paths:
            gradients[name] = np.asarray(to_torch(paths[name], np.asarray(leaves[paths[name]].get_value())))
    return Measured(float(found), {}, gradients)


METHODS: Methods = {
    "KD": _kd,
    "LSKD+KD": _standardized,
    "LSKD+DKD": _standardized,
    "DKD": _dkd,
    "DIST": _dist,
    "NKD": _nkd,
    "RKD": _rkd,
    "PKT": _of_maps(losses.pkt),
    "AT": _of_maps(losses.attention_transfer),
    "SP": _of_maps(losses.similarity_preserving),
    "CC": _cc,
    "FitNet": _fitnet,
    "VID": _vid,
    "ICKD-C": _ickd,
    "ReviewKD": _review,
    "TaT": _tat,
    "CAT-KD": _catkd,
    "SimKD": _simkd,
}
