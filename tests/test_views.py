"""Any nnx network is one of ours: its images, its way of being called, and what is read within it."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange
from flax import nnx
from PIL import Image

from tat_jax.build import all_terms, build_student, build_teacher, shapes_of
from tat_jax.configs import base
from tat_jax.data.sources import Digits
from tat_jax.networks import own
from tat_jax.networks.taps import modules_of
from tat_jax.networks.view import MEAN, STD, Outputs, View, normalize, watch
from tat_jax.usage import usage_of
from tests.tiny import Tiny

SIZE = 8


class Dense(nnx.Module):
    """A layer whose call its subclasses inherit."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.linear(x))


class Mlp(Dense):
    """A layer that inherits its call from a class that is nowhere in the model."""


class Network(nnx.Module):
    """An unmodified network: layers in every container, and a way to call the first of them."""

    def __init__(self, *, call=None, rngs):
        self.blocks = nnx.List([Mlp(rngs=rngs), Mlp(rngs=rngs)])
        self.named = nnx.Dict(last=Mlp(rngs=rngs))
        self.plain = nnx.data({"list": [Mlp(rngs=rngs)]})
        self.shared = self.blocks[1]
        self.call = call or (lambda module, x: module(x))

    def __call__(self, images):
        x = self.call(self.blocks[0], images)
        x = self.shared(x)
        return self.plain["list"][0](self.named["last"](x)).mean((1, 2))


def network(call=None):
    return Network(call=call, rngs=nnx.Rngs(0))


def images(count=2, size=SIZE, channels=3):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(count, size, size, channels)).astype(np.float32))


def pixels(count=2, size=SIZE):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def jitted(view):
    graph, state = nnx.split(view)
    run = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
    return lambda images: run(state, images)


@pytest.mark.parametrize("run", [lambda view: view, jitted], ids=["eager", "jit"])
def test_the_output_of_a_module_of_an_unmodified_network_is_read_by_its_path(run):
    model = network()
    paths = ("blocks.0", "blocks.0.linear", "shared", "named.last", "plain.list.0")
    logits, taps = run(View(model, taps=paths))(images())
    first = model.blocks[0].linear(images())
    second = model.blocks[1](jnp.tanh(first))
    third = model.named["last"](second)
    expected = [jnp.tanh(first), first, second, third, model.plain["list"][0](third)]
    assert taps.keys() == set(paths)
    for path, value in zip(paths, expected, strict=True):
        np.testing.assert_allclose(taps[path], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, model(images()), rtol=1e-5, atol=1e-6)


def test_a_module_that_holds_what_holds_it_is_found_once():
    tiny = Tiny(2, rngs=nnx.Rngs(0))
    modules = {"", "conv1", "bn1", "conv2", "bn2", "fc"}
    assert modules_of(tiny).keys() == modules
    tiny.conv2.above = nnx.data({"network": tiny})
    assert modules_of(tiny).keys() == modules


def test_a_shared_module_has_the_output_of_its_one_call_under_each_of_its_paths():
    taps = View(network(), taps=("shared", "blocks.1"))(images()).taps
    np.testing.assert_array_equal(taps["shared"], taps["blocks.1"])


def test_gradients_flow_through_a_tap_of_a_path_as_through_the_module_itself():
    graph, state = nnx.split(View(network(), taps=("blocks.1",)))

    def through_tap(state):
        return (nnx.merge(graph, state)(images()).taps["blocks.1"] ** 2).sum()

    def by_hand(state):
        model = nnx.merge(graph, state).network
        return (model.blocks[1](model.blocks[0](images())) ** 2).sum()

    found, expected = jax.jit(jax.grad(through_tap))(state), jax.grad(by_hand)(state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert jnp.abs(found["network"]["blocks"][0]["linear"]["kernel"].get_value()).sum() > 0


def test_watching_adds_taps_and_returns_the_shapes_of_what_a_network_gives_for_one_image():
    view = View(network())
    logits, taps = watch(view, ("blocks.0",), SIZE)
    assert logits.shape == (1, 3)
    assert taps["blocks.0"].shape == (1, SIZE, SIZE, 3)
    assert view(images()).taps.keys() == {"blocks.0"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blocks.0.lineer", r"the nearest of its modules are blocks\.0\.linear, blocks\.1\.linear"),
        ("blocks", r"the nearest of its modules are blocks\.1, blocks\.0"),  # a list is never called
        ("features", "the network sows nothing, and none of its modules is near"),
    ],
)
def test_a_tap_that_is_not_there_is_refused_with_the_nearest_that_are(name, said):
    view = View(network())
    with pytest.raises(ValueError, match=rf"no tap {name}: .*{said}"):
        watch(view, ("blocks.0", name), SIZE)
    assert view.taps == ()


