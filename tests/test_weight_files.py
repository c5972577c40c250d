"""Other people's checkpoints: read right and without running anything, or refused with the way out.

The kinds that are read are the rows of the table in docs/weights.md, one by one.
"""

import argparse
import collections
import datetime
import decimal
import json
import pathlib
import re
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from proofs.torch_resnet import random_torch_resnet
from proofs.torture import packing
from tat_jax.weights import names
from tat_jax.weights.files import read_entries
from tat_jax.weights.names import convert_entries

TABLE = Path(__file__).parents[1] / "docs" / "weights.md"


@pytest.fixture(scope="module")
def weights():
    """Return a narrow ResNet-18's weights under torchvision's names."""
    return random_torch_resnet("resnet18", width=4, num_classes=6).state_dict()


def under(prefix, entries):
    return {f"{prefix}{name}": tensor for name, tensor in entries.items()}


def averaged(entries):
    return {name: tensor * 0 + 3 for name, tensor in entries.items()}


def saved(root, path, **options):
    torch.save(root, path, **options)
    return path


class AttributeDict(dict):
    """What Lightning keeps its arguments in, which is a dictionary with attributes."""

    __module__ = "lightning_fabric.utilities.data"
    __qualname__ = "AttributeDict"


def lightning(w, folder):
    parts = AttributeDict.__module__.split(".")
    modules = {name: types.ModuleType(name) for name in (".".join(parts[: i + 1]) for i in range(len(parts)))}
    modules[AttributeDict.__module__].AttributeDict = AttributeDict
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        root = {
            **{"epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.5.0", "lr_schedulers": [{}]},
            "state_dict": under("net.", w) | {"criterion.weight": torch.ones(6)},
            "optimizer_states": [optimiser(w)],
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
            "hyper_parameters": AttributeDict(lr=0.1, root=pathlib.PurePosixPath("/data")),
        }
        return saved(root, folder / "epoch=1.ckpt")


def optimiser(w):
    states = {i: {"step": torch.tensor(3.0), "exp_avg": tensor} for i, tensor in enumerate(w.values())}
    return {"state": states, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}]}


def reference(w, folder):
    arguments = argparse.Namespace(lr=0.1, data_path=pathlib.PosixPath("/data"), amp=True, device="cuda")
    root = {"model": w, "optimizer": optimiser(w), "lr_scheduler": {"milestones": collections.Counter([30])}}
    root |= {"epoch": 3, "args": arguments, "scaler": {"scale": 65536.0}}
    root["model_ema"] = {"n_averaged": torch.tensor(9), **under("module.", averaged(w))}
    return saved(root, folder / "checkpoint.pth")


def timm(w, folder):
    root = {"epoch": 3, "arch": "resnet18", "state_dict": w, "optimizer": optimiser(w), "version": 2}
    root |= {"args": argparse.Namespace(lr=0.1), "amp_scaler": {"scale": 1.0}, "metric": np.float64(71.5)}
    return saved(root | {"state_dict_ema": averaged(w)}, folder / "model_best.pth.tar")


def openmmlab(w, folder):
    body, head = ({n: t for n, t in w.items() if n.startswith("fc.") == of_head} for of_head in (False, True))
    root = {"meta": {"epoch": 3, "time": datetime.datetime(2026, 1, 1), "CLASSES": ("cat", "dog")}}
    return saved(root | {"state_dict": under("backbone.", body) | under("head.", head)}, folder / "mm.pth")


def python_2(w, folder):
    """Write as Python 2 did, the items of a dictionary being a list of lists."""
    tensor = packing.tensor((4, 3, 7, 7), (147, 49, 7, 1), of=packing.storage("0", 588))
    items = b"](](" + packing.value("conv1.weight") + tensor + b"ee"
    root = b"\x80\x02" + packing.name("collections", "OrderedDict") + items + b"\x85R."
    path = folder / "python2.pth"
    path.write_bytes(packing.zipped(root, {"0": w["conv1.weight"].numpy().tobytes()}))
    return path


def mlx(w, folder):
    turned = {
        re.sub(r"(layer\d|downsample)\.(\d)", r"\1.layers.\2", name): (
            tensor.permute(0, 2, 3, 1).contiguous() if tensor.ndim == 4 else tensor
        )
        for name, tensor in w.items()
        if not name.endswith("num_batches_tracked")
    }
    safetensors.torch.save_file(turned, folder / "mlx.safetensors", {"format": "mlx"})
    return folder / "mlx.safetensors"


