"""Target-aware attention and its loss agree with the published code and with their algebra."""

import functools
import json
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.losses import target_aware_attention, tat, tat_blocks, tat_fused, tat_loss
from tat_jax.losses.patches import PatchAnchor
from tat_jax.losses.tat import TargetAwareTransformer
from tat_jax.networks.view import Outputs

GOLDEN = json.loads((Path(__file__).parent / "golden" / "published_code.json").read_text())["tat"]


def draw(name, shape, scale=1.0):
    nchw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * scale
    return jnp.asarray(rearrange(nchw, "b c h w -> b h w c"))


def maps(*shape, count=3, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape).astype(dtype)) for _ in range(count)]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["id"])
def test_loss_and_gradients_are_those_of_the_published_code(case, x64):
    shape, scale = case["shape_nchw"], case["scale_qk"]
    query, key = (draw(f"{case['id']}/{name}", shape, scale) for name in "qk")
    value, target = (draw(f"{case['id']}/{name}", shape) for name in "vt")
    loss, (by_query, by_key, by_value) = jax.value_and_grad(tat_loss, (0, 1, 2))(
        query, key, value, target, heads=case["heads"]
    )
    assert loss == pytest.approx(case["loss"], rel=1e-10)
    for name, gradient in (("q", by_query), ("k", by_key), ("v", by_value)):
        assert np.linalg.norm(gradient) == pytest.approx(case[f"grad_{name}_norm"], rel=1e-10)
    for name, gradient in (("q", by_query), ("v", by_value)):
        nchw = rearrange(gradient, "b h w c -> b c h w")
        np.testing.assert_allclose(nchw.ravel()[:8], case[f"grad_{name}_first8"], rtol=1e-10)


# One position, a row, a column, a map that is not square. Few shapes, so that few programs are compiled.
CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "shape": st.sampled_from([(2, 1, 1, 8), (1, 1, 4, 8), (2, 5, 1, 8), (2, 3, 4, 8)]),
        "heads": st.sampled_from([1, 4]),
    }
)
properties = settings(max_examples=30, deadline=None)
attention = jax.jit(target_aware_attention, static_argnames="heads")
loss_and_gradients = jax.jit(jax.value_and_grad(tat_loss, (0, 1, 2, 3)), static_argnames="heads")


def drawn(case, count=3, dtype=np.float32):
    return maps(*case["shape"], count=count, seed=case["seed"], dtype=dtype), case["heads"]


def permuted(x, order):
    """Reorder the positions of a map."""
    _, height, width, _ = x.shape
    flat = rearrange(x, "b h w c -> b (h w) c")
    return rearrange(flat[:, order], "b (h w) c -> b h w c", h=height, w=width)


def some_order(case):
    _, height, width, _ = case["shape"]
    return np.random.default_rng(case["seed"]).permutation(height * width)


@given(CASES)
@properties
def test_permuting_query_positions_permutes_the_output(case):
    (query, key, value), heads = drawn(case)
    order = some_order(case)
    out = attention(query, key, value, heads=heads)
    again = attention(permuted(query, order), key, value, heads=heads)
    np.testing.assert_allclose(again, permuted(out, order), atol=1e-5)


@given(CASES)
@properties
def test_permuting_key_and_value_positions_together_changes_nothing(case):
    (query, key, value), heads = drawn(case)
    order = some_order(case)
    out = attention(query, key, value, heads=heads)
    again = attention(query, permuted(key, order), permuted(value, order), heads=heads)
    np.testing.assert_allclose(again, out, atol=1e-5)


@given(CASES)
@properties
def test_the_channels_of_a_head_have_no_order_and_heads_do_not_mix(case):
    (query, key, value), heads = drawn(case)
    rng = np.random.default_rng(case["seed"])
    d = 8 // heads
    # A permutation of heads, and within each one of its channels: for query and key another than for value.
    blocks = rng.permutation(heads)
    of_scores, of_values = (np.concatenate([n * d + rng.permutation(d) for n in blocks]) for _ in range(2))
    out = attention(query, key, value, heads=heads)
    again = attention(query[..., of_scores], key[..., of_scores], value[..., of_values], heads=heads)
    np.testing.assert_allclose(again, out[..., of_values], atol=1e-5)


