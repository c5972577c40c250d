"""The TaT loss of patch groups and anchors agrees with the published segmentation code and its formulas."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tat_jax.batch import Batch
from tat_jax.losses import anchor_loss, patch_group_loss
from tat_jax.losses.patches import PatchAnchor
from tat_jax.networks.view import Outputs
from tests.test_tat import draw

GOLDEN = json.loads((Path(__file__).parent / "golden" / "published_code.json").read_text())["segmentation"]
FORMS = {"stack_attn": "stack", "batch_attn": "batch", None: "sum"}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["id"])
def test_losses_and_gradients_are_those_of_the_published_code(case, x64):
    shape = case["shape_nchw"]
    query, key = (draw(f"{case['id']}/{name}", shape, 0.3) for name in "qk")
    value, target = (draw(f"{case['id']}/{name}", shape) for name in "vt")
    how = {"patches": (case["n"], case["m"]), "groups": case["heads"], "form": FORMS[case["attn_type"]]}

    def of_groups(query, value):
        return patch_group_loss(query, key, value, target, **how).mean()

    def of_anchors(query, value):
        return anchor_loss(query, key, value, target, anchors=tuple(case["anchor"])).mean()

    for name, loss in (("patchgroup", of_groups), ("anchor", of_anchors)):
        found, (by_query, by_value) = jax.value_and_grad(loss, (0, 1))(query, value)
        assert found == pytest.approx(case[f"{name}_loss"], rel=1e-10)
        assert np.linalg.norm(by_query) == pytest.approx(case[f"{name}_grad_q_norm"], rel=1e-10)
        assert np.linalg.norm(by_value) == pytest.approx(case[f"{name}_grad_v_norm"], rel=1e-10)


def waves(batch):
    """Return the student's and the teacher's maps whose losses were recorded, 17×17 of 8 channels."""
    b, i, j, c = np.meshgrid(np.arange(batch), np.arange(17), np.arange(17), np.arange(8), indexing="ij")
    teacher = np.sin(0.7 * c + 0.13 * i + 0.29 * j + 1.1 * b) + 0.3 * np.cos(0.05 * i * j + c)
    student = np.cos(0.5 * c - 0.17 * i + 0.23 * j + 0.9 * b) + 0.2 * np.sin(0.07 * i * j - c)
    return jnp.asarray(student), jnp.asarray(teacher)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"patches": (4, 4), "groups": 16}, 1.031258884),
        ({"patches": (4, 4), "groups": 4}, 1.065255159),
        ({"patches": (4, 4), "groups": 1}, 1.075143858),
        ({"patches": (5, 3), "groups": 1}, 1.145448649),
        ({"patches": (4, 4), "groups": 1, "form": "batch"}, 1.031258884),
        ({"patches": (4, 4), "groups": 1, "form": "sum"}, 16.500142151),
        ({"anchors": (4, 4)}, 0.630505987),
        ({"anchors": (17, 17)}, 0.634006567),
    ],
)
def test_losses_of_waves_are_those_measured_of_the_published_code(how, expected, x64):
    student, teacher = waves(1)
    loss = anchor_loss if "anchors" in how else patch_group_loss
    (found,) = loss(student, teacher, student, teacher, **how)
    assert found == pytest.approx(expected, abs=5e-10)


def test_the_teacher_may_ask(x64):
    student, teacher = waves(1)
    maps = teacher, student, student, teacher
    assert patch_group_loss(*maps, patches=(4, 4), groups=4)[0] == pytest.approx(0.782308984, abs=5e-10)
    assert anchor_loss(*maps, anchors=(4, 4))[0] == pytest.approx(0.125342758, abs=5e-10)


def term_of_waves(**options):
    """Return the term with the kernels whose figures were recorded."""
    options = {"patches": (4, 4), "groups": 4, "anchors": (4, 4), "dtype": jnp.float64} | options
    shape = (17, 17, 8)
    term = PatchAnchor(
        shape, shape, student_tap="decoder", teacher_tap="decoder", **options, rngs=nnx.Rngs(0)
    )
    i, o = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    kernels = {
        "query": 0.5 * np.sin(0.3 * o + 0.7 * i),
        "key": 0.5 * np.cos(0.4 * o - 0.6 * i),
        "value": 0.5 * np.sin(0.9 * o + 0.2 * i + 1),
    }
    for name, kernel in kernels.items():
        getattr(term, name).conv.kernel.set_value(jnp.asarray(kernel[None, None]))
    return term


def compare(term, student, teacher, where=None):
    count = len(student)
    where = jnp.ones(count, bool) if where is None else where
    outputs = (Outputs(None, {"decoder": tap}) for tap in (student, teacher))
    return term(*outputs, Batch(jnp.zeros((count, 1, 1, 3)), None, where), train=True)


def test_the_whole_chain_is_that_of_the_published_code(x64):
    student, teacher = waves(2)
    term = term_of_waves()
    np.testing.assert_allclose(compare(term, student, teacher), [1.260218296, 1.837241124], atol=5e-10)
    norm = term.query.norm
    np.testing.assert_allclose(norm.mean[...][:3], [-0.015215227, 0.010881612, 0.036006428], atol=5e-10)
    np.testing.assert_allclose(norm.var[...][:3], [1.156040032, 1.230469144, 1.264364988], atol=5e-10)

    def total(term, student, teacher):
        return compare(term, student, jax.lax.stop_gradient(teacher)).sum()

    of_term, by_student, by_teacher = nnx.grad(total, argnums=(0, 1, 2))(term_of_waves(), student, teacher)
    measured = {name: of_term[name]["conv"]["kernel"][...] for name in ("key", "query", "value")}
    measured["student"] = by_student
    recorded = {"student": 0.278710932, "key": 0.038786379, "query": 0.075026018, "value": 0.138811566}
    for name, norm in recorded.items():
        assert np.linalg.norm(measured[name]) == pytest.approx(norm, abs=5e-10)
    assert not by_teacher.any()


def test_statistics_over_the_batch_are_the_other_choice(x64):
    student, teacher = waves(2)
    found = compare(term_of_waves(statistics="batch"), student, teacher)
    # Recorded as one call with one normalisation over both images.
    assert found.mean() == pytest.approx(1.551210959, abs=5e-10)