def flax(w, folder):
    arrays = {name: tensor.numpy() for name, tensor in w.items()}
    ours = convert_entries(arrays, "resnet18", source="PyTorch").weights
    torch_arrays = {path: torch.from_numpy(np.ascontiguousarray(array)) for path, array in ours.items()}
    safetensors.torch.save_file(under("model.", torch_arrays), folder / "flax.safetensors")
    return folder / "flax.safetensors"


def hub(w, folder):
    counters = {n: t.int() if n.endswith("num_batches_tracked") else t for n, t in w.items()}
    safetensors.torch.save_file(counters, folder / "model.safetensors")
    return folder


def sharded(w, folder, ending="bin"):
    first = {n: t for n, t in w.items() if n < "layer2"}
    shards = {
        f"w-1-of-2.{ending}": first,
        f"w-2-of-2.{ending}": {n: t for n, t in w.items() if n not in first},
    }
    for file, part in shards.items():
        if ending == "bin":
            torch.save(part, folder / file)
        else:
            safetensors.torch.save_file(part, folder / file)
    places = {name: file for file, part in shards.items() for name in part}
    index = "pytorch_model.bin.index.json" if ending == "bin" else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


READ = {
    "torchvision": lambda w, folder: saved(w, folder / "new.pth"),
    "torchvision before 2020": lambda w, folder: saved(
        w, folder / "old.pth", _use_new_zipfile_serialization=False
    ),
    "torchvision's reference scripts": reference,
    "timm's training": timm,
    "PyTorch Lightning": lightning,
    "torch.compile": lambda w, folder: saved(under("_orig_mod.module.", w), folder / "compiled.pt"),
    "DataParallel": lambda w, folder: saved({"state_dict": under("module.", w)}, folder / "ddp.bin"),
    "OpenMMLab": openmmlab,
    "RepDistiller": lambda w, folder: saved(
        {"epoch": 240, "model": w, "accuracy": torch.tensor(71.5)}, folder / "ckpt_epoch_240.pth"
    ),
    "safetensors of PyTorch and timm": hub,
    "safetensors of MLX": mlx,
    "safetensors of JAX": flax,
    "several files with an index": sharded,
}


def assert_holds(network, weights):
    found = names.export_entries(network)
    expected = {n: t.numpy() for n, t in weights.items() if not n.endswith("num_batches_tracked")}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def converted(path, architecture="resnet18", **choice):
    return convert_entries(read_entries(path), architecture, source=str(path), **choice)


@pytest.mark.parametrize("kind", READ)
def test_a_checkpoint_of_each_kind_is_read_bit_by_bit(kind, weights, tmp_path):
    network = converted(READ[kind](weights, tmp_path))
    assert_holds(network, weights)
    assert network.origin["head"] == "trained"


def test_the_table_of_the_document_is_what_is_tested():
    rows = re.findall(r"^\| (.+?) +\|", TABLE.read_text().partition("\n## ")[0], re.MULTILINE)
    assert [row for row in rows if not row.startswith(("---", "written by"))] == [*READ]


@pytest.mark.parametrize("write", [reference, timm])
def test_of_weights_and_their_moving_average_either_is_taken_and_the_choice_is_said(write, weights, tmp_path):
    path = write(weights, tmp_path)
    plain, average = converted(path), converted(path, ema=True)
    assert_holds(plain, weights)
    assert_holds(average, averaged(weights))
    assert re.match(
        r"taken from '(model|state_dict)\.'; beside it lies '.*ema\..*', which --ema takes",
        plain.origin["taken"],
    )
    assert re.match(r"taken from '.*ema\..*'; beside it lies '(model|state_dict)\.'", average.origin["taken"])


def test_a_moving_average_that_is_not_there_is_not_taken_for_one(weights, tmp_path):
    with pytest.raises(ValueError, match=r"plain\.pth holds no moving average of resnet18: .*'model\.'"):
        converted(saved({"model": weights}, tmp_path / "plain.pth"), ema=True)


def test_a_moving_average_alone_is_taken_and_said(weights, tmp_path):
    found = converted(saved({"state_dict_ema": weights}, tmp_path / "ema.pth"))
    assert_holds(found, weights)
    assert found.origin["taken"] == "taken from 'state_dict_ema.'"


def test_of_two_networks_none_is_taken_until_one_is_named(weights, tmp_path):
    student, teacher = weights, averaged(weights)
    both = {"state_dict": under("student.", student) | under("teacher.", teacher)}
    path = saved(both, tmp_path / "both.ckpt")
    two = (
        r"holds 2 networks .*'state_dict\.student\.', 'state_dict\.teacher\.': .*--prefix state_dict\.student"
    )
    with pytest.raises(ValueError, match=two):
        converted(path)
    for prefix in ("student", "student.", "state_dict.student."):
        assert_holds(converted(path, prefix=prefix), student)
    found = converted(path, prefix="teacher.")
    assert_holds(found, teacher)
    assert "beside it lies 'state_dict.student.'" in found.origin["taken"]
    with pytest.raises(ValueError, match=r"no resnet18 under the prefix 'pupil\.', but under 'state_dict"):
        converted(path, prefix="pupil")


