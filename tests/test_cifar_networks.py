"""CIFAR's networks are RepDistiller's: figures, names and shapes, and what their taps are."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from proofs.fidelity import rival_networks
from proofs.fidelity.recorded_inputs import draw_entries
from tat_jax import networks
from tat_jax.networks.cifar import MEAN
from tat_jax.networks.view import View
from tat_jax.weights.names import convert_entries, export_entries
from tests.claims import broken

FIGURES = json.loads((Path(__file__).parent / "golden" / "rivals.json").read_text())
QUICK = ("resnet8", "wrn_16_2", "vgg8", "ShuffleV2")  # the others in `proofs`
# Of RepDistiller's networks for 100 classes.
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_40_1": 569_780,
    "wrn_16_2": 703_284,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "cifar_resnet50": 23_705_252,
    "cifar_mobilenet_v2": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
}
SHAPES = {
    name: {key: shape for key, shape in shapes.items() if "num_batches" not in key}
    for name, shapes in FIGURES["network_keys"].items()
}


def view(name, **options):
    arguments = {"architecture": name, "num_classes": 10} | options
    return View(networks.construct(arguments, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", QUICK)
def test_forward_taps_gradient_and_statistics_are_those_recorded_of_repdistiller_s(name):
    chosen = [recorded for recorded in FIGURES["networks"] if recorded["net"] == name]
    keys = {name: FIGURES["network_keys"][name]}
    assert broken(list(rival_networks.claims({"networks": chosen, "network_keys": keys}))) == []


DEEPER = ("resnet32", "resnet44", "resnet56", "resnet110", "resnet32x4", "wrn_40_1", "wrn_40_2")  # of others


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in DEEPER])
def test_repdistiller_s_names_and_shapes_come_in_and_go_out_to_the_bit(name):
    entries = {key: a.astype(np.float32) for key, a in draw_entries(f"net/{name}", SHAPES[name]).items()}
    stored = convert_entries(
        {f"module.{key}": a for key, a in entries.items()}, rival_networks.ours(name), source="x"
    )
    assert stored.arguments["num_classes"] == 100
    exported = export_entries(stored)
    assert exported.keys() == entries.keys()
    for key, array in entries.items():
        np.testing.assert_array_equal(exported[key], array)


FAMILIES = ("resnet8", "wrn_16_1", "vgg8", "cifar_mobilenet_v2", "shufflenet_v1", "shufflenet_v2")


def test_parameters_are_as_many_as_published():
    found = {}
    for name in PARAMETERS:
        build = functools.partial(networks.construct, {"architecture": name, "num_classes": 100})
        network = nnx.eval_shape(lambda build=build: build(rngs=nnx.Rngs(0)))
        found[name] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
    assert found == PARAMETERS


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_halve_their_maps_and_the_head_reads_the_pooled_vectors(name):
    seen = view(name)(jnp.zeros((2, 32, 32, 3)))
    stages = [tap for tap in seen.taps if tap.startswith("stage") and tap[5:].isdigit()]
    sides = [seen.taps[f"stage{i + 1}"].shape[1] for i in range(len(stages))]
    assert sides == sorted(sides, reverse=True)
    assert seen.taps["pooled"].ndim == 2
    assert seen.logits.shape == (2, 10)
    assert view(name, num_classes=0)(jnp.zeros((2, 32, 32, 3))).logits is None


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "shufflenet_v1"])
def test_before_the_last_relu_a_stage_is_its_preact(name):
    taps = view(name)(jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)))).taps
    for i in (1, 2, 3):
        np.testing.assert_array_equal(nnx.relu(taps[f"stage{i}_preact"]), taps[f"stage{i}"])
        assert (taps[f"stage{i}_preact"] < 0).any()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8"])  # the quick ones
def test_images_that_do_not_count_change_neither_statistics_nor_those_that_do(name):
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)
    padded, alone = view(name), view(name)
    of_padded = padded(images, train=True, where=jnp.array([True, True, True, False])).logits
    of_alone = alone(images[:3], train=True).logits
    np.testing.assert_allclose(of_padded[:3], of_alone, rtol=2e-3, atol=2e-3)
    for one, other in zip(
        *(jax.tree.leaves(nnx.state(v, nnx.BatchStat)) for v in (padded, alone)), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_in_bfloat16_activations_are_and_parameters_are_not():
    model = networks.construct(
        {"architecture": "resnet8", "num_classes": 10}, dtype="bfloat16", rngs=nnx.Rngs(0)
    )
    seen = View(model)(jnp.zeros((1, 32, 32, 3)))
    assert (seen.taps["stage3"].dtype, seen.taps["pooled"].dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}


def test_a_config_s_network_has_cifar_s_statistics():
    assert networks.find("resnet8").mean == MEAN


def test_kernels_start_as_published():
    model = networks.construct({"architecture": "resnet32x4", "num_classes": 100}, rngs=nnx.Rngs(0))
    kernel = model.layer3[0].conv2.kernel[...]
    assert kernel.std() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    bound = 256**-0.5
    assert float(jnp.abs(model.fc.kernel[...]).max()) == pytest.approx(bound, rel=0.01)
    vgg = networks.construct({"architecture": "vgg8", "num_classes": 100}, rngs=nnx.Rngs(0))
    assert vgg.fc.kernel[...].std() == pytest.approx(0.01, rel=0.05)
    assert not vgg.block0[0].bias[...].any()
