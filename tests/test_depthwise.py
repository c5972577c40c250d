"""The sum of shifted maps, and where it stands for XLA's depthwise convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tat_jax.networks.depthwise import sum_of_shifted
from tat_jax.networks.layers import conv


def by_xla(x, kernel, stride=1, dilation=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "VALID",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize(
    ("size", "stride", "dilation", "maps"),
    [
        (7, 1, 1, (2, 15, 11)),
        (7, 1, 1, (1, 7, 8)),
        (3, 1, 1, (1, 6, 3)),
        (3, 2, 1, (2, 8, 7)),  # of the last row, no window reads anything
        (3, 2, 1, (1, 9, 9)),
        (3, 1, 4, (1, 10, 9)),
        (3, 2, 3, (2, 12, 11)),
        (5, 3, 2, (1, 16, 9)),
        (1, 2, 1, (1, 4, 5)),
    ],
)
def test_it_is_the_depthwise_convolution_and_so_are_its_gradients(size, stride, dilation, maps, x64):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape)) for shape in ((*maps, 6), (size, size, 1, 6)))
    (plain, by_plain), (shifted, by_shifted) = (
        jax.vjp(lambda x, kernel, f=convolve: f(x, kernel, stride, dilation), x, kernel)
        for convolve in (by_xla, sum_of_shifted)
    )
    np.testing.assert_allclose(shifted, plain, rtol=1e-12, atol=1e-13)
    weights = jnp.asarray(rng.normal(size=plain.shape))
    for ours, reference in zip(by_shifted(weights), by_plain(weights), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-13)


def test_in_bfloat16_it_and_its_gradients_round_once():
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        for shape in ((1, 15, 15, 4), (7, 7, 1, 4), (1, 9, 9, 4))
    )
    found, pull = jax.vjp(sum_of_shifted, x, kernel)
    exact, exact_pull = jax.vjp(sum_of_shifted, *(a.astype(jnp.float32) for a in (x, kernel)))
    pairs = zip((found, *pull(weights)), (exact, *exact_pull(weights.astype(jnp.float32))), strict=True)
    for rounded, reference in pairs:
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(jnp.float32), reference, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("of_conv", [{}, {"stride": 2}, {"dilation": 2}])
def test_a_convolution_in_as_many_groups_as_channels_is_it_on_a_cpu_and_means_the_same(of_conv, padded, x64):
    layer = conv(6, 6, 3, groups=6, padded=padded, dtype=jnp.float64, **of_conv, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8, 6)))
    found = layer(x)
    assert "stablehlo.convolution" not in jax.jit(layer).lower(x).as_text()
    layer.conv_general_dilated = jax.lax.conv_general_dilated
    np.testing.assert_allclose(found, layer(x), rtol=1e-12, atol=1e-13)


def test_other_platforms_and_other_groups_have_xla_s_own():
    x = jnp.zeros((1, 4, 4, 6))
    for groups, platform in ((3, "cpu"), (6, "cuda")):
        layer = conv(6, 6, 3, groups=groups, rngs=nnx.Rngs(0))
        lowered = jax.jit(layer).trace(x).lower(lowering_platforms=(platform,))
        assert "stablehlo.convolution" in lowered.as_text()
