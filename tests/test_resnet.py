"""ResNets compute what PyTorch's do, and their taps are read without a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx

from proofs.torch_resnet import random_torch_resnet
from tat_jax import networks, sharding
from tat_jax.compiled import describe
from tat_jax.networks import stem
from tat_jax.networks.layers import BatchNorm
from tat_jax.networks.resnet import ARCHITECTURES, BasicBlock, architecture
from tat_jax.networks.view import View
from tat_jax.weights import store
from tat_jax.weights.names import convert_entries

STAGES = ("layer1", "layer2", "layer3", "layer4")


def ours_of(theirs, name, dtype=jnp.float32):
    entries = {name: value.numpy() for name, value in theirs.state_dict().items()}
    stored = convert_entries(entries, name, source="PyTorch")
    model = networks.construct(stored.arguments, dtype=dtype, rngs=nnx.Rngs(0))
    store.set_weights(model, stored.weights, source="PyTorch")
    return model


def resnet18(seed=0, **options):
    return ARCHITECTURES["resnet18"].build(rngs=nnx.Rngs(seed), **options)


def relative_error(ours, theirs):
    theirs = theirs.detach().numpy()
    if theirs.ndim == 4:
        theirs = rearrange(theirs, "b c h w -> b h w c")
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("name", "dtype", "bound"),
    [
        *((name, "float64", 1e-9) for name in ARCHITECTURES),
        ("resnet18", "float32", 1e-4),
        ("resnet50", "float32", 1e-4),
    ],
)
def test_logits_and_taps_equal_pytorchs(name, dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        theirs = random_torch_resnet(name, num_classes=10, width=16).eval().to(getattr(torch, dtype))
        images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(dtype)
        graph, state = nnx.split(View(ours_of(theirs, name, jnp.dtype(dtype)), taps=STAGES))
        logits, taps = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, images)
        expected, outputs = theirs(torch.from_numpy(rearrange(images, "b h w c -> b c h w")), taps=True)
        assert logits.dtype == jnp.dtype(dtype)
        assert relative_error(logits, expected) < bound
        assert set(taps) == {*STAGES, "pooled", "class_maps"}
        for tap in STAGES:
            assert relative_error(taps[tap], outputs[tap]) < bound
        pooled = outputs[STAGES[-1]].mean((2, 3))
        assert relative_error(taps["pooled"], pooled) < bound
        of_positions = taps["class_maps"].mean((1, 2)) + theirs.fc.bias.detach().numpy()[None]
        assert relative_error(of_positions, expected) < bound


def test_a_full_network_has_torchvisions_number_of_parameters():
    # torchvision's documented counts.
    counts = {"resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032}
    counts |= {"resnet101": 44_549_160, "resnet152": 60_192_808}
    for name, count in counts.items():
        model = nnx.eval_shape(lambda name=name: ARCHITECTURES[name].build(rngs=nnx.Rngs(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_reading_taps_changes_neither_structure_nor_state():
    model = resnet18(width=2, num_classes=3, small_images=True)
    before = nnx.split(model)
    images = jnp.ones((2, 16, 16, 3))
    logits, taps = View(model, taps=STAGES)(images)
    np.testing.assert_array_equal(model(images), logits)
    after = nnx.split(model)
    assert before[0] == after[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before[1], after[1]))
    assert {name: tap.shape for name, tap in taps.items()} == {
        "layer1": (2, 16, 16, 2),
        "layer2": (2, 8, 8, 4),
        "layer3": (2, 4, 4, 8),
        "layer4": (2, 2, 2, 16),
        "class_maps": (2, 2, 2, 3),
        "pooled": (2, 16),
    }


def test_batch_normalisation_trains_as_pytorchs_running_variance_included(x64):
    rng = np.random.default_rng(0)
    theirs, ours = torch.nn.BatchNorm2d(4).double(), BatchNorm(4, dtype=jnp.float64)
    for _ in range(3):
        x = rng.normal(2, 3, (5, 3, 3, 4))
        expected = theirs(torch.from_numpy(rearrange(x, "b h w c -> b c h w")))
        assert relative_error(ours(jnp.asarray(x), train=True), expected) < 1e-12
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-12)
    np.testing.assert_allclose(ours.var[...], theirs.running_var, rtol=1e-12)
    x = rng.normal(size=(2, 3, 3, 4))
    expected = theirs.eval()(torch.from_numpy(rearrange(x, "b h w c -> b c h w")))
    assert relative_error(ours(jnp.asarray(x)), expected) < 1e-12


@pytest.fixture
def trace_for(monkeypatch):
    """Return a function after which is traced what a platform computes."""

    def trace_for(platform):
        def choose(*arguments, default, **of_platforms):
            return of_platforms.get(platform, default)(*arguments)

        monkeypatch.setattr(jax.lax, "platform_dependent", choose)

    return trace_for


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_on_accelerators_the_same_gradient_takes_a_reduction_less(x64, trace_for, platform):
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(6, 5, 7, 4)))
    x, where = jnp.asarray(np.random.default_rng(0).normal(2, 3, weights.shape)), jnp.arange(6) != 4

    def loss(x):
        return (weights * BatchNorm(4, group=3, dtype=jnp.float64)(x, train=True, where=where)).sum()

    trace_for("cpu")
    here = jax.jit(jax.grad(loss)).lower(x).compile()
    trace_for(platform)
    there = jax.jit(jax.grad(lambda x: loss(x))).lower(x).compile()
    np.testing.assert_allclose(there(x), here(x), rtol=1e-11, atol=1e-13)
    assert here.cost_analysis()["flops"] - there.cost_analysis()["flops"] >= x.size


def test_on_tpus_a_variance_about_the_running_mean_rounds_as_one_about_the_mean(trace_for):
    x = np.random.default_rng(0).normal(1000, 1, (8, 5, 7, 4)).astype(np.float32)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + BatchNorm.epsilon)
    trace_for("tpu")
    norm = BatchNorm(4)
    norm.mean[...] = jnp.full(4, 998.0)
    np.testing.assert_allclose(norm(jnp.asarray(x), train=True), expected, atol=5e-4)


@pytest.mark.skipif(jax.device_count() < 2, reason="a device sends nothing to itself")
def test_on_tpus_devices_send_the_statistics_of_a_group_at_once(trace_for):
    mesh = sharding.make_mesh()
    rows = jax.ShapeDtypeStruct((16, 3, 3, 4), np.float32, sharding=sharding.batched(mesh))

    def sent():
        step = jax.jit(lambda x: BatchNorm(4)(x, train=True), out_shardings=sharding.batched(mesh))
        return describe(step.lower(rows).compile()).collectives["all-reduce"]

    trace_for("cpu")
    assert sent() == (2, 2 * 4 * 4)
    trace_for("tpu")
    assert sent() == (1, 2 * 4 * 4)


def test_groups_are_normalised_like_batches_of_their_own():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3, 3, 4)).astype(np.float32))
    grouped, alone = BatchNorm(4, group=2), BatchNorm(4)
    out = grouped(x, train=True)
    first = alone(x[:2], train=True)
    np.testing.assert_allclose(out[:2], first, atol=1e-6)
    np.testing.assert_allclose(out[4:], BatchNorm(4)(x[4:], train=True), atol=1e-6)
    np.testing.assert_allclose(grouped.var[...], alone.var[...], rtol=1e-6)


def test_a_batch_that_is_no_whole_number_of_groups_is_refused():
    with pytest.raises(ValueError, match="bn_group=4 does not divide the batch of 6 images"):
        BatchNorm(4, group=4)(jnp.zeros((6, 1, 1, 4)), train=True)


def test_bfloat16_activations_keep_float32_parameters():
    model = resnet18(width=2, num_classes=3, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert model(jnp.ones((1, 32, 32, 3))).dtype == jnp.bfloat16


def test_initial_kernels_are_kaimings_and_follow_the_seed():
    model, again, other = (resnet18(seed, width=32) for seed in (0, 0, 1))
    kernel = model.layer4[0].conv1.kernel[...]
    # 295,000 normal draws with variance 2 / (9 · 256): the standard error of their deviation is 0.13 %.
    assert kernel.std() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    np.testing.assert_array_equal(kernel, again.layer4[0].conv1.kernel[...])
    assert not np.array_equal(kernel, other.layer4[0].conv1.kernel[...])


def test_a_resnet_of_other_depths_is_made_in_a_line():
    model = architecture(BasicBlock, (1, 2, 1, 1)).build(width=2, num_classes=3, rngs=nnx.Rngs(0))
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)] == [1, 2, 1, 1]
    assert model(jnp.ones((1, 32, 32, 3))).shape == (1, 3)


@pytest.mark.parametrize("max_pool", [stem.max_of_shifted, stem.max_by_place, stem.max_of_windows])
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 2)])
@pytest.mark.parametrize("values", [3, 10_000], ids=["with ties", "without"])
def test_max_pool_and_its_gradient_are_pytorchs(max_pool, size, values):
    rng = np.random.default_rng(0)
    images = rng.integers(0, values, (2, *size, 3)).astype(np.float32)
    theirs = torch.from_numpy(rearrange(images, "b h w c -> b c h w").copy()).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(theirs, 3, 2, padding=1)
    weights = rng.integers(1, 100, rearrange(pooled, "b c h w -> b h w c").shape).astype(np.float32)
    pooled.backward(torch.from_numpy(rearrange(weights, "b h w c -> b c h w").copy()))
    out, backward = jax.vjp(max_pool, jnp.asarray(images))
    np.testing.assert_array_equal(out, rearrange(pooled.detach().numpy(), "b c h w -> b h w c"))
    np.testing.assert_array_equal(
        backward(jnp.asarray(weights))[0], rearrange(theirs.grad.numpy(), "b c h w -> b h w c")
    )


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 2)])
def test_a_convolution_of_blocks_of_pixels_has_the_stems_sums_and_gradients(size, x64):
    rng = np.random.default_rng(0)
    images, kernel = (jnp.asarray(rng.normal(size=shape)) for shape in ((2, *size, 3), (7, 7, 3, 5)))
    (plain, by_plain), (blocks, by_blocks) = (
        jax.vjp(convolve, images, kernel) for convolve in (stem.convolve, stem.convolve_blocks)
    )
    np.testing.assert_allclose(blocks, plain, rtol=1e-12, atol=1e-13)
    weights = jnp.asarray(rng.normal(size=plain.shape))
    for ours, reference in zip(by_blocks(weights), by_plain(weights), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-13)
