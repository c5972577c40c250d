"""Without labels: networks without a head, the losses that refuse them, and images that have no classes."""

import jax
import numpy as np
import pytest
from flax import nnx

from tat_jax import fields, networks, sharding
from tat_jax.build import build
from tat_jax.configs import base
from tat_jax.networks.view import View
from tat_jax.weights import store
from tat_jax.weights.names import export_entries
from tat_jax.weights.store import StoredNetwork
from tests.tiny import Tiny

NARROW = {"architecture": "resnet18", "small_images": True, "width": 2}


def built_network(*, classes, fit_head=True, **changes):
    entry = fields.defaults(networks.FIELDS)
    with entry.ignore_type():
        entry.update(NARROW | changes)
    return networks.build(entry, num_classes=classes, dtype="float32", seed=7, fit_head=fit_head)


def keep(network, folder):
    weights = store.network_weights(network.view.network)
    store.save_network(folder, StoredNetwork(weights, network.arguments, network.origin))
    return str(folder)


@pytest.fixture
def headless(tmp_path):
    return keep(built_network(classes=0), tmp_path / "headless")


@pytest.mark.parametrize(("architecture", "head"), [("resnet18", "fc"), ("mobilenet_v2", "classifier")])
def test_a_network_without_a_head_gives_the_features_that_its_head_would_read_and_no_logits(
    architecture, head
):
    narrow = {"width": 2} if architecture != "mobilenet_v2" else {}

    def parts(classes):
        return networks.construct(
            {"architecture": architecture, "num_classes": classes, **narrow}, rngs=nnx.Rngs(0)
        )

    whole, without = parts(5), parts(0)
    weights = store.network_weights(whole)
    of_head = {path for path in weights if path.startswith(f"{head}.")}
    assert store.network_weights(without).keys() == weights.keys() - of_head != weights.keys()
    store.set_weights(
        without, {path: a for path, a in weights.items() if path not in of_head}, source="a test"
    )
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    given, bare = View(whole)(images), View(without)(images)
    assert bare.logits is None
    np.testing.assert_array_equal(bare.taps["pooled"], given.taps["pooled"])
    layer = whole.fc if head == "fc" else whole.classifier[1]
    np.testing.assert_allclose(layer(given.taps["pooled"]), given.logits, rtol=1e-5, atol=1e-6)


def test_features_of_a_network_in_bfloat16_are_means_in_float32():
    network = networks.construct({**NARROW, "num_classes": 0}, dtype="bfloat16", rngs=nnx.Rngs(0))
    assert View(network)(np.zeros((1, 16, 16, 3), np.uint8)).taps["pooled"].dtype == np.float32


def test_a_network_without_a_head_is_kept_as_one_and_restored_and_exported(headless):
    restored = networks.restore(headless)
    assert restored.arguments["num_classes"] == 0
    assert restored.origin["head"] == "none"
    assert restored.view(np.zeros((1, 16, 16, 3), np.uint8)).logits is None
    entries = export_entries(store.load_network(headless))
    assert "layer4.1.conv2.weight" in entries
    assert not any(name.startswith("fc.") for name in entries)


def test_a_student_from_weights_without_a_head_gets_a_fresh_one_for_the_data_s_classes(headless):
    student = built_network(classes=3, weights=headless)
    kept = store.load_network(headless).weights
    assert student.origin["head"] == "fresh"
    assert student.view(np.zeros((1, 16, 16, 3), np.uint8)).logits.shape == (1, 3)
    own = store.network_weights(student.view.network)
    assert own.keys() - kept.keys() == {"fc.kernel", "fc.bias"}
    np.testing.assert_array_equal(own["layer4.1.conv2.kernel"], kept["layer4.1.conv2.kernel"])


def test_a_student_from_weights_with_a_head_leaves_it_out_where_the_data_has_no_classes(tmp_path):
    with_head = keep(built_network(classes=5), tmp_path / "with_head")
    student = built_network(classes=0, weights=with_head)
    assert student.origin["head"] == "none"
    assert not any(path.startswith("fc.") for path in store.network_weights(student.view.network))


def test_a_teacher_without_a_head_stays_without_one(headless):
    teacher = built_network(classes=3, weights=headless, fit_head=False)
    assert (teacher.arguments["num_classes"], teacher.origin["head"]) == (0, "none")


def test_a_network_of_pixels_cannot_do_without_classes():
    with pytest.raises(ValueError, match=r"DeepLabV3\+ classifies pixels, and there are no classes"):
        networks.construct({"architecture": "deeplab_resnet18", "num_classes": 0}, rngs=nnx.Rngs(0))


def training(classes, *, of_student=None, of_teacher=None, **weights):
    """Build a training of so many classes, with losses of these weights."""
    config = base.base()
    config.data.image_size = 16
    for which in (config.student, config.teacher):
        which.update({"weights": "random", **NARROW})
    config.losses.cross_entropy.weight = 0.0
    for loss, weight in weights.items():
        (config.losses.tat.layer4 if loss == "tat" else config.losses[loss]).weight = weight
    return build(
        config,
        sharding.make_mesh(jax.devices()[:1]),
        num_classes=classes,
        steps_per_epoch=1,
        student=of_student,
        teacher=of_teacher,
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "pixel_cross_entropy"])
def test_a_loss_against_labels_refuses_by_name_images_that_have_none(loss):
    with pytest.raises(ValueError, match=f"^{loss} reads labels, and the images have none: set the weight"):
        training(0, tat=1.0, **{loss: 1.0})


def test_a_loss_between_logits_refuses_by_name_a_student_without_a_head():
    with pytest.raises(ValueError, match=r"^kd reads logits, and the student gives none, as it has no head"):
        training(0, kd=1.0, tat=1.0, of_teacher=built_network(classes=3))


def test_a_loss_between_logits_refuses_by_name_a_teacher_without_a_head():
    headless = networks.Network(
        View(networks.construct({**NARROW, "num_classes": 0}, rngs=nnx.Rngs(0))),
        {**NARROW, "num_classes": 0},
        {"head": "none", "source": "a file"},
    )
    with pytest.raises(ValueError, match="the teacher from a file has no trained head, and kd compares its"):
        training(3, kd=1.0, of_teacher=headless)


def test_a_network_of_one_s_own_without_a_head_refuses_cross_entropy_by_name():
    class Headless(Tiny):
        def __call__(self, images, *, train=False, where=None):
            super().__call__(images, train=train, where=where)

    with pytest.raises(ValueError, match=r"^cross_entropy reads logits, and the student gives none"):
        training(3, cross_entropy=1.0, of_student=Headless(2, rngs=nnx.Rngs(0)))


def test_what_compares_taps_alone_trains_without_labels_and_without_heads():
    built = training(0, tat=1.0)
    assert built.student.origin["head"] == "none"
    assert not built.recipe.teacher_has_head
    assert not any("fc" in map(str, path) for path, _ in nnx.to_flat_state(built.state.params))


def test_kd_needs_no_labels_where_both_networks_have_a_head():
    own = Tiny(2, rngs=nnx.Rngs(0))
    assert training(0, kd=1.0, of_student=own, of_teacher=own).recipe.teacher_has_head