def test_the_error_names_what_the_network_sows():
    with pytest.raises(ValueError, match="no tap layer9: the network sows layer1, layer2, and"):
        watch(View(Tiny(4, rngs=nnx.Rngs(0))), ("layer9",), SIZE)


class Sowing(Network):
    """A network that sows under the name of one of its attributes, which holds what sows as well."""

    def __call__(self, images):
        self.blocks[1].sow(nnx.Intermediate, "within", images + 1)
        self.blocks[1].sow(nnx.Intermediate, "linear", images + 2)
        self.sow(nnx.Intermediate, "blocks", images)
        return super().__call__(images)


def test_a_sown_name_that_is_an_attribute_hides_nothing_below_it_and_comes_before_its_module():
    view = View(Sowing(rngs=nnx.Rngs(0)), taps=("blocks.0.linear", "blocks.1.linear"))
    taps = view(images()).taps
    sown = {"blocks", "blocks.1.within", "shared.within", "blocks.1.linear", "shared.linear"}
    assert taps.keys() == sown | {"blocks.0.linear"}
    np.testing.assert_array_equal(taps["blocks"], images())
    np.testing.assert_array_equal(taps["blocks.1.within"], images() + 1)
    np.testing.assert_array_equal(taps["blocks.1.linear"], images() + 2)
    np.testing.assert_allclose(taps["blocks.0.linear"], view.network.blocks[0].linear(images()), rtol=1e-5)


class Summing(nnx.Module):
    """A network that sows several kinds of things, and sums what it sows under one name."""

    def __call__(self, images):
        for x in (images, images):
            self.sow(nnx.Intermediate, "sum", x, init_fn=lambda: 0.0, reduce_fn=lambda a, b: a + b)
        self.sow(nnx.Param, "other", images)
        return images


def test_sown_values_are_reduced_as_their_sow_says_and_those_of_other_types_left_alone():
    taps = View(Summing())(images()).taps
    assert taps.keys() == {"sum"}
    np.testing.assert_array_equal(taps["sum"], 2 * images())


