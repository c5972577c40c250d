"""SimKD's projector and its teacher's classifier, CAT-KD's class maps: heads that methods give students."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tat_jax import evaluate, train
from tat_jax.batch import Batch
from tat_jax.build import build
from tat_jax.configs import cifar100
from tat_jax.losses.simkd import SimKD
from tat_jax.networks import construct
from tat_jax.networks.heads import Frozen
from tat_jax.networks.view import Outputs, View
from tat_jax.sharding import make_mesh
from tat_jax.weights import store

NETWORKS = ["resnet8", "vgg8", "shufflenet_v2"]


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@nnx.jit
def seen(network):
    return View(network)(drawn((2, 32, 32, 3)))


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_mean_of_class_maps_and_the_bias(name):
    network = construct({"architecture": name, "num_classes": 7}, rngs=nnx.Rngs(0))
    network.fc.bias[...] = drawn(7)
    outputs = seen(network)
    mean = outputs.taps["class_maps"].mean((1, 2)) + network.fc.bias[...][None]
    np.testing.assert_allclose(outputs.logits, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_projector_reads_the_last_stage_and_its_head_is_not_trained(name):
    arguments = {"architecture": name, "num_classes": 7, "projected": 24}
    network = construct(arguments, rngs=nnx.Rngs(0))
    outputs = seen(network)
    taps, last = outputs.taps, max(n for n in outputs.taps if n.startswith("stage") and n[5:].isdigit())
    assert taps["projected"].shape == (*taps[last].shape[:3], 24)
    assert outputs.logits.shape == (2, 7)
    frozen = nnx.to_flat_state(nnx.state(network, Frozen))
    assert sorted(path for path, _ in frozen) == [("fc", "bias"), ("fc", "kernel")]
    again = construct(arguments, rngs=nnx.Rngs(1))
    store.set_weights(again, store.network_weights(network), source="the first")
    np.testing.assert_array_equal(seen(again).logits, outputs.logits)


def test_a_head_without_bias_has_none_and_neither_has_a_network_without_a_head():
    network = construct({"architecture": "resnet8", "num_classes": 7, "head_bias": False}, rngs=nnx.Rngs(0))
    assert "fc.bias" not in store.network_weights(network)
    headless = {"architecture": "resnet8", "num_classes": 0, "projected": 24}
    assert View(construct(headless, rngs=nnx.Rngs(0)))(drawn((1, 32, 32, 3))).logits is None


def config_of(method):
    config = cifar100.get_config(f"resnet110-resnet20,{method},smoke")
    config.student.architecture, config.teacher.architecture = "resnet8", "resnet14"
    config.data.update({"image_size": 32, "eval_resize": 32})
    return config


def built(config):
    return build(config, make_mesh(jax.devices()[:1]), num_classes=10, steps_per_epoch=2)


def test_the_student_starts_with_the_teacher_s_classifier_and_keeps_it(tmp_path):
    config = config_of("simkd")
    of_training = built(config)
    student = of_training.state.variables["student"]["network"]["fc"]
    teacher = of_training.teacher["network"]["fc"]
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(student[leaf][...], teacher[leaf][...])
    row = train.run(config, tmp_path)["last"]
    network = evaluate.load(config, tmp_path, "last")[0].view.network
    np.testing.assert_array_equal(network.fc.kernel[...], teacher["kernel"][...])
    assert evaluate.run(config, tmp_path, "last").measures["top1"] == row["eval/top1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projected": None}, "simkd: the student has no projector .*: set student.projected"),
        (
            {"projected": 32},
            "student.projected=32 and 10 classes do not fit .* of 64 features and 10 classes",
        ),
    ],
)
def test_a_student_that_the_classifier_does_not_fit_is_refused(changes, message):
    config = config_of("simkd")
    config.student.update(changes)
    with pytest.raises(ValueError, match=message):
        built(config)


def test_a_larger_grid_than_the_teacher_s_is_refused():
    config = config_of("simkd")
    config.losses.simkd.teacher_tap = "pooled"
    with pytest.raises(ValueError, match=r"simkd: the taps must be maps"):
        built(config)
    config = cifar100.get_config("resnet32x4-shufflenet_v1,simkd,smoke")
    config.teacher.architecture, config.student.architecture = "shufflenet_v1", "resnet8"
    config.student.projected = 960
    with pytest.raises(
        ValueError, match=r"\[8, 8, 960\], the teacher's \[4, 4, 960\].*may not be the larger"
    ):
        built(config)


def test_class_maps_of_other_classes_cannot_be_compared():
    config = config_of("catkd")
    assert "bias" not in built(config).state.params["student"]["network"]["fc"]
    config.losses.catkd.teacher_tap = "stage3"
    with pytest.raises(ValueError, match=r"catkd: class maps of 10 classes .* a teacher's of 64"):
        built(config)


def test_simkd_averages_a_teacher_s_larger_map_over_the_student_s_grid():
    ours, theirs = drawn((3, 4, 4, 5), 1), drawn((3, 8, 8, 5), 2)
    batch = Batch(np.zeros((3, 1, 1, 3), np.uint8), None, np.ones(3, bool))
    found = SimKD()(Outputs(None, {"projected": ours}), Outputs(None, {"stage3": theirs}), batch, train=True)
    averages = np.asarray(theirs, np.float64).reshape(3, 4, 2, 4, 2, 5).mean((2, 4))
    expected = ((np.asarray(ours, np.float64) - averages) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
