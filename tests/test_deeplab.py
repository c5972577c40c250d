"""DeepLabV3+ computes what the published code does and trains as PyTorch's, and dropout is the run's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx

from proofs.torch_deeplab import TorchDeepLab
from proofs.torch_resnet import randomize
from tat_jax import convert, networks
from tat_jax.networks.interpolation import convolve_interpolated, interpolate
from tat_jax.networks.view import View
from tat_jax.weights import store
from tat_jax.weights.names import convert_entries, export_entries


def deeplab(backbone, *, dtype=jnp.float32, **options):
    arguments = {"architecture": f"deeplab_{backbone}", "num_classes": 21, **options}
    return networks.construct(arguments, dtype=dtype, rngs=nnx.Rngs(0))


def parameters(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize(
    ("backbone", "total", "with_182", "below", "aspp", "decoder"),
    [
        ("resnet101", 59_344_309, 59_385_686, 42_500_160, 15_535_104, 1_309_045),
        ("resnet18", 16_608_181, 16_649_558, 11_176_512, 4_131_840, 1_299_829),
        ("mobilenet_v2", 5_816_053, 5_857_430, 1_811_712, 2_706_432, 1_297_909),
    ],
)
def test_there_are_as_many_parameters_as_published(backbone, total, with_182, below, aspp, decoder):
    model = nnx.eval_shape(lambda: deeplab(backbone))
    assert parameters(model) == total
    assert [parameters(part) for part in (model.backbone, model.aspp, model.decoder)] == [
        below,
        aspp,
        decoder,
    ]
    assert parameters(nnx.eval_shape(lambda: deeplab(backbone, num_classes=182))) == with_182


def filled(path, shape):
    """Return the array that the published figures were measured with, in our layout."""
    leaf = path.rpartition(".")[2]
    if leaf == "kernel":
        height, width, inputs, outputs = shape
        a, b, i, o = np.ogrid[:height, :width, :inputs, :outputs]
        phase = 1 + 0.37 * o + 0.11 * i + 0.5 * a + 0.3 * b + 0.01 * o * i
        return math.sqrt(2 / (inputs * height * width)) * np.sin(phase)
    c = np.arange(shape[0])
    if path == "decoder.last_conv.8.bias":
        return 0.01 * c
    of_norm = {"scale": 1 + 0.1 * np.cos(c), "bias": 0.1 * np.sin(c)}
    of_norm |= {"mean": 0.05 * np.cos(2 * c), "var": 1 + 0.2 * np.sin(c) ** 2}
    return of_norm[leaf]


# Low-level, backbone and ASPP mean; the decoder's mean, deviation, [5, 3, 7] and [5, 0, 0]; the logits' mean,
# deviation and [2, 10, 20]. Measured with the published code in float64.
FIGURES = {
    "resnet18": "46.6690084 4863.93022 33.5262457 -33.7052046 6917.44178 -3602.70718 -25.4331123 "
    "35.4799439 4518.28615 -1617.91375",
    "resnet101": "6.78374268 510404.552 4613.97001 10387.7027 1509883.24 -447143.772 360244.136 "
    "-42662.6956 527191.137 134915.693",
    "mobilenet_v2": "0.0650167978 -0.0275426169 0.0131604143 -0.0151698668 1.99342736 -5.54216811 "
    "-1.41626734 0.109316909 1.07417162 1.03875332",
}


@pytest.mark.parametrize("backbone", FIGURES)
def test_taps_and_logits_have_the_published_figures(backbone, x64):
    model = deeplab(backbone, dtype=jnp.float64)
    shapes = {path: value.shape for path, value in store.network_weights(model).items()}
    store.set_weights(model, {path: filled(path, shape) for path, shape in shapes.items()}, source="a test")
    i, j, c = np.ogrid[:65, :65, :3]
    graph, state = nnx.split(View(model, taps=("aspp", "decoder")))
    logits, taps = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, np.sin(0.1 * i + 0.2 * j + c)[None])
    low, last, aspp, decoder = (taps[tap][0] for tap in ("low_level", "layer4", "aspp", "decoder"))
    found = [low.mean(), last.mean(), aspp.mean(), decoder.mean(), decoder.std()]
    found += [decoder[3, 7, 5], decoder[0, 0, 5]]
    found += [logits.mean(), logits.std(), logits[0, 10, 20, 2]]
    np.testing.assert_allclose(found, [float(figure) for figure in FIGURES[backbone].split()], rtol=1e-8)


def ours_of(theirs, architecture, **options):
    entries = {name: value.numpy() for name, value in theirs.state_dict().items()}
    stored = convert_entries(entries, architecture, source="PyTorch")
    model = networks.construct(stored.arguments | options, dtype=jnp.float64, rngs=nnx.Rngs(0))
    store.set_weights(model, stored.weights, source="PyTorch")
    return model


@pytest.mark.parametrize(
    ("backbone", "of_backbone", "options"),
    [
        ("resnet50", {"width": 4}, {"output_stride": 8}),
        ("mobilenet_v2", {}, {"output_stride": 8, "padding": "ordinary"}),
    ],
)
def test_at_an_output_stride_of_8_taps_and_logits_are_pytorch_s(backbone, of_backbone, options, x64):
    theirs = TorchDeepLab(backbone, num_classes=4, **of_backbone, **options)
    theirs = randomize(theirs).double().eval()
    images = np.random.default_rng(0).normal(size=(1, 37, 33, 3))
    graph, state = nnx.split(
        View(ours_of(theirs, f"deeplab_{backbone}", **options), taps=("aspp", "decoder"))
    )
    found = jax.jit(lambda s, x: nnx.merge(graph, s)(x))(state, images)
    logits, taps = theirs(torch.from_numpy(rearrange(images, "b h w c -> b c h w")), taps=True)
    assert found.taps["layer4"].shape[1:3] == (5, 5)
    for ours, expected in ((found.logits, logits), *((found.taps[tap], taps[tap]) for tap in taps)):
        assert_close(ours, rearrange(expected.detach().numpy(), "b c h w -> b h w c"))


@pytest.mark.parametrize("size", [(9, 13), (17, 8)])
def test_a_convolution_of_interpolated_maps_needs_no_large_maps(size, x64):
    rng = np.random.default_rng(0)
    small, kernel = jnp.asarray(rng.normal(size=(2, 5, 4, 3))), jnp.asarray(rng.normal(size=(3, 3, 3, 2)))
    dimensions = ("NHWC", "HWIO", "NHWC")
    large = interpolate(small, *size)
    expected = jax.lax.conv_general_dilated(large, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
    np.testing.assert_allclose(convolve_interpolated(small, kernel, *size), expected, rtol=1e-10, atol=1e-12)


def without_dropout(model):
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Dropout):
            module.rate = 0.0
    return model


def test_a_training_step_has_pytorch_s_logits_taps_gradients_and_statistics(x64):
    torch.manual_seed(0)
    theirs = randomize(TorchDeepLab("resnet18", num_classes=4, dropouts=(0, 0, 0), width=4)).double().train()
    ours = View(without_dropout(ours_of(theirs, "deeplab_resnet18")), taps=("aspp", "decoder"))
    rng = np.random.default_rng(0)
    images, weights = rng.normal(size=(3, 37, 33, 3)), rng.normal(size=(3, 37, 33, 4))
    graph, params, others = nnx.split(ours, nnx.Param, ...)

    def loss_fn(params, others):
        model = nnx.merge(graph, params, others, copy=True)
        outputs = model(images, train=True)
        return jnp.vdot(outputs.logits, weights), (outputs, nnx.state(model, nnx.Not(nnx.Param)))

    (_, (outputs, others)), gradients = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, others)
    logits, taps = theirs(torch.from_numpy(rearrange(images, "b h w c -> b c h w")), taps=True)
    (logits * torch.from_numpy(rearrange(weights, "b h w c -> b c h w"))).sum().backward()
    for ours, expected in ((outputs.logits, logits), *((outputs.taps[tap], taps[tap]) for tap in taps)):
        assert_close(ours, rearrange(expected.detach().numpy(), "b c h w -> b h w c"))
    found = export_entries(stored_of(store.flatten(gradients)))
    for name, parameter in theirs.named_parameters():
        assert_close(found[name], parameter.grad)
    running = export_entries(stored_of(store.flatten(nnx.filter_state(others, nnx.BatchStat))))
    for name, buffer in theirs.named_buffers():
        if "num_batches" not in name:
            assert_close(running[name], buffer)


def stored_of(weights):
    below = {path.removeprefix("network."): array for path, array in weights.items()}
    return store.StoredNetwork(below, {"architecture": "deeplab_resnet18"}, {})


def assert_close(ours, theirs):
    theirs = np.asarray(theirs)
    assert np.linalg.norm(np.asarray(ours) - theirs) <= 1e-9 * np.linalg.norm(theirs) + 1e-10


def checkpoint_of(theirs, file, **options):
    """Write what the public trainer does beside the weights, too."""
    parameters = {"params": [0], "lr": 0.007}
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [parameters]}
    said = {"epoch": 46, "state_dict": theirs.state_dict(), "optimizer": optimizer, "best_pred": 0.7843}
    torch.save(said, file, **options)
    return file


@pytest.mark.parametrize(
    ("backbone", "options", "is_zip"),
    [("resnet50", {"width": 2}, False), ("mobilenet_v2", {"padding": "input"}, True)],
)
def test_a_public_checkpoint_comes_in_and_goes_out_bit_by_bit(backbone, options, is_zip, tmp_path, capsys):
    theirs = TorchDeepLab(backbone, num_classes=6, **options)
    file = checkpoint_of(theirs, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=is_zip)
    convert.main([f"deeplab_{backbone}", "--from", str(file), "--to", str(tmp_path / "w")])
    assert "taken from 'state_dict.'" in capsys.readouterr().out
    expected = {"architecture": f"deeplab_{backbone}", "num_classes": 6, "output_stride": 16}
    assert store.load_network(tmp_path / "w").arguments == expected | {"aspp_dropout": True} | options
    convert.main(["--export", str(tmp_path / "w.pth"), str(tmp_path / "w")])
    found = torch.load(tmp_path / "w.pth", weights_only=True)
    theirs.load_state_dict(found, strict=True)
    known = {name: value for name, value in theirs.state_dict().items() if "num_batches" not in name}
    assert found.keys() == known.keys()
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in found.items())


def test_one_module_under_two_names_has_one_array(tmp_path):
    entries = TorchDeepLab("mobilenet_v2", num_classes=2).state_dict()
    name = "backbone.low_level_features.0.0.weight"
    entries[name] = entries[name] + 1
    entries = {name: value.numpy() for name, value in entries.items()}
    with pytest.raises(ValueError, match=r"other numbers in backbone\.low_level_features\.0\.0\.w"):
        convert_entries(entries, "deeplab_mobilenet_v2", source="a test")


def test_random_streams_are_no_part_of_a_network_on_disk():
    model = deeplab("resnet18", width=1)
    streams = store.flatten(nnx.state(model, nnx.RngState))
    assert len(streams) == 6  # a key and a count of each of the three
    assert store.network_weights(model).keys().isdisjoint(streams)


def test_a_network_may_be_called_within_a_trace_by_itself():
    model = deeplab("resnet18", width=1, num_classes=2)
    before = nnx.graphdef(model)
    assert jax.eval_shape(model, jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)).shape == (1, 33, 33, 2)
    assert nnx.graphdef(model) == before


def test_convolutions_and_the_classifier_are_drawn_as_published():
    model = deeplab("resnet18", width=8)
    kernels = model.aspp.aspp2.atrous_conv.kernel[...], model.decoder.last_conv[4].kernel[...]
    for kernel, inputs in zip(kernels, (64, 256), strict=True):
        # Normal draws, 147,456 and 589,824: the standard errors of their deviations are below 0.2 %.
        assert kernel.std() == pytest.approx((2 / (9 * inputs)) ** 0.5, rel=0.01)
    head = model.decoder.last_conv[8]
    assert head.kernel[...].std() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert 0 < abs(head.bias[...]).max() <= 1 / 16


@pytest.mark.parametrize(("size_in", "size_out"), [(5, 17), (17, 5), (1, 4), (4, 1), (33, 129)])
def test_interpolation_is_pytorch_s_with_aligned_corners(size_in, size_out):
    x = np.random.default_rng(0).normal(size=(2, size_in, 3, 2)).astype(np.float32)
    maps = torch.from_numpy(rearrange(x, "b h w c -> b c h w")).double()
    expected = torch.nn.functional.interpolate(maps, (size_out, 7), mode="bilinear", align_corners=True)
    found = interpolate(jnp.asarray(x), size_out, 7)
    np.testing.assert_allclose(found, rearrange(expected, "b c h w -> b h w c"), rtol=2e-6, atol=5e-7)