class TestNothingIsPatched:
    def test_the_class_of_a_tapped_module_stays_as_it_is_while_the_network_runs(self):
        seen = []

        def call(module, x):
            seen.append((Dense.__call__, vars(Mlp).keys()))
            return module(x)

        before = Dense.__call__, vars(Mlp).keys()
        View(network(call), taps=("blocks.0",))(images())
        assert seen == [before]

    def test_a_network_that_raises_is_as_before(self):
        def call(module, x):
            if x.shape[0] == 1:
                raise RuntimeError("not ours")
            return module(x)

        view = View(network(call), taps=("blocks.0",))
        before = nnx.graphdef(view)
        with pytest.raises(RuntimeError, match="not ours"):
            view(images(1))
        assert nnx.graphdef(view) == before
        assert type(view.network.blocks[0]) is Mlp
        assert view(images(2)).taps["blocks.0"].shape == (2, SIZE, SIZE, 3)

    def test_threads_and_calls_within_calls_each_read_their_own(self):
        both = threading.Barrier(2, timeout=30)

        def call(module, x):
            y = module(x)
            if x.shape[0] > 1:
                both.wait()
                inner = view(x[:1]).taps["blocks.0"]
                np.testing.assert_allclose(inner, y[:1], rtol=1e-5, atol=1e-6)
            return y

        view = View(network(call), taps=("blocks.0",))
        found = {}

        def run(count):
            found[count] = view(images(count)).taps["blocks.0"]

        threads = [threading.Thread(target=run, args=(count,)) for count in (2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for count in (2, 3):
            np.testing.assert_allclose(found[count], view.network.blocks[0](images(count)), rtol=1e-5)


class Nested(Network):
    """A network whose first block runs as its argument says, and whose output is the block's."""

    def __call__(self, images):
        return self.call(self.blocks[0], images)


FLAX = {
    "nnx.remat": nnx.remat(lambda module, x: module(x)),
    "nnx.jit": nnx.jit(lambda module, x: module(x)),
    "a layer of what nnx.remat runs": nnx.remat(lambda module, x: jnp.tanh(module.linear(x))),
}


@pytest.mark.parametrize("how", FLAX)
def test_a_module_that_runs_within_remat_or_jit_of_flax_is_read(how):
    view = View(Nested(call=FLAX[how], rngs=nnx.Rngs(0)), taps=("blocks.0.linear",))
    outputs = jitted(view)(images())
    np.testing.assert_allclose(jnp.tanh(outputs.taps["blocks.0.linear"]), outputs.logits, atol=1e-6)


REFUSED = {
    "jax.checkpoint": (lambda module, x: jax.checkpoint(module)(x), "does not call it, or"),
    "jax.vmap": (lambda module, x: jax.vmap(module)(x), "within jax.checkpoint, jax.vmap"),
    "jax.lax.scan": (
        lambda module, x: jax.lax.scan(lambda y, _: (module(y), None), x, length=2)[0],
        "or jax.lax.scan, which nothing leaves but by returning; tap a module around it",
    ),
    "nnx.vmap": (
        lambda module, x: nnx.vmap(lambda module, x: module(x), in_axes=(None, 0))(module, x),
        "within nnx.cond, nnx.vmap or the like",
    ),
    "nnx.cond": (
        lambda module, x: nnx.cond(True, lambda m, x: m(x), lambda m, x: x, module, x),
        "within nnx.cond, nnx.vmap or the like",
    ),
    "never": (lambda module, x: x, "does not call it"),
    "another method": (lambda module, x: jnp.tanh(module.linear(x)), "another method than __call__"),
    "twice": (lambda module, x: module(module(x)), "there are 2 of it in a forward pass; sow the one"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_module_whose_output_cannot_be_kept_or_is_not_one_is_refused_by_its_path(how):
    call, said = REFUSED[how]
    view = View(Nested(call=call, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=said) as refused:
        watch(view, ("blocks.0",), SIZE)
    if "nnx" not in how:
        assert str(refused.value).startswith("no tap blocks.0: ")
    assert view.taps == ()
    with pytest.raises(ValueError, match=said):
        jitted(View(view.network, taps=("blocks.0",)))(images())


class Stacked(nnx.Module):
    """A network whose layers lie in one, and run in a loop of Flax."""

    def __init__(self, *, rngs):
        self.layers = nnx.vmap(lambda rngs: Mlp(rngs=rngs))(rngs.split(3))

    def __call__(self, images):
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(images, self.layers)


def test_a_network_that_scans_over_its_layers_runs_and_its_layers_are_no_one_map():
    view = View(Stacked(rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(jitted(view)(images()).logits, view.network(images()), rtol=1e-5)
    graph, state = nnx.split(view)
    gradient = jax.grad(lambda state: (nnx.merge(graph, state)(images()).logits ** 2).sum())(state)
    assert all(jnp.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(gradient))
    with pytest.raises(
        ValueError, match=r"no tap layers: its shape \(3, 1, 8, 8, 3\) does not begin with the 1"
    ):
        watch(view, ("layers",), SIZE)


class Several(Dense):
    """A layer that returns more than its map, or another thing than one."""

    def __init__(self, change, *, rngs):
        super().__init__(rngs=rngs)
        self.change = change

    def __call__(self, x):
        return self.change(super().__call__(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: (x, x), "it is a tuple, not one array"),
        (lambda x: {"map": x}, "it is a dict, not one array"),
        (lambda x: jnp.stack([x, x]), r"its shape \(2, 1, 8, 8, 3\) does not begin with the 1 images"),
    ],
)
def test_an_output_that_is_not_one_array_for_each_image_is_refused(change, said):
    def call(network, images, *, train, where):
        network.named["last"](images)
        return images

    model = network()
    model.named["last"] = Several(change, rngs=nnx.Rngs(0))
    view = View(model, call=call)
    with pytest.raises(ValueError, match=f"no tap named.last: {said}"):
        watch(view, ("named.last",), SIZE)


class Within(nnx.Module):
    """A network that sows within one of JAX's own transformations, from which nothing gets out."""

    def __call__(self, images):
        def run(x):
            self.sow(nnx.Intermediate, "map", x * 2)
            return x

        return jax.checkpoint(run)(images)


@pytest.mark.parametrize("run", [lambda view: view, jitted], ids=["eager", "jit"])
def test_what_is_sown_within_a_transformation_of_jax_is_left_out_and_refused_where_it_is_asked_for(run):
    assert run(View(Within()))(images()).taps == {}
    with pytest.raises(ValueError, match=r"no tap map: .* what is sown within jax\.checkpoint.* is not seen"):
        run(View(Within(), taps=("map",)))(images())


class SowingBlock(Dense):
    """A layer that sows what it gets."""

    def __call__(self, x):
        self.sow(nnx.Intermediate, "input", x)
        return super().__call__(x)


@pytest.mark.parametrize("how", list(FLAX)[:2])
def test_what_is_sown_within_remat_or_jit_of_flax_is_read(how):
    view = View(Nested(call=FLAX[how], rngs=nnx.Rngs(0)))
    view.network.blocks[0] = SowingBlock(rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(jitted(view)(images()).taps["blocks.0.input"], images())


class Repeating(nnx.Module):
    """A network that sows one name twice, another as a pair, and a third as it should."""

    def __call__(self, images):
        for x in (images, images + 1):
            self.sow(nnx.Intermediate, "twice", x)
        self.sow(nnx.Intermediate, "pair", (images, images))
        self.sow(nnx.Intermediate, "once", images)
        return images


def test_sown_values_that_are_no_map_are_left_out_and_refused_where_they_are_asked_for():
    assert View(Repeating())(images()).taps.keys() == {"once"}
    for name, said in {"twice": "there are 2 of it", "pair": "it is a tuple"}.items():
        with pytest.raises(ValueError, match=f"no tap {name}: {said}"):
            watch(View(Repeating()), (name,), SIZE)


def test_uint8_images_are_normalised_and_floats_taken_as_they_are():
    white = jnp.full((1, 1, 1, 3), 255, jnp.uint8)
    np.testing.assert_allclose(normalize(white)[0, 0, 0], [2.2489, 2.4286, 2.64], atol=1e-4)
    np.testing.assert_array_equal(normalize(jnp.ones((1, 1, 1, 3))), 1)


def seen_by(view, batch):
    """Return the images that reach the network of a view."""
    return View(
        Tiny(2, rngs=nnx.Rngs(0)),
        mean=view.mean,
        std=view.std,
        image_size=view.image_size,
        call=lambda network, images, *, train, where: Outputs(None, {"images": images}),
    )(batch).taps["images"]


def test_a_network_sees_images_by_its_own_mean_and_standard_deviation():
    own = View(network(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.1, 1.0))
    expected = (np.asarray(pixels()) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.1, 1.0]
    np.testing.assert_allclose(seen_by(own, pixels()), expected, atol=1e-5)
    np.testing.assert_array_equal(seen_by(own, images()), images())


@pytest.mark.parametrize(("size", "own"), [(12, 7), (8, 20)])
def test_a_network_of_another_image_size_sees_what_pytorch_resizes(size, own):
    view = View(network(), image_size=own)
    shown = torch.from_numpy(rearrange(np.asarray(pixels(size=size)), "b h w c -> b c h w").copy()).float()
    resized = torch.nn.functional.interpolate(shown, (own, own), mode="bilinear", antialias=True)
    expected = rearrange(resized.numpy(), "b c h w -> b h w c")
    expected = (expected / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(seen_by(view, pixels(size=size)), expected, atol=1e-4)


def resized_by_pillow(crop, size):
    """Return a crop in another size, each channel resized by itself in floating point."""
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in np.moveaxis(crop, -1, 0)]
    return np.stack([channel.resize((size, size), Image.Resampling.BILINEAR) for channel in channels], -1)


def test_a_config_s_teacher_and_student_see_one_crop_each_in_its_size_and_by_its_statistics():
    config = base.base()
    config.data.image_size = 24
    of_student = {"image_size": 10, "mean": (0.1, 0.2, 0.3), "std": (1.0, 0.5, 0.25)}
    config.student = base.network("resnet18", "random", width=2, **of_student)
    config.teacher = base.network("resnet18", "random", width=2)
    config.losses.tat.layer4.weight = 1.0
    student, teacher = build_student(config, 5), build_teacher(config, 5, terms=all_terms(config))
    crop = pixels(1, 24)
    expected = (resized_by_pillow(np.asarray(crop[0]), 10) / 255 - of_student["mean"]) / of_student["std"]
    np.testing.assert_allclose(seen_by(student.view, crop)[0], expected, atol=1e-5)
    assert usage_of(config, student, Digits("train"))["resized_to"] == 10
    assert "resized_to" not in usage_of(config, teacher, Digits("train"))
    expected = (np.asarray(crop[0]) / 255 - np.array(MEAN)) / STD
    np.testing.assert_allclose(seen_by(teacher.view, crop)[0], expected, atol=1e-5)


def test_images_of_the_network_s_own_size_are_not_touched():
    view, plain = (View(network(), image_size=size) for size in (SIZE, None))
    np.testing.assert_array_equal(seen_by(view, pixels()), seen_by(plain, pixels()))


class Channels(nnx.Module):
    """A network of another kind: channels come first, and results have names."""

    def __init__(self, *, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (5, 3)))
        self.stem = Stem()

    def forward(self, images, mask=None):
        x = self.stem(jnp.einsum("dc,bchw->bdhw", self.kernel.get_value(), images))
        self.sow(nnx.Intermediate, "map", x)
        return {"logits": x.mean((2, 3)), "hidden": x, "mask": mask}


class Stem(nnx.Module):
    """The half of the columns."""

    def __call__(self, x):
        return x[..., ::2]


def results(network, images, *, train, where):
    found = network.forward(images)
    return Outputs(found["logits"], {"hidden": found["hidden"]})


def test_a_network_with_channels_first_and_a_dict_of_results_gives_logits_and_maps_of_ours():
    view = View(Channels(rngs=nnx.Rngs(0)), call=results, layout="b c h w", taps=("stem",))
    logits, taps = jitted(view)(images(size=6))
    expected = jnp.einsum("dc,bhwc->bhwd", view.network.kernel.get_value(), images(size=6))[:, :, ::2]
    assert taps.keys() == {"hidden", "map", "stem"}
    for tap in taps.values():
        np.testing.assert_allclose(tap, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, expected.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_maps_of_logits_come_with_channels_last_as_well():
    def call(network, images, *, train, where):
        return images

    view = View(network(), call=call, layout="b c h w")
    np.testing.assert_array_equal(view(images(size=6)).logits, images(size=6))


def test_a_layout_that_is_none_is_refused():
    with pytest.raises(ValueError, match="layout='b h c' is no order of the axes b h w c"):
        View(network(), layout="b h c")


def test_a_result_that_is_no_logits_is_refused_with_the_way_out():
    def call(network, images, *, train, where):
        return {"logits": images}

    with pytest.raises(ValueError, match="Network returns a dict, not logits; give its View a `call`"):
        View(network(), call=call)(images())


def test_prefix_tokens_are_no_positions():
    def call(network, images, *, train, where):
        tokens = rearrange(images, "b h w c -> b (h w) c")
        return Outputs(None, {"tokens": tokens, "map": images, "features": tokens[:, 0]})

    taps = View(network(), call=call, prefix_tokens=5)(images()).taps
    np.testing.assert_array_equal(taps["tokens"], rearrange(images(), "b h w c -> b (h w) c")[:, 5:])
    np.testing.assert_array_equal(taps["map"], images())
    assert taps["features"].shape == (2, 3)


def tokens_of(count):
    """Return a way to call a network that gives so many tokens as a tap."""

    def call(network, images, *, train, where):
        return Outputs(None, {"tokens": rearrange(images, "b h w c -> b (h w) c")[:, :count]})

    return call


def test_tokens_of_a_square_grid_are_a_map_where_the_view_says_so():
    view = View(network(), call=tokens_of(27), prefix_tokens=2, tokens_as_maps=True)
    expected = rearrange(images(), "b h w c -> b (h w) c")[:, 2:27].reshape(2, 5, 5, 3)
    np.testing.assert_array_equal(view(images()).taps["tokens"], expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prefix_tokens": 16}, "its 16 tokens leave none after prefix_tokens=16"),
        ({"prefix_tokens": 20}, "its 16 tokens leave none after prefix_tokens=20"),
        (
            {"prefix_tokens": 1, "tokens_as_maps": True},
            "its 15 tokens after prefix_tokens=1 are no square grid",
        ),
    ],
)
def test_tokens_that_are_not_the_view_s_positions_are_refused_where_they_are_asked_for(options, said):
    view = View(network(), call=tokens_of(16), **options)
    assert view(images()).taps == {}
    with pytest.raises(ValueError, match=f"no tap tokens: {said}"):
        watch(view, ("tokens",), SIZE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[0], r"float32\[8, 8, 3\] for 1 images"),
        (lambda x: x.astype(jnp.int32), r"int32\[1, 8, 8, 3\] for 1 images"),
        (lambda x: [x], "a list"),
    ],
)
def test_what_is_no_logits_of_each_image_is_refused_with_the_way_out(change, said):
    view = View(network(), call=lambda network, images, *, train, where: change(images))
    with pytest.raises(ValueError, match=f"Network returns {said}, not logits; give its View a `call`"):
        watch(view, (), SIZE)


class First(nnx.Module):
    """A network whose images have their channels first, and which wants another argument."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)

    def __call__(self, images, rngs):
        return self.conv(images)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (None, r".*missing 1 required positional argument: 'rngs'"),
        (lambda network, images, *, train, where: network(images, None), r".* but 3 // 1 != 8\."),
        (lambda network, images, *, train, where: {}[""], "''"),
    ],
)
def test_a_network_that_does_not_take_its_images_is_named_in_a_line_with_the_way_out(call, said):
    with pytest.raises(
        ValueError,
        match=rf"^First does not take images of 8×8 in the layout `b h w c`: {said}; give its View",
    ) as refused:
        watch(View(First(rngs=nnx.Rngs(0)), call=call), (), SIZE)
    assert "\n" not in str(refused.value)


def test_a_network_that_gives_nothing_is_named():
    silent = View(network(), call=lambda network, images, *, train, where: None)
    config = base.base()
    with pytest.raises(ValueError, match="the student Network gives nothing to learn from: let it"):
        shapes_of(config, all_terms(config), own(silent, num_classes=5, seed=0), None)


OPTIONS = {
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "image_size": 6,
    "call": lambda network, images, *, train, where: network(images),
    "layout": "b w h c",
    "prefix_tokens": 1,
    "tokens_as_maps": True,
    "taps": ("blocks.0",),
}


def test_equal_views_of_other_weights_compile_once_and_each_option_makes_another_program():
    compiled = []

    def run(graph, state, batch):
        compiled.append(graph)
        return nnx.merge(graph, state)(batch)

    step = jax.jit(run, static_argnums=0)
    model = Network(rngs=nnx.Rngs(0))
    for seed in (0, 1):
        other = Network(call=model.call, rngs=nnx.Rngs(seed))
        step(*nnx.split(View(other, **OPTIONS)), images())
    assert len(compiled) == 1
    for name in OPTIONS:
        step(*nnx.split(View(model, **{**OPTIONS, name: getattr(View(model), name)})), images())
    assert len(compiled) == 1 + len(OPTIONS)


@pytest.mark.parametrize("make", [lambda: Tiny(4, rngs=nnx.Rngs(0)), network], ids=["sown", "by path"])
def test_a_call_leaves_neither_state_nor_structure_behind(make):
    view = View(make(), taps=("blocks.0",) if isinstance(make(), Network) else ())
    (graph, before), plain = nnx.split(view), nnx.graphdef(view.network)
    assert view(images()).taps
    after, state = nnx.split(view)
    assert (after, nnx.graphdef(view.network)) == (graph, plain)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, state))


def test_a_training_call_updates_running_statistics_in_place_and_nothing_else():
    view = View(Tiny(4, rngs=nnx.Rngs(0)))
    graph, before = nnx.split(view)
    before = jax.tree.map(jnp.array, before)
    view(images(), train=True, where=jnp.ones(2, bool))
    after, state = nnx.split(view)
    assert after == graph
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, state)
    changed = [".".join(map(str, path)) for path, leaf in nnx.to_flat_state(changed) if leaf.get_value()]
    assert sorted(changed) == [f"network.bn{i}.{name}" for i in (1, 2) for name in ("mean", "var")]


class Standard(nnx.Module):
    """A network with Flax's own normalisation and dropout, in training mode as they are built."""

    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images):
        return self.dropout(self.norm(images)).mean((1, 2))


def test_flax_s_own_layers_evaluate_by_running_statistics_and_without_dropout():
    view = View(Standard(rngs=nnx.Rngs(0)))
    graph, before = nnx.split(view)
    np.testing.assert_allclose(view(images()).logits, images().mean((1, 2)), rtol=1e-4)
    after, state = nnx.split(view)
    assert after == graph
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), before, state))


def test_flax_s_own_layers_train_by_a_call_of_their_own():
    view = View(Standard(rngs=nnx.Rngs(0)), call=lambda network, images, *, train, where: network(images))
    first, second = (view(images(), train=True).logits for _ in range(2))
    assert not np.allclose(first, second)  # other draws of the dropout: its counter moves on
    assert jnp.abs(view.network.norm.mean.get_value()).sum() > 0


def test_a_student_that_takes_images_alone_is_refused_with_the_way_out():
    said = r"Standard cannot be called as network\(images, train=True, where=…\), .*; give its View a `call`"
    with pytest.raises(ValueError, match=said):
        View(Standard(rngs=nnx.Rngs(0)))(images(), train=True)
