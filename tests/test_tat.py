"""Target-aware attention and its loss agree with the published code and with their algebra."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from tat_jax.tat import TargetAwareTransformer, target_aware_attention, tat_loss

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


def test_permuting_query_positions_permutes_the_output():
    query, key, value = maps(2, 3, 4, 8)
    out = target_aware_attention(query, key, value, heads=2)
    flipped = target_aware_attention(query[:, ::-1], key, value, heads=2)
    np.testing.assert_allclose(flipped, out[:, ::-1], atol=1e-6)


def test_permuting_key_and_value_positions_together_changes_nothing():
    query, key, value = maps(2, 3, 4, 8)
    out = target_aware_attention(query, key, value, heads=4)
    same = target_aware_attention(query, key[:, :, ::-1], value[:, :, ::-1], heads=4)
    np.testing.assert_allclose(same, out, atol=1e-6)


def test_heads_attend_each_on_its_own_channels():
    query, key, value = maps(2, 3, 4, 8)
    out = target_aware_attention(query, key, value, heads=2)
    halves = [
        target_aware_attention(query[..., c], key[..., c], value[..., c]) for c in (np.s_[:4], np.s_[4:])
    ]
    np.testing.assert_allclose(out, jnp.concatenate(halves, -1), atol=1e-6)


def test_one_position_returns_the_value():
    query, key, value = maps(2, 1, 1, 8)
    np.testing.assert_array_equal(target_aware_attention(query, key, value, heads=2), value)


def test_extreme_scores_stay_finite():
    query, key, value = (1e2 * x for x in maps(1, 2, 2, 4))
    out, gradient = jax.value_and_grad(lambda q: tat_loss(q, key, value, value))(query)
    assert jnp.isfinite(out)
    assert jnp.isfinite(gradient).all()


def test_bfloat16_maps_give_a_float32_loss():
    query, key, value = (x.astype(jnp.bfloat16) for x in maps(2, 3, 4, 8))
    assert tat_loss(query, key, value, key).dtype == jnp.float32


def test_images_that_do_not_count_change_nothing():
    query, key, value = maps(4, 2, 3, 8)
    where = jnp.array([True, True, True, False])
    part = tat_loss(query[:3], key[:3], value[:3], key[:3])
    np.testing.assert_allclose(tat_loss(query, key, value, key, where=where), part, rtol=1e-6)


def test_shapes_and_heads_that_do_not_fit_are_named():
    query, key, value = maps(2, 3, 4, 8)
    with pytest.raises(ValueError, match=r"query and key .*\(2, 3, 4, 8\) and \(2, 3, 3, 8\)"):
        target_aware_attention(query, key[:, :, 1:], value)
    with pytest.raises(ValueError, match=r"query and value .*\(2, 3, 4, 8\) and \(2, 3, 4, 6\)"):
        target_aware_attention(query, key, value[..., 2:])
    with pytest.raises(ValueError, match=r"query and target .*\(2, 3, 4, 8\) and \(1, 3, 4, 8\)"):
        tat_loss(query, key, value, key[:1])
    with pytest.raises(ValueError, match=r"heads=3 does not divide channels=8"):
        target_aware_attention(query, key, value, heads=3)


def test_taps_of_other_height_and_width_are_named():
    student, teacher = jnp.zeros((2, 4, 4, 8)), jnp.zeros((2, 7, 7, 8))
    with pytest.raises(ValueError, match=r"\(2, 4, 4\) and \(2, 7, 7\)"):
        TargetAwareTransformer(8, 8, rngs=nnx.Rngs(0))(student, teacher)


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
    gradient = nnx.grad(lambda module: module(student, teacher))(trainable)
    assert jnp.abs(gradient["key"]["conv"]["kernel"][...]).max() > 0
