"""The TaT loss of patch groups and anchors agrees with the published segmentation code and its formulas."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from proofs.fidelity import segmentation
from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.losses import anchor_loss, patch_group_loss, tat, tat_blocks, tat_loss
from tat_jax.losses.patches import PatchAnchor
from tat_jax.networks.view import Outputs
from tests.claims import broken
from tests.test_tat import maps


def test_losses_and_gradients_are_those_of_the_published_code():
    claims = segmentation.claims()
    assert len(claims) == 6 * len(segmentation.recorded())
    assert broken(claims) == []


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
    (found,) = jax.jit(functools.partial(loss, **how))(student, teacher, student, teacher)
    assert found == pytest.approx(expected, abs=5e-10)


def test_the_teacher_may_ask(x64):
    student, teacher = waves(1)
    four = teacher, student, student, teacher
    assert patch_group_loss(*four, patches=(4, 4), groups=4)[0] == pytest.approx(0.782308984, abs=5e-10)
    assert anchor_loss(*four, anchors=(4, 4))[0] == pytest.approx(0.125342758, abs=5e-10)


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


@nnx.jit
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

    @nnx.jit
    @functools.partial(nnx.grad, argnums=(0, 1))
    def gradients(term, student):
        return compare(term, student, teacher).sum()

    of_term, by_student = gradients(term_of_waves(), student)
    measured = {name: of_term[name]["conv"]["kernel"][...] for name in ("key", "query", "value")}
    measured["student"] = by_student
    recorded = {"student": 0.278710932, "key": 0.038786379, "query": 0.075026018, "value": 0.138811566}
    for name, norm in recorded.items():
        assert np.linalg.norm(measured[name]) == pytest.approx(norm, abs=5e-10)


def test_statistics_over_the_batch_are_the_other_choice(x64):
    student, teacher = waves(2)
    found = compare(term_of_waves(statistics="batch"), student, teacher)
    # Recorded as one call with one normalisation over both images.
    assert found.mean() == pytest.approx(1.551210959, abs=5e-10)


def one_group(query, key, value, target):
    """Return the mean squared error of one group's tokens, [tokens, depth] in NumPy."""
    weights = np.exp(query @ key.T)
    return np.mean((weights / weights.sum(1, keepdims=True) @ value - target) ** 2)


# 17 positions in six patches are eight of two; 18 patches along the width of 90.
@pytest.mark.parametrize(
    ("grid", "patches", "cut"),
    [((17, 7), (6, 3), (8, 3)), ((4, 90), (2, 16), (2, 18)), ((5, 5), (5, 1), (5, 1))],
)
def test_groups_are_of_consecutive_patches_row_by_row(grid, patches, cut, x64):
    arrays = maps(1, *grid, 2, count=4, dtype=np.float64)
    count, (p, q) = cut[0] * cut[1], (grid[0] // patches[0], grid[1] // patches[1])
    groups = count // (2 if count % 2 == 0 else 1)
    (found,) = patch_group_loss(*arrays, patches=patches, groups=groups)
    boxes = [(r * p, s * q) for r in range(cut[0]) for s in range(cut[1])]
    expected = []
    for group in np.array_split(np.arange(count), groups):
        tokens = [
            np.concatenate(
                [x[0, y : y + p, z : z + q].reshape(p * q, 2) for y, z in map(boxes.__getitem__, group)], 1
            )
            for x in map(np.asarray, arrays)
        ]
        expected.append(one_group(*tokens))
    assert found == pytest.approx(np.mean(expected), rel=1e-12)


def test_one_patch_is_the_whole_map_and_so_are_anchors_at_every_position(x64):
    arrays = maps(1, 5, 7, 4, count=4, dtype=np.float64)
    expected = float(tat_loss(*arrays))
    assert patch_group_loss(*arrays, patches=(1, 1), groups=1)[0] == pytest.approx(expected, rel=1e-12)
    assert anchor_loss(*arrays, anchors=(5, 7))[0] == pytest.approx(expected, rel=1e-12)


def test_many_anchors_are_taken_in_blocks_of_queries(monkeypatch, x64):
    arrays = maps(2, 9, 8, 4, count=4, dtype=np.float64)
    expected = anchor_loss(*arrays, anchors=(4, 4))
    for module, name in ((tat, "SCORES"), (tat_blocks, "SCORES"), (tat_blocks, "LARGEST")):
        monkeypatch.setattr(module, name, 3 * 16)
    np.testing.assert_allclose(anchor_loss(*arrays, anchors=(4, 4)), expected, rtol=1e-12)


def test_bfloat16_maps_give_float32_losses():
    arrays = [x.astype(jnp.bfloat16) for x in maps(2, 8, 8, 8, count=4)]
    exact = [x.astype(jnp.float32) for x in arrays]
    for loss, how in (
        (patch_group_loss, {"patches": (2, 2), "groups": 2}),
        (anchor_loss, {"anchors": (4, 4)}),
    ):
        of_maps = jax.jit(functools.partial(loss, **how))
        found = of_maps(*arrays)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, of_maps(*exact), rtol=0.02)