@given(CASES)
@properties
def test_each_head_is_an_attention_of_its_own(case):
    (query, key, value), heads = drawn(case)
    out = attention(query, key, value, heads=heads)
    parts = [jnp.split(x, heads, axis=-1) for x in (query, key, value)]
    alone = [attention(*part) for part in zip(*parts, strict=True)]
    np.testing.assert_allclose(out, jnp.concatenate(alone, -1), atol=1e-5)


@given(CASES, st.floats(0.1, 10))
@properties
def test_scaling_the_value_scales_the_output_and_query_and_key_scale_alike(case, factor):
    (query, key, value), heads = drawn(case)
    out = attention(query, key, value, heads=heads)
    scaled = attention(query, key, factor * value, heads=heads)
    np.testing.assert_allclose(scaled, factor * out, rtol=1e-4, atol=1e-5)
    by_query, by_key = (
        attention(factor * query, key, value, heads=heads),
        attention(query, factor * key, value, heads=heads),
    )
    # Scores reach some hundreds here, whose rounding in float32 is 1e-5.
    np.testing.assert_allclose(by_query, by_key, atol=1e-3)


@given(CASES)
@properties
def test_a_vector_added_to_every_key_changes_nothing(case):
    (query, key, value), heads = drawn(case)
    out = attention(query, key, value, heads=heads)
    shift = np.random.default_rng(case["seed"]).normal(size=(1, 1, 1, 8)).astype(np.float32)
    np.testing.assert_allclose(attention(query, key + shift, value, heads=heads), out, atol=1e-4)


@given(CASES)
@properties
def test_the_output_lies_between_the_values(case):
    (query, key, value), heads = drawn(case)
    out = attention(query, key, value, heads=heads)
    assert (out <= value.max((1, 2), keepdims=True) + 1e-5).all()
    assert (out >= value.min((1, 2), keepdims=True) - 1e-5).all()


@given(CASES)
@properties
def test_height_and_width_may_change_places(case):
    (query, key, value), heads = drawn(case)
    out = attention(query, key, value, heads=heads)
    turned = [rearrange(x, "b h w c -> b w h c") for x in (query, key, value)]
    again = attention(*turned, heads=heads)
    np.testing.assert_allclose(again, rearrange(out, "b h w c -> b w h c"), atol=1e-5)


@given(CASES)
@properties
def test_gradients_are_those_of_finite_differences(case):
    with jax.enable_x64(True):
        arrays, heads = drawn(case, count=4, dtype=np.float64)
        directions = maps(*case["shape"], count=4, seed=case["seed"] ^ 1, dtype=np.float64)

        def along(t):
            return loss_and_gradients(
                *(x + t * d for x, d in zip(arrays, directions, strict=True)), heads=heads
            )

        h = 1e-5
        slope = (along(h)[0] - along(-h)[0]) / (2 * h)
        _, gradients = along(0.0)
        gradient = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        # Central differences in float64 are good to h² = 1e-10 times a third derivative of some thousands.
        assert gradient == pytest.approx(float(slope), rel=1e-5, abs=1e-6)


@given(CASES, st.sampled_from([jnp.float32, jnp.bfloat16]))
@properties
def test_scores_of_1e4_and_more_pick_one_value_and_stay_finite(case, dtype):
    (query, key, value), heads = drawn(case)
    query, key = ((1e4 * jnp.sign(x)).astype(dtype) for x in (query, key))
    out = attention(query, key, value.astype(dtype), heads=heads)
    assert jnp.isfinite(out).all()
    loss, gradients = loss_and_gradients(query, key, value.astype(dtype), value, heads=heads)
    assert loss.dtype == jnp.float32
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


def test_one_position_returns_the_value():
    query, key, value = maps(2, 1, 1, 8)
    np.testing.assert_array_equal(target_aware_attention(query, key, value, heads=2), value)


def test_bfloat16_maps_give_a_float32_loss():
    query, key, value = (x.astype(jnp.bfloat16) for x in maps(2, 3, 4, 8))
    assert tat_loss(query, key, value, key).dtype == jnp.float32


