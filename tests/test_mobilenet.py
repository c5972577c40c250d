"""MobileNetV2 computes what torchvision's does, and comes and goes under its names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx

from proofs.torch_deeplab_strides import TorchMobileNetV2
from proofs.torch_resnet import randomize
from tat_jax import networks
from tat_jax.networks.layers import relu6
from tat_jax.networks.mobilenet import ARCHITECTURES
from tat_jax.weights import store
from tat_jax.weights.names import convert_entries


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