def test_a_network_that_two_modules_hold_is_one(weights, tmp_path):
    shared = under("model.", weights) | under("criterion.student.", weights)
    found = converted(saved({"state_dict": shared}, tmp_path / "shared.ckpt"))
    assert_holds(found, weights)
    assert found.origin["taken"] == "taken from 'state_dict.model.'"


def test_a_head_is_missing_only_where_it_is_and_never_taken_from_another_network(weights, tmp_path):
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    root = {"state_dict": under("student.", averaged(body)) | under("teacher.", weights)}
    path = saved(root, tmp_path / "headless.ckpt")
    with pytest.raises(ValueError, match=r"has no head \(fc\.weight, fc\.bias\); --head fresh"):
        converted(path, prefix="student")
    assert converted(path, prefix="student", head="fresh").origin["head"] == "fresh"
    assert_holds(converted(path, prefix="teacher"), weights)


def test_a_part_of_the_body_is_not_called_one_without_a_head(weights, tmp_path):
    part = dict(list(weights.items())[:-10])
    with pytest.raises(ValueError, match=r"does not hold this network:\n  missing: ") as error:
        converted(saved(part, tmp_path / "model-00001-of-00003.pth"))
    assert "fresh" not in str(error.value)


def test_what_is_left_out_is_said(weights, tmp_path):
    assert converted(lightning(weights, tmp_path)).origin["taken"] == (
        "taken from 'state_dict.net.'; left out: 'state_dict.criterion.weight', "
        "\"callbacks.ModelCheckpoint{'monitor': None}.best_model_score\""
    )
    assert "its head from 'state_dict.head.fc'" in converted(openmmlab(weights, tmp_path)).origin["taken"]
    assert "taken" not in converted(saved(weights, tmp_path / "plain.pth")).origin


def test_a_file_without_the_network_is_answered_with_what_it_has(weights, tmp_path):
    other = torch.nn.TransformerEncoderLayer(8, 2, 16).state_dict()
    with pytest.raises(
        ValueError, match=r"holds no resnet18: of the names of its 12 tensors, 'model.self_attn"
    ):
        converted(saved({"model": other}, tmp_path / "other.pth"))
    with pytest.raises(ValueError, match=r"missing: layer1\.2\.conv1\.weight"):
        converted(saved(under("model.", weights), tmp_path / "smaller.pth"), "resnet34")
    with pytest.raises(ValueError, match=r"nothing\.pth: it holds no tensors by name"):
        converted(saved({"model": [1]}, tmp_path / "nothing.pth"))


HARMLESS = {
    "namespace": argparse.Namespace(a=1, b=[argparse.Namespace()]),
    "simple": types.SimpleNamespace(a={1: "x"}),
    "paths": [pathlib.PosixPath("/a"), pathlib.PureWindowsPath("C:/a")],
    "dates": [datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), datetime.timedelta(1)],
    "numbers": [1 + 2j, decimal.Decimal("0.1"), None, float("inf"), 10**40],
    "collections": [collections.defaultdict(list, a=[1]), collections.Counter("aab"), collections.deque([1])],
    "sets": [{1, 2}, frozenset({3}), b"bytes", bytearray(b"x"), range(3), slice(1)],
    "numpy": [np.float32(1), np.int64(2), np.arange(3), np.array(["a"]), np.dtype("float32"), np.bool_(1)],
    "torch": [torch.Size([1]), torch.device("cpu"), torch.float16, torch.__version__],
    "types": {float: 1, "kind": int, None: 2, 1.5: 3},
}


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_harmless_objects_beside_the_weights_are_stepped_over(kind, protocol, weights, tmp_path):
    root = {"extra": HARMLESS[kind], "model": {"fc.bias": torch.arange(3.0)}, "more": {"x": HARMLESS[kind]}}
    path = saved(root, tmp_path / "extra.pth", pickle_protocol=protocol)
    entries = read_entries(path)
    assert [*entries] == ["model.fc.bias"]
    np.testing.assert_array_equal(entries["model.fc.bias"], np.arange(3.0))


