"""MobileNetV2 computes what torchvision's does, and comes and goes under its names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx

from proofs.torch_deeplab import InvertedResidual as TorchBlock
from proofs.torch_deeplab import TorchMobileNetV2
from proofs.torch_resnet import randomize
from tat_jax import convert, networks
from tat_jax.networks.layers import relu6
from tat_jax.networks.mobilenet import ARCHITECTURES, InvertedResidual
from tat_jax.weights import store
from tat_jax.weights.names import convert_entries, to_ours, torch_name


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return randomize(TorchMobileNetV2(num_classes=6)).double()


def ours_of(theirs, dtype):
    entries = {name: value.numpy() for name, value in theirs.state_dict().items()}
    stored = convert_entries(entries, "mobilenet_v2", source="PyTorch")
    model = networks.construct(stored.arguments, dtype=dtype, rngs=nnx.Rngs(0))
    store.set_weights(model, stored.weights, source="PyTorch")
    return model


def test_a_network_has_torchvision_s_number_of_parameters():
    model = nnx.eval_shape(lambda: ARCHITECTURES["mobilenet_v2"].build(rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 3_504_872


def test_logits_equal_pytorch_s(theirs, x64):
    images = np.random.default_rng(0).normal(size=(2, 40, 33, 3))
    graph, state = nnx.split(ours_of(theirs, jnp.float64))
    logits = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, images)
    expected = theirs.eval()(torch.from_numpy(rearrange(images, "b h w c -> b c h w")))
    np.testing.assert_allclose(logits, expected.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("padding", ["input", "ordinary"])
@pytest.mark.parametrize(("stride", "expansion", "dilation"), [(1, 6, 2), (2, 6, 1), (1, 1, 1)])
def test_a_block_trains_as_pytorch_s_and_counts_the_zeros_around_it_as_published(
    padding, stride, expansion, dilation, x64
):
    is_input = padding == "input"
    torch.manual_seed(0)
    theirs = TorchBlock(4, 4, stride, expansion, dilation, row=False, pads_input=is_input)
    theirs = randomize(theirs).double().train()
    ours = InvertedResidual(
        4,
        4,
        stride,
        expansion,
        dilation=dilation,
        pad_input=is_input,
        dtype=jnp.float64,
        bn_group=None,
        rngs=nnx.Rngs(0),
    )
    entries = {name: value.detach().numpy().copy() for name, value in theirs.state_dict().items()}
    weights = {path: to_ours(path, entries[torch_name(path)]) for path in store.network_weights(ours)}
    store.set_weights(ours, weights, source="PyTorch")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 6, 4))
    maps = torch.from_numpy(rearrange(x, "b h w c -> b c h w")).requires_grad_()
    expected = theirs(maps)
    seen = rng.normal(size=rearrange(expected, "b c h w -> b h w c").shape)
    expected.backward(torch.from_numpy(rearrange(seen, "b h w c -> b c h w")))
    graph, state = nnx.split(ours)

    def value(x):
        block = nnx.merge(graph, state, copy=True)
        y, _ = block(x, train=True, where=None)
        return jnp.vdot(y, seen), (y, store.flatten(nnx.state(block, nnx.BatchStat)))

    gradient, (y, running) = jax.jit(jax.grad(value, has_aux=True))(x)
    close = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(y, rearrange(expected.detach(), "b c h w -> b h w c"), **close)
    np.testing.assert_allclose(gradient, rearrange(maps.grad, "b c h w -> b h w c"), **close)
    for path, array in running.items():
        np.testing.assert_allclose(array, theirs.state_dict()[torch_name(path)], **close)


def test_torchvision_s_names_come_in_and_go_out_bit_by_bit(theirs, tmp_path):
    file = tmp_path / "mobilenet.pth"
    torch.save({name: value.float() for name, value in theirs.state_dict().items()}, file)
    convert.main(["mobilenet_v2", "--from", str(file), "--to", str(tmp_path / "w")])
    convert.main(["--export", str(tmp_path / "w.pth"), str(tmp_path / "w")])
    found, saved = (torch.load(path, weights_only=True) for path in (tmp_path / "w.pth", file))
    TorchMobileNetV2(num_classes=6).load_state_dict(found, strict=True)
    assert found.keys() == {name for name in saved if "num_batches" not in name}
    assert all(torch.equal(value, saved[name]) for name, value in found.items())


def test_relu6_and_its_gradient_are_pytorch_s():
    values = np.float32([-1, 0, 1e-3, 3, 6, 7, np.nan])
    x = torch.from_numpy(values).requires_grad_()
    expected = torch.nn.functional.relu6(x)
    expected.backward(torch.ones_like(x))
    np.testing.assert_array_equal(relu6(jnp.asarray(values)), expected.detach())
    np.testing.assert_array_equal(jax.vmap(jax.grad(relu6))(jnp.asarray(values))[:-1], x.grad[:-1])


def test_kernels_and_head_are_drawn_as_torchvision_s():
    model = ARCHITECTURES["mobilenet_v2"].build(num_classes=1000, rngs=nnx.Rngs(0))
    # 409,600 normal draws with variance 2 / 1280: the standard error of their deviation is 0.11 %.
    last = model.features[18][0].kernel[...]
    assert last.std() == pytest.approx((2 / 1280) ** 0.5, rel=0.01)
    depthwise = model.features[17].conv[1][0].kernel[...]  # of 960 channels, each by itself
    assert depthwise.std() == pytest.approx((2 / (9 * 960)) ** 0.5, rel=0.03)
    _, head = model.classifier
    assert head.kernel[...].std() == pytest.approx(0.01, rel=0.01)
    assert not head.bias[...].any()
