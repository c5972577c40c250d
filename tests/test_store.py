"""A network on disk: read back as it was written, by any version, or refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tat_jax.weights import folders, store
from tat_jax.weights.orbax_quiet import reason
from tat_jax.weights.store import StoredNetwork
from tests.tiny import Tiny

ORIGIN = {"head": "trained", "source": "a test"}


def tiny(width=2, seed=0, **options):
    return Tiny(width, rngs=nnx.Rngs(seed), **options)


def written(folder, seed=0):
    """Write a network, and return it."""
    network = StoredNetwork(store.network_weights(tiny(seed=seed)), {"width": 2}, ORIGIN)
    store.save_network(folder, network)
    return network


def change(path, before, after):
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))


def test_a_network_is_read_as_it_was_written_under_its_own_names_and_in_silence(tmp_path, caplog):
    network = written(tmp_path / "w")
    found = store.load_network(tmp_path / "w")
    assert caplog.messages == []
    assert (found.arguments, found.origin) == (network.arguments, network.origin)
    assert {"conv1.kernel", "bn1.mean", "bn2.scale", "fc.bias"} <= found.weights.keys()
    assert found.weights.keys() == network.weights.keys()
    for name, array in network.weights.items():
        assert isinstance(found.weights[name], np.ndarray)
        np.testing.assert_array_equal(found.weights[name], array)


def test_digests_and_seals_are_those_of_every_version():
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.int32(7)}
    assert store.digest(arrays) == "03262e759912f34c4394800fe7bbd7ce53e5c7a13ef6dc396685a863437d125b"
    said = {"origin": {"head": "trained"}, "arguments": {"width": 4}}
    assert store.seal(said) == said | {
        "seal": "0a33edffefba8bed53da208f61937b926e9b0ab02487ac3677ef22e61a372a46"
    }


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.arange(6, dtype=np.float32).reshape(3, 2)},
        {"a": np.arange(6, dtype=np.int32).reshape(2, 3)},
        {"b": np.arange(6, dtype=np.float32).reshape(2, 3)},
        {"a": np.arange(6, dtype=np.float32).reshape(2, 3) + np.float32(1e-7)},
    ],
)
def test_a_digest_is_of_names_types_shapes_and_every_bit(other):
    assert store.digest(other) != store.digest({"a": np.arange(6, dtype=np.float32).reshape(2, 3)})


def test_what_a_network_says_of_itself_cannot_be_changed_unnoticed(tmp_path):
    written(tmp_path / "w")
    change(tmp_path / "w" / "network" / "metadata", '"head": "trained"', '"head": "fresh"')
    with pytest.raises(ValueError, match=r"cannot read the network in .*w: network does not say what was"):
        store.load_network(tmp_path / "w")


def test_a_network_of_before_the_checksums_is_told_as_that(tmp_path):
    written(tmp_path / "w")
    path = tmp_path / "w" / "network" / "metadata"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({name: said[name] for name in ("arguments", "origin")}))
    with pytest.raises(
        ValueError, match="w: an earlier version of tat-jax wrote it, without checksums; use "
    ):
        store.load_network(tmp_path / "w")


def test_the_arrays_of_another_network_are_noticed(tmp_path):
    written(tmp_path / "w")
    written(tmp_path / "other", seed=1)
    (tmp_path / "w" / "student").rename(tmp_path / "unused")
    (tmp_path / "other" / "student").rename(tmp_path / "w" / "student")
    with pytest.raises(ValueError, match=r"cannot read the network in .*w: its arrays are not those that"):
        store.load_network(tmp_path / "w")


def test_a_file_that_is_missing_or_cut_off_is_told_in_a_line(tmp_path, capfd):
    written(tmp_path / "w")
    files = [path for path in (tmp_path / "w" / "student").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cannot read the network in .*w: .") as cut_off:
        store.load_network(tmp_path / "w")
    (tmp_path / "w" / "network" / "metadata").unlink()
    with pytest.raises(ValueError, match=r"cannot read the network in .*w: .") as missing:
        store.load_network(tmp_path / "w")
    assert not any("\n" in str(error.value) for error in (cut_off, missing))
    assert "Traceback" not in capfd.readouterr().err


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "w").mkdir()
    with pytest.raises(FileExistsError, match=r"w exists already; remove it or name another folder"):
        written(tmp_path / "w")
    assert list((tmp_path / "w").iterdir()) == []


def test_a_folder_without_a_network_says_what_it_would_hold(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no network in .* \(it would hold the folders student and"):
        store.load_network(tmp_path)


def test_a_folder_of_weights_is_its_own_network_and_an_empty_one_has_none(tmp_path):
    written(tmp_path / "w")
    assert folders.network_folder(tmp_path / "w") == tmp_path / "w"
    for choose in (folders.network_folder, folders.best, folders.last):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: train one with"):
            choose(tmp_path)


def test_entries_that_are_missing_extra_or_of_another_shape_are_all_named_and_nothing_is_written():
    model, weights = tiny(), store.network_weights(tiny(seed=1))
    kernel = np.asarray(model.conv1.kernel[...])
    weights["more"] = weights.pop("bn1.bias")
    weights["fc.bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match="the file does not hold this network") as refused:
        store.set_weights(model, weights, source="the file")
    assert str(refused.value).split("\n")[1:] == [
        "  missing: bn1.bias (2,)",
        "  extra: more (2,)",
        "  wrong shape: fc.bias is (7,), the network has (5,)",
    ]
    np.testing.assert_array_equal(model.conv1.kernel[...], kernel)


def test_of_a_quite_different_network_thirty_entries_are_named():
    with pytest.raises(ValueError, match=r"\n  and 70 more$") as refused:
        store.check_entries({f"e{i}": (1,) for i in range(100)}, {}, source="it")
    assert str(refused.value).count("extra") == 30


def test_weights_are_set_in_the_types_of_the_model(x64):
    model = tiny(dtype=jnp.float64)
    store.set_weights(model, store.network_weights(tiny(seed=1)), source="float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float64")}
    np.testing.assert_array_equal(model.fc.kernel[...], tiny(seed=1).fc.kernel[...])


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_a_random_stream_goes_on_where_it_was(kind):
    stream, fresh = (nnx.state(nnx.Rngs(jax.random.key(seed, impl=kind))) for seed in (3, 4))
    flat = store.flatten(stream)
    assert {array.dtype for array in flat.values()} == {jnp.dtype("uint32")}  # what Orbax can write
    restored = store.unflatten(flat, fresh)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(stream), strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours == theirs).all()


def test_of_an_error_its_first_cause_is_told_in_a_line():
    error = ValueError("outside")
    error.__cause__ = OSError("no space left on device [source file 12]\nand a trace")
    assert reason(error) == "no space left on device"
    assert reason(ValueError("trees do not match:\na, b")) == "trees do not match"
    assert reason(KeyError()) == "KeyError"
