"""ConvNeXt: its taps, its layers, its names in other libraries; see also `proofs/fidelity/convnext.py`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tat_jax import convert, fields, networks
from tat_jax.networks.convnext import ARCHITECTURES, LayerNorm
from tat_jax.networks.convnext_names import translate
from tat_jax.networks.view import View, watch
from tat_jax.weights import store
from tat_jax.weights.names import convert_entries, export_entries
from tat_jax.weights.store import StoredNetwork

NARROW = {"stage_depth": 1, "stem_width": 4}


def narrow(classes=3, **options):
    network = ARCHITECTURES["convnext_tiny"]
    return network.build(num_classes=classes, **NARROW | options, rngs=nnx.Rngs(0))


def outputs(view, images):
    graph, state = nnx.split(view)
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, images)


@pytest.fixture(scope="module")
def entries():
    """Return those of a narrow ConvNeXt-T as timm names them."""
    arguments = {"architecture": "convnext_tiny", "num_classes": 3, "stem_width": 4}
    shapes = nnx.eval_shape(lambda: networks.construct(arguments, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    weights = {
        path: rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in store.network_weights(shapes).items()
    }
    return export_entries(StoredNetwork(weights, arguments, {"head": "trained", "source": "a test"}))


@pytest.mark.parametrize(
    ("name", "count"),  # torchvision's documented ones
    [("convnext_tiny", 28_589_128), ("convnext_small", 50_223_688), ("convnext_base", 88_591_464)],
)
def test_a_full_network_has_torchvision_s_number_of_parameters(name, count):
    model = nnx.eval_shape(lambda: ARCHITECTURES[name].build(num_classes=1000, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


IMAGES = np.random.default_rng(0).normal(size=(2, 70, 64, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def whole():
    """Return a view of a narrow network with a head, and its outputs for `IMAGES`."""
    view = View(narrow())
    return view, outputs(view, IMAGES)


def test_every_stage_and_what_the_head_reads_are_taps(whole):
    view, (logits, taps) = whole
    shapes = {"stage0": (17, 16, 4), "stage1": (8, 8, 8), "stage2": (4, 4, 16), "stage3": (2, 2, 32)}
    assert {name: tap.shape[1:] for name, tap in taps.items()} == {**shapes, "pooled": (32,)}
    np.testing.assert_allclose(logits, view.network.head.fc(taps["pooled"]), rtol=1e-5)


def test_without_classes_there_is_no_head_and_the_taps_are_the_same(whole):
    view, (_, expected) = whole
    headless, weights = View(narrow(classes=0)), store.network_weights(view.network)
    names = weights.keys() - store.network_weights(headless.network).keys()
    assert names == {"head.fc.kernel", "head.fc.bias"}
    kept = {path: array for path, array in weights.items() if path not in names}
    store.set_weights(headless.network, kept, source="a test")
    logits, taps = outputs(headless, IMAGES)
    assert logits is None
    assert taps.keys() == expected.keys()
    for name, tap in taps.items():
        np.testing.assert_allclose(tap, expected[name], rtol=1e-6, atol=1e-7)


def test_images_that_are_too_small_for_its_strides_are_refused_when_it_is_built():
    with pytest.raises(ValueError, match="ConvNeXt wants images of 32 pixels and more, not 28×28"):
        watch(View(narrow()), (), 28)


def test_bfloat16_activations_keep_float32_parameters_and_a_float32_norm():
    model = narrow(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    logits, taps = watch(View(model), (), 32)
    assert {logits.dtype, *(tap.dtype for tap in taps.values())} == {jnp.dtype("bfloat16")}
    # In bfloat16, whose numbers near 100 lie 0.5 apart, the mean would be off by half a deviation.
    x = jnp.asarray(100 + np.random.default_rng(0).normal(size=(2, 64)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    expected = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-6)
    found = np.asarray(LayerNorm(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x), np.float64)
    np.testing.assert_allclose(found, expected, rtol=2**-8)


def test_kernels_and_scales_start_as_published():
    model = ARCHITECTURES["convnext_tiny"].build(num_classes=10, stage_depth=1, rngs=nnx.Rngs(0))
    block = model.stages[3].blocks[0]
    for layer in (block.conv_dw, block.mlp.fc1, block.mlp.fc2, model.head.fc):
        assert layer.kernel[...].std() == pytest.approx(0.02, rel=0.03)
        assert not layer.bias[...].any()
    assert set(np.asarray(block.gamma[...])) == {np.float32(1e-6)}


def test_a_config_names_a_narrow_one_whose_saved_weights_come_back(tmp_path):
    config = fields.defaults(networks.FIELDS)
    with config.ignore_type():
        config.update({"architecture": "convnext_tiny", **NARROW})
    assert list(fields.wrong(networks.FIELDS, config.to_dict())) == []
    made = networks.build(config, num_classes=3, dtype="float32", seed=0, fit_head=False)
    weights = store.network_weights(made.view.network)
    store.save_network(tmp_path / "w", StoredNetwork(weights, made.arguments, made.origin))
    config.weights = str(tmp_path / "w")
    found = networks.build(config, num_classes=3, dtype="float32", seed=1, fit_head=False)
    assert found.arguments == {"architecture": "convnext_tiny", "num_classes": 3, **NARROW}
    for path, array in store.network_weights(found.view.network).items():
        np.testing.assert_array_equal(array, weights[path])


def test_another_architecture_has_no_such_options():
    config = fields.defaults(networks.FIELDS)
    config.stem_width = 8
    with pytest.raises(ValueError, match="resnet18 has no stem_width, so that it must stay None"):
        networks.build(config, num_classes=3, dtype="float32", seed=0, fit_head=False)


def in_facebook_s(name):
    """Return facebookresearch's name of an array."""
    name = re.sub(r"^head\.(fc\.)?", lambda found: "head." if found[1] else "", name)
    name = re.sub(r"^stem\.", "downsample_layers.0.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
    name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
    return name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")


@pytest.mark.parametrize("around", ["", "module.", "state_dict.student."])
def test_names_of_facebookresearch_come_in_under_any_prefix(entries, around):
    theirs = {around + in_facebook_s(name): array for name, array in entries.items()}
    assert {"norm.weight", "head.weight", "downsample_layers.3.1.bias"} <= {
        n.removeprefix(around) for n in theirs
    }
    found = convert_entries(theirs, "convnext_tiny", source="a file")
    assert found.arguments == {
        "architecture": "convnext_tiny",
        "num_classes": 3,
        "stage_depth": None,
        "stem_width": 4,
    }
    out = export_entries(found)
    assert out.keys() == entries.keys()
    assert all(np.array_equal(array, entries[name]) for name, array in out.items())


def test_the_further_name_of_dinov3_s_last_norm_is_left_out_if_it_is_the_same(entries):
    theirs = {in_facebook_s(name): array for name, array in entries.items()}
    doubled = theirs | {f"norms.3.{leaf}": theirs[f"norm.{leaf}"] for leaf in ("weight", "bias")}
    assert translate(doubled).keys() == entries.keys()
    other = doubled | {"norms.3.bias": doubled["norms.3.bias"] + 1}
    with pytest.raises(ValueError, match=r"extra: norms\.3\.bias"):
        convert_entries(other, "convnext_tiny", source="a file")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("features.0.1.weight", "stem.1.weight"),
        ("features.5.8.block.3.bias", "stages.2.blocks.8.mlp.fc1.bias"),
        ("features.6.1.weight", "stages.3.downsample.1.weight"),
        ("convnext.encoder.stages.1.layers.2.layernorm.bias", "stages.1.blocks.2.norm.bias"),
        ("convnext.layernorm.bias", "head.norm.bias"),
        ("classifier.weight", "head.fc.weight"),
        ("model.stages.3.layers.0.pointwise_conv2.bias", "stages.3.blocks.0.mlp.fc2.bias"),
        ("stages.2.downsample_layers.1.bias", "stages.2.downsample.1.bias"),
    ],
)
@pytest.mark.parametrize("around", ["", "ema."])
def test_names_of_torchvision_and_hugging_face_are_told_by_their_stem(theirs, ours, around):
    stem = {
        "features": "features.0.0.weight",
        "convnext": "convnext.embeddings.patch_embeddings.weight",
        "classifier": "convnext.embeddings.patch_embeddings.weight",
        "model": "model.stages.0.downsample_layers.0.weight",
        "stages": "stages.0.downsample_layers.0.weight",
    }[theirs.partition(".")[0]]
    found = translate(
        {around + stem: np.zeros((4, 3, 4, 4)), around + theirs: np.zeros(4), "other": np.ones(1)}
    )
    assert list(found) == [f"{around}stem.0.weight", around + ours, "other"]


