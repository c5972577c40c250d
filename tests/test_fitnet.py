"""FitNet agrees with its authors' code, and its regressors with PyTorch's."""

import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx

from tat_jax.batch import Batch
from tat_jax.losses.maps import FitNet
from tat_jax.networks.view import Outputs

# RepDistiller's ConvReg in training mode and its HintLoss, in float64: the loss, and norms of its gradients.
GOLDEN = {
    ("same", 8, 8): (0.638423752035543, 0.021989873560059853, 0.059964861611585304, 0.2065549173950847),
    ("down", 16, 8): (0.7010575641638004, 0.021350858394857293, 0.16273991056053877, 0.21690971792776417),
}
LAYERS = {
    (8, 8): lambda: torch.nn.Conv2d(6, 10, 1),
    (16, 8): lambda: torch.nn.Conv2d(6, 10, 3, stride=2, padding=1),
    (4, 8): lambda: torch.nn.ConvTranspose2d(6, 10, 4, stride=2, padding=1),
    (11, 8): lambda: torch.nn.Conv2d(6, 10, 4),
}


def draw(name, shape):
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)


def to_ours(kernel, *, transposed):
    if transposed:  # which turns its kernel
        return rearrange(kernel[:, :, ::-1, ::-1], "i o h w -> h w i o")
    return rearrange(kernel, "o i h w -> h w i o")


def build(side, target_side, dtype=jnp.float64):
    options = {"student_tap": "x", "teacher_tap": "x", "dtype": dtype, "bn_group": None}
    return FitNet((side, side, 6), (target_side, target_side, 10), **options, rngs=nnx.Rngs(0))


def nhwc(x):
    return jnp.asarray(rearrange(x, "b c h w -> b h w c"))


def loss_of(module, student, teacher, valid=None):
    outputs = (Outputs(None, {"x": nhwc(x)}) for x in (student, teacher))
    where = jnp.arange(len(student)) < (valid or len(student))
    batch = Batch(jnp.zeros((len(student), 1, 1, 3)), None, where)
    return jnp.mean(module(*outputs, batch, train=True), where=where)


@pytest.mark.parametrize(("case", "side", "target_side"), GOLDEN)
def test_loss_and_gradients_are_those_of_the_authors_code(case, side, target_side, x64):
    expected, by_student, by_kernel, by_scale = GOLDEN[case, side, target_side]
    name, module = f"fitnet/{case}", build(side, target_side)
    student = draw(f"{name}/student", (4, 6, side, side))
    teacher = np.maximum(draw(f"{name}/teacher", (4, 10, target_side, target_side)), 0)
    size = module.conv.kernel.shape[0]
    kernel = draw(f"{name}/regress/conv.weight", (10, 6, size, size)) * (6 * size * size) ** -0.5
    module.conv.kernel.set_value(jnp.asarray(to_ours(kernel, transposed=False)))
    module.conv.bias.set_value(jnp.asarray(0.1 * draw(f"{name}/regress/conv.bias", 10)))
    module.norm.scale.set_value(jnp.asarray(1 + 0.1 * draw(f"{name}/regress/bn.weight", 10)))
    module.norm.bias.set_value(jnp.asarray(0.1 * draw(f"{name}/regress/bn.bias", 10)))
    loss, (of_module, of_student) = nnx.value_and_grad(loss_of, argnums=(0, 1))(
        module, jnp.asarray(student), teacher
    )
    assert loss == pytest.approx(expected, rel=1e-10)
    assert np.linalg.norm(of_student) == pytest.approx(by_student, rel=1e-10)
    assert np.linalg.norm(of_module["conv"]["kernel"][...]) == pytest.approx(by_kernel, rel=1e-10)
    assert np.linalg.norm(of_module["norm"]["scale"][...]) == pytest.approx(by_scale, rel=1e-10)


@pytest.mark.parametrize(("side", "target_side"), LAYERS)
def test_each_regressor_is_pytorchs(side, target_side, x64):
    module, layer = build(side, target_side), LAYERS[side, target_side]().double()
    kernel = to_ours(layer.weight.detach().numpy(), transposed=side < target_side)
    assert module.conv.kernel.shape == kernel.shape
    bound = float(jnp.abs(module.conv.kernel[...]).max())
    assert bound == pytest.approx(float(layer.weight.detach().abs().max()), rel=0.1)  # both nearly reach it
    module.conv.kernel.set_value(jnp.asarray(kernel))
    module.conv.bias.set_value(jnp.asarray(layer.bias.detach().numpy()))
    student, teacher = draw("student", (3, 6, side, side)), draw("teacher", (3, 10, target_side, target_side))
    regressed = layer(torch.from_numpy(student)).detach()
    theirs = torch.nn.functional.batch_norm(regressed, None, None, training=True).relu()
    expected = torch.nn.functional.mse_loss(theirs, torch.from_numpy(teacher))
    assert loss_of(module, student, teacher) == pytest.approx(float(expected), rel=1e-12)


def test_padding_changes_nothing():
    module = build(8, 8, jnp.float32)
    student, teacher = (draw(name, (3, c, 8, 8)).astype(np.float32) for name, c in (("s", 6), ("t", 10)))
    expected = loss_of(module, student[:2], teacher[:2])
    student[2], teacher[2] = 1e6, -1e6
    assert loss_of(module, student, teacher, valid=2) == pytest.approx(float(expected), rel=1e-5)


def test_grids_that_no_regressor_joins_are_named():
    with pytest.raises(ValueError, match=r"from a map of \[5, 5\] to one of \[8, 8\]"):
        build(5, 8)
