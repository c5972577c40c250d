"""Networks of others teach, and are taught where they can be, by the code that docs/networks.md prints."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import equinox as eqx
import grain  # noqa: F401  it defines flags, which must be there before they are saved
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from einops import rearrange
from flax import nnx

from tat_jax import cli, config_files, networks
from tat_jax.metrics import read_rows
from tat_jax.networks.precision import narrow
from tat_jax.networks.view import normalize, watch
from tat_jax.weights import folders, store
from tests.interpreter import run_python

DOCS = (Path(__file__).parents[1] / "docs" / "networks.md").read_text()
THEIRS = Path(__file__).parent / "elsewhere"
SECTION = r"^## ([^\n]+)\n(?:(?!^## ).)*?```python\n(.*?)```"
PRINTED = dict(re.findall(SECTION, DOCS, flags=re.DOTALL | re.MULTILINE))
LINEN_TAPS = ("stem", "stage", "stage.Conv_0", "stage.squared")


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Work in a folder where their modules are found, and leave nothing behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(THEIRS))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("their_"):
            del sys.modules[name]


def printed(heading, folder):
    """Return the network of a section, as `--teacher` builds it of the section's file."""
    (folder / "mine.py").write_text(PRINTED[heading])
    return networks.own(config_files.load_builder("mine.py:build"), num_classes=10, seed=0).view


def pixels(count=2, size=32):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def outputs_of(view):
    """Return what a view gives within a program."""
    graph, state = nnx.split(view)
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, pixels())


def assert_close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_every_section_of_a_library_has_its_file():
    assert PRINTED.keys() == {"Flax nnx", "Linen", "Equinox", "Keras 3"}


def test_one_of_nnx_with_its_own_layout_results_and_random_stream_is_what_it_is_by_itself(here):
    view = printed("Flax nnx", here)
    logits, taps = outputs_of(view)
    theirs = view.network.network
    theirs.eval()
    images = rearrange(normalize(pixels(), (0.5,) * 3, (0.5,) * 3), "b h w c -> b c h w")
    expected = theirs(images, nnx.Rngs(0))
    assert_close(logits, expected["scores"])
    assert_close(taps["layer4"], rearrange(expected["features"], "b c h w -> b h w c"))


class TestLinen:
    def test_it_is_what_it_is_by_itself_with_a_tap_for_each_module_and_all_that_it_sows(self, here):
        view = printed("Linen", here)
        watch(view, LINEN_TAPS, 32)
        logits, taps = outputs_of(view)
        module, variables = importlib.import_module("their_linen").load(10)
        expected, kept = module.apply(
            variables,
            normalize(pixels()),
            train=False,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        assert_close(logits, expected)
        stage = kept["intermediates"]["stage"]
        assert_close(taps["stage"], stage["__call__"][0])
        assert_close(taps["stage.Conv_0"], stage["Conv_0"]["__call__"][0])
        assert_close(taps["stage.squared"], stage["__call__"][0] ** 2)

    def test_in_training_its_statistics_are_updated_as_it_updates_them(self, here):
        view = printed("Linen", here)
        view(pixels(), train=True, where=jnp.ones(2, bool))
        module, variables = importlib.import_module("their_linen").load(10)
        _, after = module.apply(variables, normalize(pixels()), train=True, mutable=["batch_stats"])
        expected = after["batch_stats"]["stage"]["BatchNorm_0"]
        for name, variable in view.network.statistics["stage"]["BatchNorm_0"].items():
            assert_close(variable[...], expected[name])

    def test_a_tap_that_it_has_not_is_refused_with_those_that_it_has(self, here):
        with pytest.raises(ValueError, match=r"no tap stages: the network sows stem\.Conv_0, .*, stage,"):
            watch(printed("Linen", here), ("stages",), 32)


def test_an_equinox_module_with_a_state_is_what_it_is_by_itself_in_inference(here):
    view = printed("Equinox", here)
    logits, taps = outputs_of(view)
    module, state = importlib.import_module("their_equinox").load(10)
    module = eqx.nn.inference_mode(module)
    images = rearrange(normalize(pixels()), "b h w c -> b c h w")
    run = jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    (expected, features), _ = run(images, state)
    assert jnp.isfinite(expected).all()
    assert_close(logits, expected)
    assert_close(taps["layer4"], rearrange(features, "b c h w -> b h w c"))


@pytest.mark.parametrize("heading", ["Flax nnx", "Linen", "Equinox"])
def test_its_kernels_may_lie_in_bfloat16(heading, here):
    view = printed(heading, here)
    before, _ = outputs_of(view)
    narrow(view, jnp.bfloat16)
    types = {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(view, nnx.Param)) if leaf.ndim > 1}
    assert types == {"bfloat16"}
    after, _ = outputs_of(view)
    assert after.dtype == jnp.float32
    assert_close(after, before, 2e-2)
    assert (after != before).any()


# Without importing it here, which would import TensorFlow with it.
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras is not installed")
def test_a_keras_model_is_what_it_is_by_itself_in_inference(here, monkeypatch):
    (here / "mine.py").write_text(PRINTED["Keras 3"])
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    run_python(
        f"""
        import sys
        sys.path[:0] = [{str(THEIRS)!r}]
        import jax, keras, numpy as np
        from flax import nnx
        from tat_jax import config_files, networks
        from their_keras import load

        build = config_files.load_builder({str(here / "mine.py:build")!r})
        view = networks.own(build, num_classes=10, seed=0).view
        pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        graph, state = nnx.split(view)
        logits, taps = jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, pixels)
        theirs = load(10)
        np.testing.assert_allclose(logits, theirs(pixels / np.float32(255), training=False), atol=1e-5)
        assert (taps["stem"].shape, taps["stage"].shape) == ((2, 8, 8, 8), (2, 2, 2, 16))
        """
    )


def test_by_the_command_line_it_teaches_and_is_taught_and_the_teacher_stays_out_of_the_checkpoint(here):
    (here / "mine.py").write_text(PRINTED["Flax nnx"])
    words = ["--config=r18_r34:smoke", "--workdir=run", "--student=mine.py:build", "--teacher=mine.py:build"]
    fields = {"epochs": 1, "data.labels_per_class": 4, "batch_size": 40, "data.threads": 1, "log_every": 1}
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        cli.parse_flags(["main.py", *words, *(f"--config.{name}={value}" for name, value in fields.items())])
        cli.main([])
    row = read_rows(here / "run")[0]
    assert row["train/tat_layer4"] > 0
    step = folders.last(here / "run")
    saved = store.load_network(step).weights
    student = printed("Flax nnx", here).network
    own = store.network_weights(student)
    assert saved.keys() == own.keys()
    kernels = [name for name in own if name.endswith("kernel")]
    assert all((np.asarray(saved[name]) != np.asarray(own[name])).any() for name in kernels)  # it was trained
    arrays = [store.load_item(step / item) for item in ("student", "training")]
    shapes = [leaf.shape for leaf in jax.tree.leaves(arrays) if leaf.shape == (3, 3, 8, 16)]
    assert len(shapes) == 3  # the student's, and two moments of it
    known = json.dumps(store.read_sealed(step / "data"))
    teacher = nnx.state(networks.own(config_files.load_builder("mine.py:build"), num_classes=10, seed=0).view)
    assert store.digest(store.flatten(teacher)) in known
