"""The kernel for TPUs, run by an interpreter, gives the loss and the gradients of its formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from tat_jax import compiled, sharding
from tat_jax.losses import tat_loss, tat_mosaic
from tat_jax.losses.tat_mosaic import errors_on_chip

MAPS = (0, 1, 2, 3)  # query, key, value and target


def maps(batch, heads, positions, depth, *, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(batch, heads, positions, depth)).astype(dtype)) for _ in MAPS]


def interpreted(*maps, scale=1.0):
    return errors_on_chip(*maps, scale=scale, interpret=True)


def by_formula(query, key, value, target, scale=1.0):
    weights = jax.nn.softmax(scale * jnp.einsum("bnid,bnjd->bnij", query, key), axis=-1)
    out = jnp.einsum("bnij,bnjd->bnid", weights, value)
    return jnp.sum((out - target) ** 2, (1, 2, 3))


def with_gradients(errors, argnums):
    """Return the function that gives errors, weighted so that images differ, and their gradients."""

    def total(*maps):
        found = errors(*maps)
        return jnp.vdot(1 + jnp.arange(len(found)), found), found

    return jax.jit(jax.value_and_grad(total, argnums, has_aux=True))


# Three blocks of queries and two of keys, of both of which the last is short; and fewer than one of either.
@pytest.mark.parametrize(("positions", "heads"), [(589, 1), (12, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_the_kernel_gives_the_loss_and_the_gradients_of_the_formula(dtype, tolerance, heads, positions, x64):
    arrays = maps(2, heads, positions, 16, dtype=dtype)
    with jax.enable_x64(False):
        measured = with_gradients(interpreted, MAPS)(*arrays)
    expected = with_gradients(by_formula, MAPS)(*(x.astype(np.float64) for x in arrays))
    for ours, reference in zip(jax.tree.leaves(measured), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - reference)
        assert error <= tolerance * np.linalg.norm(reference)


@pytest.mark.parametrize(("asking", "answering"), [(12, 589), (300, 12)])
def test_the_positions_that_ask_may_be_more_or_fewer_than_those_that_answer(asking, answering):
    (query, _, _, target), (_, key, value, _) = (maps(2, 1, n, 16) for n in (asking, answering))
    measured = with_gradients(interpreted, MAPS)(query, key, value, target)
    expected = with_gradients(by_formula, MAPS)(query, key, value, target)
    for ours, reference in zip(jax.tree.leaves(measured), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(ours - reference) <= 1e-5 * np.linalg.norm(reference)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_the_kernel_scales_scores_and_their_gradients(dtype, tolerance, x64):
    arrays = maps(2, 1, 300, 16, dtype=dtype)
    scale = 16**-0.5 / 3  # which bfloat16 has not
    with jax.enable_x64(False):
        measured = with_gradients(functools.partial(interpreted, scale=scale), MAPS)(*arrays)
    formula = functools.partial(by_formula, scale=scale)
    expected = with_gradients(formula, MAPS)(*(x.astype(np.float64) for x in arrays))
    for ours, reference in zip(jax.tree.leaves(measured), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - reference)
        assert error <= tolerance * np.linalg.norm(reference)


@pytest.mark.parametrize("wanted", [(), (1,), (2,), (3,), (0, 2)])
def test_the_kernel_gives_whichever_gradients_are_wanted(wanted):
    arrays = maps(2, 1, 12, 16)
    everything, all_gradients = with_gradients(interpreted, MAPS)(*arrays)
    if not wanted:
        np.testing.assert_allclose(jax.jit(interpreted)(*arrays), everything[1], rtol=1e-6)
        return
    _, gradients = with_gradients(interpreted, wanted)(*arrays)
    for ours, index in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, all_gradients[index], rtol=1e-5, atol=1e-6)


def test_scores_of_1e4_and_more_stay_finite():
    query, key, value, target = maps(1, 1, 12, 16, dtype=jnp.bfloat16)
    (total, _), gradients = with_gradients(interpreted, MAPS)(1e4 * query, key, value, target)
    assert all(jnp.isfinite(x).all() for x in (total, *gradients))


def test_each_device_runs_the_kernel_on_its_own_images():
    arrays = maps(8, 2, 12, 16)
    split = jax.device_put(arrays, sharding.batched(sharding.make_mesh()))
    found = with_gradients(interpreted, MAPS)
    program = found.lower(*split).compile().as_text()
    assert {sent.kind for sent in compiled.collectives(program)} == {"all-reduce"}
    for sharded, whole in zip(jax.tree.leaves(found(*split)), jax.tree.leaves(found(*arrays)), strict=True):
        np.testing.assert_allclose(sharded, whole, rtol=1e-5, atol=1e-6)


def lowered(kind, side, channels, *, dtype=jnp.bfloat16, platform="tpu"):
    """Return what a compiler is given of loss and gradients on a mesh of eight devices of such a kind."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = AbstractMesh((8,), ("data",), (AxisType.Auto,), abstract_device=device)
    x = jax.ShapeDtypeStruct((8, side, side, channels), dtype, sharding=sharding.batched(mesh))
    gradients = jax.jit(jax.value_and_grad(tat_loss, (0, 2))).trace(x, x, x, x)
    return gradients.lower(lowering_platforms=(platform,)).as_text()


def test_tpus_run_the_kernel_where_their_vector_memory_holds_a_head():
    assert "tpu_custom_call" in lowered("TPU v5 lite", 129, 256)
    assert "tpu_custom_call" in lowered("TPU v6 lite", 129, 256)
    assert "tpu_custom_call" not in lowered("TPU v5", 129, 256)  # 64 MiB
    assert "tpu_custom_call" in lowered("TPU v5", 64, 512)
    assert "tpu_custom_call" not in lowered("TPU v4", 64, 512)  # 16 MiB
    assert "tpu_custom_call" not in lowered("TPU v5 lite", 129, 256, dtype=jnp.float32)
    assert "tpu_custom_call" not in lowered("TPU v5 lite", 129, 100)


def test_tpus_run_the_kernel_for_tokens_and_a_scale_too():
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((8,), ("data",), (AxisType.Auto,), abstract_device=device)
    student, teacher = (
        jax.ShapeDtypeStruct((8, *positions, 256), jnp.bfloat16, sharding=sharding.batched(mesh))
        for positions in ((64, 64), (1024,))
    )
    loss = functools.partial(tat_loss, scale=256**-0.5)
    traced = jax.jit(jax.value_and_grad(loss, (1, 2))).trace(teacher, student, student, teacher)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_other_devices_never_run_the_kernel():
    assert "tpu_custom_call" not in lowered("cpu", 64, 512, platform="cpu")
    assert not tat_mosaic.fits(*maps(8, 1, 12, 16, dtype=jnp.bfloat16))
