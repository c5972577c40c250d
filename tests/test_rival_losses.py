"""The rivals' losses have their authors' figures, are 0 where they should be, and leave padding out."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from proofs.fidelity import rival_losses
from tat_jax import losses
from tat_jax.batch import Batch
from tat_jax.configs import base
from tat_jax.distill import Distillation, Recipe, init_state, train_step
from tat_jax.losses import LOSSES, hierarchical_context_loss, terms_of
from tat_jax.losses.correlation_congruence import CorrelationCongruence
from tat_jax.losses.ickd import ICKD
from tat_jax.losses.review import Level, Review
from tat_jax.losses.vid import VID
from tat_jax.networks.view import Outputs, View
from tat_jax.tasks.classification import Classification
from tests.claims import broken
from tests.tiny import Tiny

FIGURES = json.loads((Path(__file__).parent / "golden" / "rivals.json").read_text())
HERE = [case for case in FIGURES["losses"] if case["method"] in rival_losses.METHODS]
LABELS = np.array([3, 0, 4, 1, 2, 3])
LOGITS = {
    "kd": losses.kd,
    "dkd": lambda s, t, where=None: losses.dkd(s, t, LABELS[: len(s)], where=where),
    "nkd": lambda s, t, where=None: losses.nkd(s, t, LABELS[: len(s)], where=where),
    "dist": losses.dist,
    "standardized": lambda s, t, where=None: losses.kd(
        losses.logit_standardization(s), losses.logit_standardization(t), where=where
    ),
}
VECTORS = {"rkd": losses.rkd, "pkt": losses.pkt}
MAPS = {
    "at": losses.attention_transfer,
    "sp": losses.similarity_preserving,
    "ickd": losses.ickd,
    "hcl": hierarchical_context_loss,
    "catkd": losses.class_attention,
    "catkd, normalised": functools.partial(losses.class_attention, normalize=True),
}
ALL = {
    **{n: (f, (6, 5)) for n, f in (LOGITS | VECTORS).items()},
    **{n: (f, (6, 4, 4, 5)) for n, f in MAPS.items()},
}
# Each is compiled once for all tests: operation by operation, a single gradient would take longer.
MEASURED = {name: (jax.jit(jax.value_and_grad(loss)), shape) for name, (loss, shape) in ALL.items()}
BETWEEN_IMAGES = ("dist", "rkd", "pkt", "sp")


def drawn(shape, seed=0, dtype=None):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(params=ALL)
def measured(request):
    return MEASURED[request.param]


@pytest.mark.parametrize("case", HERE, ids=lambda case: case["id"])
def test_values_parts_and_gradients_are_those_recorded_of_the_authors_code(case, x64):
    assert broken(list(rival_losses.claims({"losses": [case]}))) == []


def test_what_was_recorded_of_other_methods_is_named():
    (claim,) = rival_losses.claims({"losses": [{"id": "x/0", "method": "X"}]})
    assert "X is not here" in claim.claim


@pytest.mark.parametrize("name", [name for name in ALL if name != "nkd"])
def test_where_student_equals_teacher_it_is_zero_and_so_is_its_gradient(name, x64):
    measure, shape = MEASURED[name]
    x = drawn(shape)
    value, gradient = measure(x, x)
    # DIST and PKT add small numbers to what they divide by, DIST to the tiny norms of soft predictions.
    bound = 1e-3 if name == "dist" else 1e-7
    assert abs(value) < bound
    assert jnp.abs(gradient).max() < bound


def test_nkd_of_the_other_classes_is_least_where_student_equals_teacher(x64):
    teacher = drawn((6, 5))
    both, label = (
        jax.grad(lambda s, gamma=gamma: losses.nkd(s, teacher, LABELS, gamma=gamma))(teacher)
        for gamma in (1.0, 0.0)
    )
    np.testing.assert_allclose(both, label, atol=1e-15)


def test_padding_changes_neither_value_nor_gradient(measured, x64):
    measure, shape = measured
    student, teacher = drawn(shape, 1), drawn(shape, 2)
    where = jnp.arange(6) < 4
    value, gradient = measure(student, teacher, where=where)
    alone, of_alone = measure(student[:4], teacher[:4])
    np.testing.assert_allclose(value, alone, rtol=1e-12)
    np.testing.assert_allclose(gradient[:4], of_alone, rtol=1e-10, atol=1e-14)
    np.testing.assert_array_equal(gradient[4:], 0)


@pytest.mark.parametrize("fill", ["equal rows", "zeros", "far apart"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nothing_is_nan_at_the_edges_and_the_loss_is_float32(measured, fill, dtype):
    measure, shape = measured
    student, teacher = drawn(shape, 1, dtype), drawn(shape, 2, dtype)
    if fill == "equal rows":
        student = jnp.broadcast_to(student[:1], shape)
    elif fill == "zeros":
        student, teacher = jnp.zeros_like(student), jnp.zeros_like(teacher)
    else:
        student, teacher = (jnp.where(x > 0, 1e4, -1e4).astype(dtype) for x in (student, teacher))
    value, gradient = measure(student, teacher)
    assert value.dtype == jnp.float32
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient.astype(jnp.float32)).all()


@pytest.mark.parametrize("name", BETWEEN_IMAGES)
def test_images_on_eight_devices_are_compared_with_those_of_all(name, x64):
    measure, shape = MEASURED[name]
    shape = (16, *shape[1:])
    student, teacher = drawn(shape, 1), drawn(shape, 2)
    alone = measure(student, teacher)
    mesh = Mesh(jax.devices(), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    split = measure(*jax.device_put((student, teacher), rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), split, alone)


def test_dist_has_a_gradient_where_a_class_is_improbable_in_every_image():
    student, teacher = (3 * drawn((16, 100), seed, jnp.float32) for seed in (1, 2))
    student, teacher = (x.at[:, 0].add(-25) for x in (student, teacher))
    gradient = jax.jit(jax.grad(lambda s: losses.dist(s, teacher, temperature=1.0)))(student)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "dist"])
@pytest.mark.parametrize("shape", [(6, 4), (1, 5), (6, 1), (6, 2, 5)])
def test_logits_of_two_shapes_are_refused_not_broadcast(name, shape, unchecked):
    loss, _ = ALL[name]
    with pytest.raises(ValueError, match="student and teacher logits do not have one shape"):
        loss(drawn((6, 5)), drawn(shape))


@pytest.mark.parametrize("name", ["dist", "rkd", "pkt", "at", "sp", "ickd", "catkd"])
def test_a_teacher_s_taps_of_fewer_images_are_refused_not_broadcast(name, unchecked):
    loss, shape = ALL[name]
    with pytest.raises(ValueError, match=r"and 1 of the teacher cannot be compared|do not have one shape"):
        loss(drawn(shape), drawn((1, *shape[1:])))


@pytest.mark.parametrize("loss", [losses.dkd, losses.nkd])
def test_labels_of_other_images_are_refused(loss, unchecked):
    with pytest.raises(ValueError, match=r"with labels \[batch\] \(1,\)"):
        loss(drawn((6, 5)), drawn((6, 5)), LABELS[:1])


def test_correlation_congruence_on_eight_devices_is_that_of_one_with_its_gradients(x64):
    rngs = nnx.Rngs(0)
    loss = CorrelationCongruence(
        3, 4, student_tap="a", teacher_tap="a", features=7, dtype=jnp.float64, rngs=rngs
    )
    graph, params = nnx.split(loss)

    def value(params, student, teacher, batch):
        module = nnx.merge(graph, params, copy=True)
        return module(outputs(a=student), outputs(a=teacher), batch, train=True)

    of_all = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
    images = drawn((16, 3), 1), drawn((16, 4), 2), batch_of(16, 13)
    alone = of_all(params, *images)
    mesh = Mesh(jax.devices(), ("data",))
    everywhere, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    batch = jax.tree.map(lambda x: jax.device_put(x, rows), images)
    split = of_all(jax.device_put(params, everywhere), *batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), split, alone)


def test_the_gradient_to_the_teacher_of_those_between_images_is_exactly_zero_and_its_embedding_is_trained():
    taps = {"student_tap": "layer2", "teacher_tap": "layer2"}
    terms = {name: LOSSES[name](**taps) for name in ("rkd", "pkt")}
    terms |= {"dist": LOSSES["dist"](), "cc": CorrelationCongruence(8, 16, **taps, rngs=nnx.Rngs(2))}
    student, teacher = (View(Tiny(width, rngs=nnx.Rngs(width))) for width in (4, 8))
    distillation = Distillation(student, terms)
    graph, teacher = nnx.split(teacher)
    optimizer = optax.sgd(0.05)
    weights = dict.fromkeys(terms, 1.0)
    recipe = Recipe(
        nnx.graphdef(distillation), graph, True, weights, Classification(), optimizer, lambda step: 0.05
    )
    state = init_state(distillation, optimizer)
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    batch = Batch(image, np.arange(8) % 5, np.arange(8) < 7)

    def value(teacher):
        after, metrics = train_step(recipe, state, teacher, batch)
        return metrics["loss"], after

    gradient, after = jax.jit(jax.grad(value, has_aux=True))(teacher)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    assert all(jax.tree.leaves(moved))


def test_kd_and_dkd_compare_standardised_logits_where_they_are_told_to(x64):
    student, teacher = drawn((6, 5), 1), drawn((6, 5), 2)
    batch = batch_of(6)._replace(label=LABELS)
    ours, theirs = (losses.logit_standardization(x) for x in (student, teacher))
    for name, expected in (
        ("kd", losses.kd(ours, theirs, temperature=2.0)),
        ("dkd", losses.dkd(ours, theirs, LABELS, temperature=2.0)),
    ):
        loss = LOSSES[name](temperature=2.0, standardize=True)
        found = loss(Outputs(student, {}), Outputs(teacher, {}), batch, train=True)
        np.testing.assert_allclose(found.mean(), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "formula", "options"),
    [
        ("kd", losses.kd, {"temperature": 2.0}),
        ("dkd", losses.dkd, {"alpha": 2.0, "beta": 3.0, "temperature": 2.0}),
        ("nkd", losses.nkd, {"gamma": 2.0, "temperature": 2.0}),
        ("dist", losses.dist, {"beta": 2.0, "gamma": 3.0, "temperature": 2.0}),
        ("rkd", losses.rkd, {"distance": 2.0, "angle": 3.0}),
        ("catkd", losses.class_attention, {"resolution": 1, "normalize": True}),
    ],
)
def test_a_loss_of_a_config_is_its_formula_with_the_options_of_the_config(name, formula, options, x64):
    student, teacher = drawn(ALL[name][1], 1), drawn(ALL[name][1], 2)
    batch = batch_of(6)._replace(label=LABELS)
    shown = [Outputs(x, dict.fromkeys(("pooled", "class_maps"), x)) for x in (student, teacher)]
    found = LOSSES[name](**options)(*shown, batch, train=True)
    labels = (LABELS,) if name in ("dkd", "nkd") else ()
    np.testing.assert_allclose(found.mean(), formula(student, teacher, *labels, **options), rtol=1e-12)


def outputs(**taps):
    return Outputs(None, taps)


def batch_of(count, valid=None):
    where = np.arange(count) < (count if valid is None else valid)
    return Batch(np.zeros((count, 1, 1, 3), np.uint8), None, where)


def modules(dtype=jnp.float32):
    """Return each loss with parameters, and taps of a student and a teacher for it."""
    options = {"dtype": dtype, "rngs": nnx.Rngs(0)}
    maps = {"student_tap": "a", "teacher_tap": "a"}
    several = {"student_taps": ("a", "b"), "teacher_taps": ("a", "b")}
    student = {"a": drawn((6, 8, 8, 3), 1, dtype), "b": drawn((6, 4, 4, 5), 2, dtype)}
    teacher = {"a": drawn((6, 8, 8, 4), 3, dtype), "b": drawn((6, 2, 2, 6), 4, dtype)}
    levels = [Level(3, 4), Level(5, 6)]
    return {
        "cc": (CorrelationCongruence(3, 4, **maps, features=7, **options), student, teacher),
        "ickd": (ICKD(3, 4, **maps, **options), student, teacher),
        "vid": (VID([(3, 4), (5, 6)], **several, **options), student, teacher),
        "review": (Review(levels, **several, **options), student, teacher),
    }


@pytest.mark.parametrize("name", ["cc", "ickd", "vid", "review"])
def test_padding_is_left_out_of_the_losses_with_parameters_and_these_are_trained(name, x64):
    loss, student, teacher = modules(jnp.float64)[name]
    graph, params, rest = nnx.split(loss, nnx.Param, ...)

    def value(params, student, teacher, batch):
        module = nnx.merge(graph, params, rest, copy=True)
        found = module(outputs(**student), outputs(**teacher), batch, train=True)
        return jnp.mean(found, where=batch.where) if found.ndim else found

    measure = jax.jit(jax.value_and_grad(value))
    padded = measure(params, student, teacher, batch_of(6, 4))
    first = [{name: x[:4] for name, x in taps.items()} for taps in (student, teacher)]
    alone = measure(params, *first, batch_of(4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), padded, alone)
    norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(alone[1])]
    assert np.median(norms) > 0


@pytest.mark.parametrize("name", ["cc", "ickd", "vid", "review"])
def test_in_bfloat16_losses_with_parameters_are_float32_and_finite_at_zeros(name):
    loss, student, teacher = modules(jnp.bfloat16)[name]

    @nnx.jit
    def compare(loss, *taps):
        return loss(*(outputs(**x) for x in taps), batch_of(6), train=True)

    assert compare(loss, student, teacher).dtype == jnp.float32
    zeros = [jax.tree.map(jnp.zeros_like, taps) for taps in (student, teacher)]
    assert jnp.isfinite(compare(loss, *zeros)).all()


@pytest.mark.parametrize("name", ["at", "vid", "review"])
def test_taps_that_are_no_pairs_are_counted(name):
    options = {"student_taps": ("a", "b"), "teacher_taps": ("a",)}
    with pytest.raises(ValueError, match=r"pair by pair, and are 2 \(a, b\) and 1 \(a\)"):
        LOSSES[name].build(
            outputs(), outputs(), **options, dtype=jnp.float32, bn_group=None, rngs=nnx.Rngs(0)
        )


def test_a_config_that_names_no_taps_has_those_of_the_loss():
    config = base.base()
    with config.unlocked():
        config.losses = {"rkd": {"weight": 1.0}, "at": {"weight": 1.0, "student_taps": ("layer1",)}}
    at, rkd = terms_of(config.losses)  # as a config sorts them
    assert (rkd.options["student_tap"], rkd.options["teacher_tap"]) == ("pooled", "pooled")
    assert (at.options["student_taps"], at.options["teacher_taps"][0]) == (("layer1",), "stage1")