def test_torchvision_s_scales_lose_the_axes_that_they_have_for_their_maps():
    scale = np.arange(4.0)[:, None, None]
    found = translate({"features.0.0.weight": np.zeros((4, 3, 4, 4)), "features.1.0.layer_scale": scale})
    np.testing.assert_array_equal(found["stages.0.blocks.0.gamma"], np.arange(4.0))


def test_two_tensors_of_one_name_are_refused(entries):
    theirs = {in_facebook_s(name): array for name, array in entries.items()}
    said = r"downsample_layers\.0\.1\.bias and another tensor would both be stem\.1\.bias"
    with pytest.raises(ValueError, match=said):
        translate({"stem.1.bias": np.zeros(4), **theirs})


def test_the_weights_of_another_size_are_named_by_their_blocks(entries):
    with pytest.raises(
        ValueError, match="a file: this ConvNeXt has 3, 3, 9, 3 blocks in its stages, not 3, 3, 27, 3"
    ):
        convert_entries(entries, "convnext_small", source="a file")


@pytest.mark.parametrize(("options", "head"), [((), "none"), (("--head", "fresh"), "fresh")])
def test_a_file_without_a_head_converts_as_it_is_or_with_a_fresh_one(options, head, entries, tmp_path):
    file = tmp_path / "dinov3.pth"
    backbone = {name: torch.from_numpy(a) for name, a in entries.items() if not name.startswith("head.fc")}
    torch.save(backbone, file)
    convert.main(["convnext_tiny", "--from", str(file), "--to", str(tmp_path / "w"), *options])
    assert store.load_network(tmp_path / "w").origin == {"head": head, "source": str(file)}
    convert.main(["--export", str(tmp_path / "out.pth"), str(tmp_path / "w")])
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    added = {"head.fc.weight": (1000, 32), "head.fc.bias": (1000,)} if head == "fresh" else {}
    assert {name: tuple(found[name].shape) for name in found.keys() - backbone.keys()} == added
    assert all(torch.equal(found[name], value) for name, value in backbone.items())


def test_a_miniature_comes_back_from_the_entries_that_it_was_exported_to():
    model = narrow()
    arguments = {"architecture": "convnext_tiny", "num_classes": 3, **NARROW}
    weights = store.network_weights(model)
    exported = export_entries(StoredNetwork(weights, arguments, {"head": "trained", "source": "a test"}))
    found = convert_entries(exported, "convnext_tiny", source="a file")
    assert found.arguments == arguments
    assert all(np.array_equal(array, weights[path]) for path, array in found.weights.items())