def test_images_that_do_not_count_change_nothing():
    query, key, value = maps(4, 2, 3, 8)
    where = jnp.array([True, True, True, False])
    part = tat_loss(query[:3], key[:3], value[:3], key[:3])
    np.testing.assert_allclose(tat_loss(query, key, value, key, where=where), part, rtol=1e-6)


@pytest.fixture(params=[1, 5, 11])
def in_blocks(request, monkeypatch):
    """Take maps of 3×4 positions in blocks of so many queries; of 5 and 11, the last block is short."""
    for module in (tat, tat_blocks):
        monkeypatch.setattr(module, "SCORES", 12 * request.param)
    monkeypatch.setattr(tat_blocks, "LARGEST", 12 * request.param)
    monkeypatch.setattr(tat_fused, "fits", lambda *maps, heads: False)


# Of bfloat16, eight roundings of 2⁻⁸: a CPU's gradients are off by 0.015 at most, a GPU's by 0.021.
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-13), (np.float32, 1e-5), (jnp.bfloat16, 0.03)]
)
def test_blocks_of_queries_give_the_loss_and_the_gradients_of_all_at_once(
    dtype, tolerance, heads, in_blocks, x64
):
    exact = maps(2, 3, 4, 8, count=4, dtype=np.float64)
    rounded = [x.astype(dtype) for x in exact]
    expected = dense_loss_and_gradients(*(x.astype(np.float64) for x in rounded), heads=heads)
    measured = jax.value_and_grad(tat_loss, (0, 1, 2, 3))(*rounded, heads=heads)
    for ours, reference in zip(jax.tree.leaves(measured), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - reference)
        assert error <= tolerance * np.linalg.norm(reference)


def dense_loss_and_gradients(*arrays, heads):
    def loss(query, key, value, target):
        return jnp.mean((target_aware_attention(query, key, value, heads=heads) - target) ** 2)

    return jax.value_and_grad(loss, (0, 1, 2, 3))(*arrays)


# The grid that asks, and the one that answers.
GRIDS = [((3, 4), (2, 3)), ((2, 3), (5, 4)), ((1, 1), (3, 4)), ((3, 4), (1, 1))]


def two_grids(asking, answering, *, depth=4, channels=6):
    """Return query, key, value and target of two images in float64."""
    shapes = [(*asking, depth), (*answering, depth), (*answering, channels), (*asking, channels)]
    return [maps(2, *shape, count=1, seed=i, dtype=np.float64)[0] for i, shape in enumerate(shapes)]


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3))
def by_formula(query, key, value, target):
    """Return the loss of two heads with its gradients, head by head and image by image."""
    total = 0.0
    for image in range(len(query)):
        for head in range(2):
            q, k, v, t = (
                x[image].reshape(-1, 2, x.shape[-1] // 2)[:, head] for x in (query, key, value, target)
            )
            weights = jnp.exp(q @ k.T)
            total += (((weights / weights.sum(1, keepdims=True)) @ v - t) ** 2).sum()
    return total / target.size


def assert_by_formula(measure, arrays, tolerance=1e-12):
    expected, measured = by_formula(*arrays), measure(*arrays, heads=2)
    for ours, reference in zip(jax.tree.leaves(measured), jax.tree.leaves(expected), strict=True):
        assert ours.shape == reference.shape
        np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * (1 + np.abs(reference).max()))


@pytest.mark.parametrize(("asking", "answering"), GRIDS)
def test_the_positions_that_ask_and_those_that_answer_may_lie_in_two_grids(asking, answering, x64):
    assert_by_formula(loss_and_gradients, two_grids(asking, answering))


@pytest.mark.parametrize(("asking", "answering"), GRIDS)
def test_blocks_take_maps_of_two_grids(asking, answering, monkeypatch, x64):
    for module, name in ((tat, "SCORES"), (tat_blocks, "SCORES"), (tat_blocks, "LARGEST")):
        monkeypatch.setattr(module, name, 1)  # a query a block
    assert_by_formula(jax.value_and_grad(tat_loss, (0, 1, 2, 3)), two_grids(asking, answering))