def compiled(loss, shape, **how):
    x = jax.ShapeDtypeStruct(shape, np.float32)
    gradients = jax.jit(jax.value_and_grad(lambda *arrays: loss(*arrays, **how).sum(), (0, 1, 2)))
    return gradients.lower(x, x, x, x).compile()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere blocks are larger")
@pytest.mark.parametrize(
    ("loss", "how"),
    [
        (patch_group_loss, {"patches": (16, 16), "groups": 64}),
        (patch_group_loss, {"patches": (32, 32), "groups": 1, "form": "sum"}),
        (anchor_loss, {"anchors": (64, 64)}),
    ],
)
def test_memory_of_decoder_maps_is_that_of_some_maps_whatever_the_patches(loss, how):
    program = compiled(loss, (1, 129, 129, 32), **how)
    a_map = 4 * 129 * 129 * 32
    scores = 4 * 2**21
    assert program.memory_analysis().temp_size_in_bytes < 12 * a_map + 4 * scores
    assert "while" not in program.as_text() or loss is anchor_loss  # no loop over patches


def test_several_devices_send_nothing_but_sums():
    arrays = jax.device_put(maps(8, 6, 6, 4, count=4), sharding.batched(sharding.make_mesh()))
    for form in ("stack", "sum"):
        loss = jax.jit(
            jax.grad(lambda *x, form=form: patch_group_loss(*x, patches=(3, 2), groups=2, form=form).sum())
        )
        program = loss.lower(*arrays).compile().as_text()
        assert not re.search("all-gather|all-to-all|collective-permute", program)


def test_images_that_do_not_count_change_no_statistics():
    student, teacher = (x.astype(np.float32) for x in waves(3))
    where = jnp.array([True, False, True])
    padded, whole = (term_of_waves(dtype=jnp.float32) for _ in range(2))
    found = compare(padded, student, teacher, where)
    expected = compare(whole, student[::2], teacher[::2])
    np.testing.assert_allclose(found[::2], expected, rtol=1e-5)
    for name in ("mean", "var"):
        ours, theirs = (getattr(term.query.norm, name)[...] for term in (padded, whole))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_embeddings_start_as_published_and_the_key_may_be_the_teachers_map():
    shape = {
        "student_tap": "decoder",
        "teacher_tap": "decoder",
        "patches": (2, 2),
        "groups": 1,
        "anchors": (2, 2),
    }
    term = PatchAnchor((4, 4, 16), (4, 4, 256), **shape, rngs=nnx.Rngs(0))
    kernels = [term.query.conv.kernel, term.key.conv.kernel, term.value.conv.kernel]
    assert [kernel.shape[2:] for kernel in kernels] == [(16, 256), (256, 256), (16, 256)]
    for kernel in kernels:
        bound = kernel.shape[2] ** -0.5
        assert 0.95 * bound < jnp.abs(kernel[...]).max() <= bound
    assert PatchAnchor((4, 4, 16), (4, 4, 256), trainable_key=False, **shape, rngs=nnx.Rngs(0)).key is None


