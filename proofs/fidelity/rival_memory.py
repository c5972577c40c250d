"""CRD beside the figures recorded of its authors' code: step by step, with what it remembers after each."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from proofs.fidelity.recorded_inputs import draw, draw_entry, draw_integers, norm_and_sum
from proofs.fidelity.rival_losses import Case, Measured
from tat_jax.batch import Batch
from tat_jax.losses.crd import CRD, Memory
from tat_jax.networks.view import Outputs


def steps(cases: Iterable[Case]) -> Iterator[Case]:
    """Yield cases, and one of several steps as a case for each, of its last step."""
    for case in cases:
        for i, told in enumerate(case.get("steps", [])):
            parts = {name: value for name, value in told.items() if name[:2] in ("Z_", "me")}
            gradients = {n.removeprefix("grad_"): of for n, of in told.items() if n.startswith("grad_")}
            yield {**case, "last": i, "loss": told["loss"], "parts": parts, "grads": gradients}
        if "steps" not in case:
            yield case


class Given(CRD):
    """CRD whose negatives are not drawn."""

    def give(self, negatives: Int[np.ndarray, "steps batch negatives"]) -> None:
        """Set the negatives of the next batches."""
        rows = len(self.memory.student)
        self.given = nnx.Variable(
            jnp.stack(
                [jnp.stack([jnp.bincount(row, length=rows) for row in of_step]) for of_step in negatives]
            )
        )
        self.step = nnx.Variable(jnp.zeros((), jnp.int32))

    def negatives(self, labels: Int[Array, " batch"]) -> Int[Array, "batch rows"]:
        """Return what was given."""
        step = self.step[...]
        self.step[...] = step + 1
        return self.given[...][step]


def _crd(case: Case) -> Measured:
    loss = _built(case)
    for step in range(case["last"]):
        loss.remember(_measure(case, loss, step)[1])
    measured, memory = _measure(case, loss, case["last"])
    parts: dict[str, Any] = {"Z_v1": float(memory.student_scale), "Z_v2": float(memory.teacher_scale)}
    for name, rows in (("v1", memory.student), ("v2", memory.teacher)):
        parts[f"memory_{name}_norm_sum_after"] = norm_and_sum(np.asarray(rows))
    return measured._replace(parts=parts)


def _built(case: Case) -> Given:
    drawn = {path: draw_entry(path, shape) for path, shape in case["shapes"].items() if "embed" in path}
    entries = {path.removeprefix(f"{case['id']}/"): array for path, array in drawn.items()}
    ours, theirs = (entries[f"embed_{which}/linear.weight"].shape[1] for which in "st")
    hyper: Mapping[str, Any] = case["hyper"]
    images, features = hyper["n_data"], hyper["feat_dim"]
    loss = Given(
        ours,
        theirs,
        np.arange(images),
        features=features,
        negatives=hyper["K"],
        dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    for which, linear in (("s", loss.student), ("t", loss.teacher)):
        linear.kernel[...] = entries[f"embed_{which}/linear.weight"].T
        assert linear.bias is not None
        linear.bias[...] = entries[f"embed_{which}/linear.bias"]
    student, teacher = (
        jnp.asarray(draw(f"{case['id']}/memory_{name}", (images, features), 0.3)) for name in ("v1", "v2")
    )
    loss.remember(Memory(student, teacher, jnp.zeros(()), jnp.zeros(())))
    return loss


def _measure(case: Case, loss: Given, step: int) -> tuple[Measured, Memory]:
    path, images = f"{case['id']}/step{step}", case["hyper"]["n_data"]
    shapes = [case["shapes"][f"{case['id']}/step{{0,1}}/{which}"] for which in ("student", "teacher")]
    student, teacher = (
        jnp.asarray(draw(f"{path}/{which}", shape))
        for which, shape in zip(("student", "teacher"), shapes, strict=True)
    )
    count = len(student)
    index = draw_integers(f"{path}/index", 0, images, count)
    loss.give(draw_integers(f"{path}/negatives", 0, images, (1, count, case["hyper"]["K"])))
    batch = Batch(np.zeros((count, 1, 1, 3), np.uint8), index, np.ones(count, bool), index)
    graph = nnx.graphdef(loss)
    params, rest = nnx.state(loss, nnx.Param, ...)

    def value(params: nnx.State, student: Array, teacher: Array) -> tuple[Array, Memory]:
        module = nnx.merge(graph, params, rest, copy=True)
        ours, theirs = Outputs(None, {"pooled": student}), Outputs(None, {"pooled": teacher})
        values = module(ours, theirs, batch, train=True)
        return jnp.mean(values), module.memory

    differentiate = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))
    (found, memory), of = differentiate(params, student, teacher)
    gradients = {
        "student": of[1],
        "teacher_feature": of[2],
        "embed_s.linear.weight": of[0]["student"]["kernel"][...].T,
        "embed_t.linear.weight": of[0]["teacher"]["kernel"][...].T,
    }
    return Measured(float(found), {}, {name: np.asarray(g) for name, g in gradients.items()}), memory


METHODS = {"CRD": _crd}
