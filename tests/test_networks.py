"""The networks a config names: built alike for student and teacher, with the weights that it says."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from tat_jax import fields, networks
from tat_jax.networks.architecture import Architecture
from tat_jax.networks.view import MEAN, View
from tat_jax.weights import store
from tat_jax.weights.store import StoredNetwork
from tests.tiny import Tiny

NARROW = {"architecture": "resnet18", "small_images": True, "width": 2}


def entry(**changes):
    """Return a config's entry of a narrow network."""
    config = fields.defaults(networks.FIELDS)
    with config.ignore_type():
        config.update(NARROW | changes)
    return config


def build(config, *, classes=5, seed=0, fit_head=True):
    return networks.build(config, num_classes=classes, dtype="float32", seed=seed, fit_head=fit_head)


def kernel_and_head(network):
    weights = store.network_weights(network.view.network)
    return np.asarray(weights["layer4.1.conv2.kernel"]), np.asarray(weights["fc.kernel"])


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a network as it was built, and returns the folder and the network."""

    def save(config=None, *, head="trained", classes=5):
        built = build(config or entry(), classes=classes, seed=7)
        folder = tmp_path / "saved"
        weights = store.network_weights(built.view.network)
        origin = {"head": head, "source": "a test"}
        store.save_network(folder, StoredNetwork(weights, built.arguments, origin))
        return str(folder), built

    return save


def test_the_defaults_of_the_fields_are_allowed_and_build_a_network_of_imagenet_s_statistics():
    config = fields.defaults(networks.FIELDS)
    assert list(fields.wrong(networks.FIELDS, config.to_dict())) == []
    assert (config.mean, config.std, config.image_size, config.width) == (None, None, None, 64)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "resnet19"),
        ("architecture", ["resnet18"]),
        ("width", 0),
        ("mean", (0.5, 0.5)),
        ("std", (0.5, 0.0, 0.5)),
        ("image_size", 0),
    ],
)
def test_a_field_that_no_network_can_have_is_refused(field, value):
    (line,) = fields.wrong(networks.FIELDS, entry(**{field: value}).to_dict())
    assert line.startswith(f"{field}={value!r}: allowed is ")


@pytest.mark.parametrize("fit_head", [True, False], ids=["student", "teacher"])
def test_random_weights_follow_the_seed_and_the_classes_are_the_data_s(fit_head):
    first, again, other = (build(entry(), seed=seed, fit_head=fit_head) for seed in (0, 0, 1))
    assert first.origin == {"head": "random", "source": "random weights, seed 0"}
    assert first.arguments == {**NARROW, "num_classes": 5}
    np.testing.assert_array_equal(kernel_and_head(first)[0], kernel_and_head(again)[0])
    assert not np.array_equal(kernel_and_head(first)[0], kernel_and_head(other)[0])
    assert first.view(jnp.zeros((1, 16, 16, 3), jnp.uint8)).logits.shape == (1, 5)


@pytest.mark.parametrize("fit_head", [True, False], ids=["student", "teacher"])
def test_saved_weights_come_back_with_their_head_and_their_origin(saved, fit_head):
    folder, was = saved()
    found = build(entry(weights=folder), fit_head=fit_head)
    for ours, theirs in zip(kernel_and_head(found), kernel_and_head(was), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert found.origin == {"head": "trained", "source": folder}
    assert found.arguments == was.arguments


@pytest.mark.parametrize(("head", "classes"), [("fresh", 5), ("trained", 3)])
def test_a_student_s_head_that_is_missing_or_of_other_classes_starts_afresh(saved, head, classes):
    folder, was = saved(head=head)
    found = build(entry(weights=folder), classes=classes, seed=1)
    assert found.origin == {"head": "fresh", "source": folder}
    assert found.arguments["num_classes"] == classes
    kernel, fresh = kernel_and_head(found)
    np.testing.assert_array_equal(kernel, kernel_and_head(was)[0])
    np.testing.assert_array_equal(fresh, kernel_and_head(build(entry(), classes=classes, seed=1))[1])


def test_a_teacher_keeps_its_head_and_its_classes(saved):
    folder, was = saved(head="fresh")
    found = build(entry(weights=folder), classes=3, fit_head=False)
    assert found.origin == {"head": "fresh", "source": folder}
    assert found.arguments["num_classes"] == 5
    np.testing.assert_array_equal(kernel_and_head(found)[1], kernel_and_head(was)[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "resnet34"}, "architecture=resnet18, the config has resnet34"),
        ({"width": 4}, "width=2, the config has 4"),
        ({"small_images": False}, "small_images=True, the config has False"),
        ({"mean": (0.5, 0.5, 0.5)}, r"mean=\[0.485, 0.456, 0.406\], the config has \[0.5, 0.5, 0.5\]"),
    ],
)
@pytest.mark.parametrize("fit_head", [True, False], ids=["student", "teacher"])
def test_weights_of_another_network_than_the_config_s_are_named(saved, changes, said, fit_head):
    folder, _ = saved()
    with pytest.raises(ValueError, match=f"{folder} holds a network of {said}"):
        build(entry(weights=folder, **changes), fit_head=fit_head)


SEGMENTING = {"architecture": "deeplab_resnet18", "small_images": False, "weights": "random"}


@pytest.fixture
def backbone(saved):
    """Return the folder of a narrow ResNet-18 for larger images, and its weights."""
    folder, was = saved(entry(small_images=False), classes=7)
    return folder, store.network_weights(was.view.network)


@pytest.mark.parametrize("classes", [5, 7])
def test_a_student_starts_from_the_weights_of_its_backbone_the_rest_from_the_seed(backbone, classes):
    folder, weights = backbone
    drawn = build(entry(**SEGMENTING), classes=classes, seed=3)
    found = build(entry(**SEGMENTING | {"weights": folder}), classes=classes, seed=3)
    assert found.origin == {"head": "fresh", "source": folder}
    assert found.arguments == drawn.arguments
    assert found.view(jnp.zeros((1, 16, 16, 3), jnp.uint8)).logits.shape == (1, 16, 16, classes)
    expected = store.network_weights(drawn.view.network)
    for path, array in store.network_weights(found.view.network).items():
        name = path.removeprefix("backbone.")
        np.testing.assert_array_equal(array, weights[name] if name != path else expected[path])


def test_a_teacher_is_no_backbone(backbone):
    folder, _ = backbone
    said = f"{folder} holds no deeplab_resnet18, but its backbone alone, resnet18"
    with pytest.raises(ValueError, match=said):
        build(entry(**SEGMENTING | {"weights": folder}), fit_head=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 4}, "width=2, the config has 4"),
        ({"architecture": "deeplab_resnet34"}, "architecture=resnet18, the config has deeplab_resnet34"),
    ],
)
def test_a_backbone_of_another_network_than_the_config_s_is_named(backbone, changes, said):
    folder, _ = backbone
    with pytest.raises(ValueError, match=f"{folder} holds a network of {said}"):
        build(entry(**SEGMENTING | {"weights": folder} | changes))


def test_a_stem_for_small_images_is_no_backbone_s(saved):
    folder, _ = saved()
    with pytest.raises(ValueError, match="small_images=True, the config has False"):
        build(entry(**SEGMENTING | {"weights": folder}))


def test_the_same_weights_fit_any_output_stride_and_any_dropout(saved):
    folder, was = saved(entry(**SEGMENTING))
    changes = {"weights": folder, "output_stride": 8, "aspp_dropout": False}
    found = build(entry(**SEGMENTING | changes), fit_head=False)
    assert found.arguments == was.arguments | {"output_stride": 8, "aspp_dropout": False}
    weights = store.network_weights(was.view.network)
    for path, array in store.network_weights(found.view.network).items():
        np.testing.assert_array_equal(array, weights[path])


def test_weights_that_nobody_publishes_are_made_from_a_file(tmp_path):
    command = f"convert deeplab_resnet18 --from FILE --to {tmp_path / 'none'}"
    with pytest.raises(FileNotFoundError, match=command):
        build(entry(**SEGMENTING | {"weights": str(tmp_path / "none")}))


def test_weights_that_are_not_there_are_named_with_the_command_that_makes_them(tmp_path):
    folder = tmp_path / "none"
    with pytest.raises(FileNotFoundError, match=f"python -m tat_jax.convert resnet18 --to {folder}"):
        build(entry(weights=str(folder)))


@pytest.mark.parametrize("name", ["w.pth", "w.pth.tar"])
def test_a_file_that_is_named_as_weights_comes_with_a_command_that_makes_them_of_it(name, tmp_path):
    file = tmp_path / name
    file.touch()
    advice = f"python -m tat_jax.convert resnet18 --from {file} --to weights/w, and name weights/w instead"
    with pytest.raises(NotADirectoryError, match=advice):
        build(entry(weights=str(file)))
    with pytest.raises(NotADirectoryError, match=f"ARCHITECTURE --from {file} --to weights/w"):
        networks.restore(file)


def test_a_folder_that_is_there_and_holds_no_weights_is_not_to_be_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path}: train one"):
        build(entry(weights=str(tmp_path)))


OWN = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "image_size": 8}


def test_a_network_s_own_statistics_and_size_are_kept_on_disk_and_need_no_config(saved):
    folder, was = saved(entry(**OWN))
    assert store.load_network(Path(folder)).arguments == was.arguments
    for found in (networks.restore(folder), build(entry(weights=folder, **OWN))):
        assert (found.view.mean, found.view.std, found.view.image_size) == tuple(OWN.values())
        assert found.arguments == was.arguments
        assert nnx.graphdef(found.view) == nnx.graphdef(was.view)


def test_the_same_weights_may_see_images_of_another_size(saved):
    folder, _ = saved(entry(**OWN))
    assert build(entry(weights=folder, **OWN | {"image_size": 12})).view.image_size == 12


def test_mean_and_deviation_are_the_architecture_s_where_a_config_does_not_say(saved, monkeypatch):
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4)}
    monkeypatch.setitem(networks.ARCHITECTURES, "half", networks.find("resnet18")._replace(**half))
    folder, was = saved(entry(architecture="half"))
    assert (was.view.mean, was.view.std) == tuple(half.values())
    assert not was.arguments.keys() & half.keys()
    assert networks.restore(folder).view.mean == half["mean"]
    with pytest.raises(ValueError, match=r"mean=\[0.5, 0.5, 0.5\], the config has \[0.485, "):
        build(entry(architecture="half", weights=folder, mean=MEAN))


def test_what_goes_without_saying_is_not_kept_on_disk(saved):
    _, was = saved(entry(mean=list(MEAN)))
    assert was.arguments == {**NARROW, "num_classes": 5}


class Flat(nnx.Module):
    """A network of no options."""

    def __init__(self, *, num_classes, dtype, bn_group, rngs):
        self.fc = nnx.Linear(3, num_classes, rngs=rngs)

    def __call__(self, images):
        return self.fc(images.mean((1, 2)))


FLAT = Architecture(build=Flat, head="fc", options={}, read_arguments=lambda entries: {"num_classes": 2})


def test_an_option_that_an_architecture_does_not_have_must_stay_as_it_is(monkeypatch):
    monkeypatch.setitem(networks.ARCHITECTURES, "flat", FLAT)
    plain = fields.defaults(networks.FIELDS)
    plain.architecture = "flat"
    assert build(plain).arguments == {"architecture": "flat", "num_classes": 5}
    plain.width = 32
    with pytest.raises(ValueError, match="flat has no width, so that it must stay 64"):
        build(plain)


def test_a_family_of_networks_is_one_new_file(tmp_path, monkeypatch):
    text = "from tests.test_networks import FLAT\nARCHITECTURES = {'flat': FLAT}\n"
    (tmp_path / "flat.py").write_text(text)
    monkeypatch.setattr(networks, "__path__", [*networks.__path__, str(tmp_path)])
    assert networks._found().keys() == networks.ARCHITECTURES.keys() | {"flat"}


def test_an_architecture_that_is_none_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"no architecture 'resnet19'; there are .*, resnet18, resnet34"):
        networks.construct({"architecture": "resnet19", "num_classes": 2}, rngs=nnx.Rngs(0))


def own(given):
    return networks.own(given, num_classes=5, seed=3)


def test_a_network_of_one_s_own_is_a_network_like_ours():
    model = Tiny(4, rngs=nnx.Rngs(0))
    view = View(model, image_size=4)
    for given in (model, view):
        found = own(given)
        assert found.view.network is model
        assert (found.arguments, found.origin) == ({}, {"head": "trained", "source": "your own code"})
        assert own(found) is found
    assert own(view).view is view


def test_what_builds_a_network_of_one_s_own_is_called_with_the_classes_and_the_seed():
    def build(*, num_classes, rngs):
        return Tiny(4, classes=num_classes, rngs=rngs)

    built, expected = (own(given).view.network for given in (build, Tiny(4, classes=5, rngs=nnx.Rngs(3))))
    weights = store.network_weights(expected)
    for name, array in store.network_weights(built).items():
        np.testing.assert_array_equal(array, weights[name])


def test_what_is_no_network_is_refused():
    for given in ({}, lambda num_classes, rngs: {}):
        with pytest.raises(
            ValueError, match=r"a dict is no network: it must be a flax\.nnx module, or a View"
        ):
            own(given)


def test_the_weights_of_a_network_of_one_s_own_are_read_into_it(tmp_path):
    def build(*, num_classes, rngs):
        return Tiny(2, classes=num_classes, rngs=rngs)

    weights = store.network_weights(build(num_classes=3, rngs=nnx.Rngs(7)))
    origin, usage = {"head": "trained", "source": "a test"}, {"num_classes": 3, "classes": ["a", "b", "c"]}
    store.save_network(tmp_path / "own", StoredNetwork(weights, {}, origin, usage))
    found = networks.restore(tmp_path / "own", network=build)
    assert found.usage == usage
    read = store.network_weights(found.view.network)
    assert read.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("read", [networks.restore, lambda folder: build(entry(weights=folder))])
def test_a_network_of_one_s_own_on_disk_is_not_built_here(tmp_path, read):
    weights = store.network_weights(Tiny(2, rngs=nnx.Rngs(0)))
    store.save_network(tmp_path / "own", StoredNetwork(weights, {}, {"head": "trained", "source": "Tiny"}))
    with pytest.raises(
        ValueError, match=r"network of your own; name what builds it, as --student=mine\.py:build"
    ):
        read(str(tmp_path / "own"))


def test_an_entry_may_be_a_config_or_a_plain_mapping():
    config = entry(**OWN)
    assert isinstance(config, ConfigDict)
    assert build(config).arguments == build(config.to_dict()).arguments