def test_an_object_in_the_place_of_weights_is_no_weight(weights, tmp_path):
    path = saved({**weights, "conv1.weight": np.zeros((4, 3, 7, 7))}, tmp_path / "array.pth")
    with pytest.raises(ValueError, match=r"missing: conv1\.weight \("):
        converted(path)


class OfTheirOwn:
    """A class of somebody's training code."""


def test_what_is_not_known_to_be_harmless_is_refused_with_the_way_out(weights, tmp_path):
    path = saved({"model": weights, "config": OfTheirOwn()}, tmp_path / "own.pth")
    way_out = (
        r"own\.pth: refused, and nothing of it run, .*OfTheirOwn: .*torch\.save\(model\.state_dict\(\), "
    )
    with pytest.raises(ValueError, match=way_out):
        read_entries(path)


def test_a_program_of_torchscript_is_refused_for_what_it_is(tmp_path):
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"script/{member}", packing.pickled({}))
    with pytest.raises(ValueError, match=r"script\.pt: it is a program of TorchScript: save the state_dict"):
        read_entries(path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_to_weights_is_refused_for_what_it_is(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46807446\n")
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS to the weights: git lfs pull"):
        read_entries(tmp_path)


def test_python_2_wrote_the_items_of_a_dictionary_otherwise(weights, tmp_path):
    entries = read_entries(python_2(weights, tmp_path))
    np.testing.assert_array_equal(entries["conv1.weight"], weights["conv1.weight"].numpy())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_whole_numbers_are_read_but_are_no_weights(dtype, ending, weights, tmp_path):
    path = tmp_path / f"w.{ending}"
    quantised = {**weights, "bn1.num_batches_tracked": torch.ones((), dtype=dtype)}
    write = torch.save if ending == "pth" else safetensors.torch.save_file
    write(quantised, path)
    assert_holds(converted(path), weights)
    write({**weights, "fc.weight": weights["fc.weight"].to(dtype)}, path)
    with pytest.raises(ValueError, match=r"no floating-point ones, .* in fc\.weight"):
        converted(path)


def test_a_file_is_read_by_what_is_in_it_whatever_its_name(weights, tmp_path):
    torch.save(weights, tmp_path / "torch.safetensors")
    safetensors.torch.save_file(weights, tmp_path / "safetensors.pth")
    for name in ("torch.safetensors", "safetensors.pth"):
        assert_holds(converted(tmp_path / name), weights)


class TestSeveralFiles:
    def test_of_safetensors_they_are_read_by_their_index_or_folder(self, weights, tmp_path):
        sharded(weights, tmp_path, "safetensors")
        assert_holds(converted(tmp_path), weights)
        assert_holds(converted(tmp_path / "model.safetensors.index.json"), weights)

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            (lambda places: dict.fromkeys(places, "/etc/passwd"), "'/etc/passwd' is not beside it"),
            (lambda places: {n: f"../{f}" for n, f in places.items()}, "is not beside it"),
            (lambda places: dict.fromkeys(places, ".."), r"its file '\.\.' is missing"),
            (lambda places: dict.fromkeys(places, "w-3-of-2.bin"), "its file 'w-3-of-2.bin' is missing"),
            (lambda places: dict.fromkeys(places, "pytorch_model.bin.index.json"), "is missing"),
            (lambda places: dict.fromkeys(places, 3), "it has no weight_map"),
            (
                lambda places: dict(list(places.items())[1:]),
                "conv1.weight is in w-1-of-2.bin or in",
            ),
            (
                lambda places: places | {"z": "w-2-of-2.bin"},
                "z is in w-2-of-2.bin or in the index, but not",
            ),
        ],
    )
    def test_an_index_that_lies_is_refused(self, change, why, weights, tmp_path):
        index = sharded(weights, tmp_path) / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
        with pytest.raises(ValueError, match=f"{re.escape(str(index))}: .*{why}"):
            read_entries(tmp_path)

    def test_a_name_that_an_index_has_twice_is_refused(self, tmp_path):
        (tmp_path / "a.index.json").write_text('{"weight_map": {"a": "b.bin", "a": "c.bin"}}')
        with pytest.raises(ValueError, match="it says something twice"):
            read_entries(tmp_path / "a.index.json")

    def test_a_shard_that_is_broken_is_named(self, weights, tmp_path):
        (sharded(weights, tmp_path) / "w-2-of-2.bin").write_bytes(b"no weights")
        with pytest.raises(ValueError, match=r"index\.json: .*w-2-of-2\.bin is no PyTorch weight file"):
            read_entries(tmp_path)

    def test_a_folder_of_none_says_what_it_would_have(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no weights in .*, as model\.safetensors, "):
            read_entries(tmp_path)