NO_CUDNN = pytest.mark.skipif(tat_fused._capability() < 8, reason="there is no GPU that has it")


@pytest.mark.parametrize(
    ("implementation", "dtype", "tolerance"),
    [("xla", np.float32, 1e-5), pytest.param("cudnn", jnp.bfloat16, 0.03, marks=NO_CUDNN)],
)
def test_the_fused_form_takes_maps_of_two_grids(implementation, dtype, tolerance):
    with jax.enable_x64(True):
        arrays = two_grids((3, 4), (5, 7), depth=16, channels=16)
        expected = jax.tree.map(np.asarray, by_formula(*arrays))
        arrays = [x.astype(dtype) for x in arrays]

    def fused(*maps):
        errors = tat_fused.errors_fused(*maps, heads=2, implementation=implementation)
        return jnp.mean(errors) / maps[3][0].size

    measured = jax.jit(jax.value_and_grad(fused, (0, 1, 2, 3)))(*arrays)
    for ours, reference in zip(jax.tree.leaves(measured), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(np.asarray(ours, np.float64) - reference) <= tolerance * np.linalg.norm(
            reference
        )


def test_values_of_other_channels_than_the_keys_are_not_fused(monkeypatch):
    monkeypatch.setattr(tat_fused, "_capability", lambda: 9.0)
    query, value = (jnp.zeros((1, 2, 2, channels), jnp.bfloat16) for channels in (64, 128))
    assert tat_fused.fits(query, query, query, heads=1)
    assert not tat_fused.fits(query, query, value, heads=1)


def test_blocks_keep_out_images_that_do_not_count(in_blocks):
    query, key, value = maps(4, 3, 4, 8)
    where = jnp.array([True, True, True, False])
    gradients = jax.grad(tat_loss, (0, 1, 2))(query, key, value, key, where=where)
    part = jax.grad(tat_loss, (0, 1, 2))(query[:3], key[:3], value[:3], key[:3])
    for gradient, expected in zip(gradients, part, strict=True):
        np.testing.assert_allclose(gradient[:3], expected, rtol=1e-5, atol=1e-8)
        np.testing.assert_array_equal(gradient[3:], 0)


def test_blocks_without_gradient_give_the_same_loss(in_blocks):
    query, key, value = maps(2, 3, 4, 8)
    expected, _ = jax.value_and_grad(tat_loss)(query, key, value, key)
    np.testing.assert_allclose(jax.jit(tat_loss)(query, key, value, key), expected, rtol=1e-6)


def test_blocks_on_eight_devices_send_nothing_but_sums(in_blocks):
    mesh = sharding.make_mesh()
    arrays = maps(8, 3, 4, 8, count=4)
    gradients = jax.jit(jax.value_and_grad(tat_loss, (0, 2)))
    split = jax.device_put(arrays, sharding.batched(mesh))
    program = gradients.lower(*split).compile().as_text()
    assert not re.search("all-gather|all-to-all|collective-permute", program)
    for sharded, whole in zip(
        jax.tree.leaves(gradients(*split)), jax.tree.leaves(gradients(*arrays)), strict=True
    ):
        np.testing.assert_allclose(sharded, whole, rtol=1e-5, atol=1e-7)


def memory(positions, channels):
    """Return the bytes that loss and gradients of one image need besides arguments and results."""
    shape = jax.ShapeDtypeStruct((1, 1, positions, channels), np.float32)
    step = jax.jit(jax.value_and_grad(tat_loss, (0, 1, 2)))
    return step.lower(shape, shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere blocks are larger")
def test_memory_of_segmentation_sized_maps_grows_linearly_with_positions():
    # Eight times the positions would be 64 times the scores, 3 GiB with their gradient.
    assert memory(16_641, 256) <= 160 * 2**20
    assert memory(16_641, 256) <= 8 * memory(16_641 // 8, 256)


def test_shapes_and_heads_that_do_not_fit_are_named(unchecked):
    query, key, value = maps(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"key and value .*\(2, 3, 3, 8\) and \(2, 3, 4, 8\)"):
        target_aware_attention(query, key[:, :, 1:], value)
    with pytest.raises(ValueError, match=r"query and key .* channels: \(2, 3, 4, 6\) and \(2, 3, 4, 8\)"):
        target_aware_attention(query[..., 2:], key, value)
    with pytest.raises(ValueError, match=r"value and target .* channels: \(2, 3, 4, 6\) and \(2, 3, 4, 8\)"):
        tat_loss(query, key, value[..., 2:], key)
    with pytest.raises(ValueError, match=r"query and key .* images: \(1, 3, 4, 8\) and \(2, 3, 4, 8\)"):
        target_aware_attention(query[:1], key, value)
    with pytest.raises(ValueError, match="key is no map"):
        target_aware_attention(query, key[0, 0], value)
    with pytest.raises(ValueError, match=r"query and target .*\(2, 3, 4, 8\) and \(1, 3, 4, 8\)"):
        tat_loss(query, key, value, key[:1])
    with pytest.raises(ValueError, match=r"heads=3 does not divide channels=8"):
        target_aware_attention(query, key, value, heads=3)


def compare(module, student, teacher):
    """Return the loss of the taps of a batch."""
    outputs = (Outputs(None, {"layer4": tap}) for tap in (student, teacher))
    count = len(student)
    batch = Batch(jnp.zeros((count, 1, 1, 3)), None, jnp.ones(count, bool))
    return module(*outputs, batch).mean()


def test_taps_of_other_height_and_width_are_named(unchecked):
    student, teacher = jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 7, 7, 8))
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and \(2, 7, 7\)"):
        compare(TargetAwareTransformer(8, 8, rngs=nnx.Rngs(0)), student, teacher)


def test_the_teacher_may_ask_a_student_of_another_grid(x64):
    student, teacher = (maps(2, *grid, 4, count=1, dtype=np.float64)[0] for grid in ((2, 3), (5, 4)))
    how = {"embedding_kernel": 0, "dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    found = compare(TargetAwareTransformer(4, 4, asks="teacher", **how), student, teacher)
    expected, _ = by_formula(teacher, student, student, teacher)
    assert expected != pytest.approx(float(found))  # of two heads
    found = compare(TargetAwareTransformer(4, 4, asks="teacher", heads=2, **how), student, teacher)
    assert expected == pytest.approx(float(found), rel=1e-12)


def test_a_student_of_another_grid_is_told_who_may_ask():
    shapes = [
        Outputs(None, {"decoder": jax.ShapeDtypeStruct((1, *shape), np.float32)})
        for shape in ((33, 33, 4), (65, 65, 8))
    ]
    how = {"student_tap": "decoder", "teacher_tap": "decoder", "dtype": np.float32, "bn_group": None}
    for loss in (TargetAwareTransformer, PatchAnchor):
        with pytest.raises(ValueError, match=r"\[33, 33\], the teacher's \[65, 65\]; with asks='teacher'"):
            loss.build(*shapes, **how, rngs=nnx.Rngs(0))
    TargetAwareTransformer.build(*shapes, asks="teacher", **how, rngs=nnx.Rngs(0))


def test_embeddings_start_as_pytorch_starts_them():
    embedding = TargetAwareTransformer(64, 128, rngs=nnx.Rngs(0)).query
    kernel = embedding.conv.kernel[...]
    bound = (64 * 9) ** -0.5
    assert kernel.shape == (3, 3, 64, 128)
    assert embedding.conv.bias is None
    assert jnp.abs(kernel).max() <= bound
    # The standard deviation of 73,728 uniform draws; 2 % is eight standard errors.
    assert jnp.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_query_and_value_have_embeddings_of_their_own_and_the_key_one_on_request():
    fixed = TargetAwareTransformer(8, 8, rngs=nnx.Rngs(0))
    assert fixed.key is None
    assert not np.array_equal(fixed.query.conv.kernel[...], fixed.value.conv.kernel[...])
    student, teacher = maps(2, 4, 4, 8, count=2)
    trainable = TargetAwareTransformer(8, 8, trainable_key=True, rngs=nnx.Rngs(0))
    gradient = nnx.grad(lambda module: compare(module, student, teacher))(trainable)
    assert jnp.abs(gradient["key"]["conv"]["kernel"][...]).max() > 0


@pytest.mark.parametrize("kernel", [1, 3])
def test_embeddings_have_the_kernel_asked_for(kernel):
    module = TargetAwareTransformer(4, 8, embedding_kernel=kernel, trainable_key=True, rngs=nnx.Rngs(0))
    for embedding, features in ((module.query, 4), (module.value, 4), (module.key, 8)):
        assert embedding.conv.kernel.shape == (kernel, kernel, features, 8)


def test_without_embeddings_the_maps_themselves_attend():
    student, teacher = maps(2, 3, 4, 8, count=2)
    module = TargetAwareTransformer(8, 8, heads=2, embedding_kernel=0, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(module))
    expected = tat_loss(student, teacher, student, teacher, heads=2)
    np.testing.assert_allclose(compare(module, student, teacher), expected, rtol=1e-6)


def test_the_teacher_asking_is_the_formula_of_the_papers_text(x64):
    student, teacher = maps(1, 2, 3, 4, count=2, dtype=np.float64)
    module = TargetAwareTransformer(
        4, 4, embedding_kernel=0, asks="teacher", dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    of_student, of_teacher = (np.asarray(x).reshape(6, 4) for x in (student, teacher))
    error = 0.0
    for target in of_teacher:  # position by position, as the paper writes it
        weights = np.exp([s @ target for s in of_student])
        reconstruction = sum(w * s for w, s in zip(weights / weights.sum(), of_student, strict=True))
        error += ((reconstruction - target) ** 2).sum()
    assert compare(module, student, teacher) == pytest.approx(error / 24, rel=1e-12)
    assert compare(module, student, teacher) != pytest.approx(
        float(tat_loss(student, teacher, student, teacher))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads=3 does not divide the teacher's 16 channels"),
        ({"embedding_kernel": 2}, "embedding_kernel=2: it is 3, 1, or 0"),
        ({"embedding_kernel": 0}, "the student's has 8, the teacher's 16"),
        ({"embedding_kernel": 0, "trainable_key": True}, "trainable_key needs an embedding"),
        ({"asks": "both"}, "asks='both': allowed is 'student' or 'teacher'"),
        ({"scale": "sqrt"}, r"scale='sqrt': allowed is a number greater than 0, or '1/sqrt\(d\)'"),
        ({"scale": -1.0}, "scale=-1.0: allowed is a number greater than 0"),
        ({"target_norm": "l2"}, "target_norm='l2': allowed is 'position' or 'channel', or None"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        TargetAwareTransformer(8, 16, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("heads", [1, 2])
def test_the_fused_form_is_the_same_loss_with_the_same_gradients(heads):
    # Positions are no multiple of what cuDNN takes at once; XLA stands in for it.
    arrays = maps(2, 5, 7, 8, count=4)

    def fused(*maps):
        sums = tat_fused.errors_fused(*maps, heads=heads, implementation="xla")
        return jnp.mean(sums) / (5 * 7 * 8)

    loss, gradients = jax.value_and_grad(fused, (0, 1, 2, 3))(*arrays)
    reference, by_maps = loss_and_gradients(*arrays, heads=heads)
    np.testing.assert_allclose(loss, reference, rtol=1e-6)
    for ours, theirs in zip(gradients, by_maps, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize(
    ("capability", "channels", "heads", "dtype", "fits"),
    [
        (0.0, 128, 1, jnp.bfloat16, False),  # no GPU of NVIDIA's
        (7.5, 128, 1, jnp.float16, False),
        (8.0, 128, 1, jnp.bfloat16, True),
        (8.0, 256, 1, jnp.bfloat16, False),
        (8.0, 256, 2, jnp.float16, True),
        (9.0, 256, 1, jnp.bfloat16, True),
        (9.0, 12, 1, jnp.bfloat16, False),
        (9.0, 256, 1, np.float32, False),
    ],
)
def test_what_is_fused_depends_on_the_gpu_the_type_and_the_depth(
    capability, channels, heads, dtype, fits, monkeypatch
):
    monkeypatch.setattr(tat_fused, "_capability", lambda: capability)
    assert tat_fused.fits(*maps(1, 2, 2, channels, dtype=dtype), heads=heads) == fits