@pytest.mark.parametrize(
    ("weights", "expected"), [((1.0, 0.0), 0), ((0.0, 1.0), 1), ((2.0, 0.5), (2.0, 0.5))]
)
def test_the_two_losses_are_weighted(weights, expected, x64):
    student, teacher = waves(2)

    def found(beta, gamma):
        return compare(term_of_waves(patch_weight=beta, anchor_weight=gamma), student, teacher)

    alone = found(1.0, 0.0), found(0.0, 1.0)
    total = sum(w * loss for w, loss in zip(weights, alone, strict=True))
    np.testing.assert_allclose(found(*weights), total, rtol=1e-12)


def shapes(student, teacher):
    return [
        Outputs(None, {"decoder": jax.ShapeDtypeStruct((1, *shape), np.float32)})
        for shape in (student, teacher)
    ]


@pytest.mark.parametrize(
    ("student", "options", "message"),
    [
        (
            (9, 12, 4),
            {"patches": (16, 16)},
            r"patches=\(16, 16\) are not from 1 to the 9×12 positions of the map",
        ),
        (
            (9, 12, 4),
            {"anchors": (9, 13)},
            r"anchors=\(9, 13\) are not from 1 to the 9×12 positions of the map",
        ),
        ((90, 120, 4), {"groups": 64}, "groups=64 does not divide 306 patches of 7 channels"),
        ((9, 12, 4), {"form": "batch", "groups": 3}, "groups=3 does not divide 7 channels"),
        ((9, 12, 4), {"patch_weight": 0.0, "anchor_weight": 0.0}, "are both 0"),
        (
            (9, 14, 4),
            {"asks": "teacher", "patches": (1, 5)},
            r"into \(1, 6\), and that of 9×14 .* into \(1, 7\)",
        ),
    ],
)
def test_what_does_not_fit_the_maps_is_said_before_anything_is_computed(student, options, message):
    options = {"patches": (3, 3), "groups": 1, "anchors": (3, 3)} | options
    if "groups" in options and options["groups"] == 64:
        options |= {"patches": (16, 16)}
    taps = {"student_tap": "decoder", "teacher_tap": "decoder", "dtype": np.float32, "bn_group": None}
    teacher = (*student[:2], 7) if options.get("asks") != "teacher" else (9, 12, 7)
    with pytest.raises(ValueError, match=message):
        PatchAnchor.build(*shapes(student, teacher), **taps, **options, rngs=nnx.Rngs(0))


def test_the_teacher_may_ask_a_student_of_another_grid():
    taps = {"student_tap": "decoder", "teacher_tap": "decoder", "dtype": np.float32, "bn_group": None}
    how = {"patches": (2, 2), "groups": 2, "anchors": (2, 3), "asks": "teacher"}
    grids = (4, 6, 3), (9, 8, 5)
    term = PatchAnchor.build(*shapes(*grids), **taps, **how, rngs=nnx.Rngs(0))
    student, teacher = (maps(2, *grid, count=1)[0] for grid in grids)
    assert compare(term, student, teacher).shape == (2,)


def test_maps_that_do_not_fit_together_are_named(unchecked):
    query, key, value = maps(2, 4, 4, 8)
    for loss, how in (
        (patch_group_loss, {"patches": (2, 2), "groups": 1}),
        (anchor_loss, {"anchors": (2, 2)}),
    ):
        with pytest.raises(ValueError, match=r"query and key .* channels: \(2, 4, 4, 6\) and \(2, 4, 4, 8\)"):
            loss(query[..., 2:], key, value, key, **how)
