"""Weights come in and go out bit by bit, and files that are not weights are refused by name."""

import contextlib
import hashlib
import http.server
import json
import os
import pickle
import resource
import threading
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx

from proofs.torch_deeplab import TorchDeepLab
from proofs.torch_resnet import TorchResNet, random_torch_resnet, randomize
from tat_jax import convert, networks
from tat_jax.weights import names, published, store
from tat_jax.weights.files import read_entries
from tests.interpreter import run_python


@pytest.fixture(scope="module")
def state_dict():
    """Return a narrow ResNet-18's weights as torchvision names them."""
    return random_torch_resnet("resnet18", width=4, num_classes=6).state_dict()


def without_counters(entries):
    return {name: np.asarray(v) for name, v in entries.items() if "num_batches" not in name}


def assert_same_entries(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


def save(entries, path):
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(without_counters(entries), path)
    else:
        torch.save(entries, path, _use_new_zipfile_serialization="legacy" not in path.name)
    return path


def command(*arguments):
    convert.main([str(argument) for argument in arguments])


def error_of(*arguments):
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    return str(stopped.value)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "plain.safetensors"])
@pytest.mark.parametrize("export", ["student.pth", "student.safetensors"])
def test_there_and_back_is_bit_exact(tmp_path, state_dict, name, export):
    command("resnet18", "--from", save(state_dict, tmp_path / name), "--to", tmp_path / "weights")
    command("--export", tmp_path / export, tmp_path / "weights")
    assert_same_entries(read_entries(tmp_path / export), without_counters(state_dict))
    if export.endswith(".pth"):
        model = TorchResNet("resnet18", width=4, num_classes=6)
        model.load_state_dict(torch.load(tmp_path / export, weights_only=True), strict=True)


def test_a_network_that_segments_is_handed_on_to_pytorch_with_what_its_classes_are(tmp_path, capsys):
    theirs = randomize(TorchDeepLab("resnet18", num_classes=4, width=2)).eval()
    file = save(theirs.state_dict(), tmp_path / "theirs.pth")
    command("deeplab_resnet18", "--from", file, "--to", tmp_path / "weights")
    trained = store.load_network(tmp_path / "weights")
    usage = {"num_classes": 4, "classes": list("abcd"), "colours": 4 * [[1, 2, 3]], "image": {"size": 65}}
    store.save_network(tmp_path / "student", trained._replace(usage=usage))
    command("--export", tmp_path / "student.pth", tmp_path / "student")
    assert "under its names in PyTorch" in capsys.readouterr().out
    ours = TorchDeepLab("resnet18", num_classes=4, width=2).eval()
    ours.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True), strict=True)
    image = torch.randn(1, 3, 33, 33)
    assert torch.equal(ours(image), theirs(image))
    assert json.loads((tmp_path / "student.json").read_text()) == usage


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_views_shared_storages_and_every_type_are_read_as_pytorch_reads_them(tmp_path, name):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"base": base, "transposed": base.T, "part": base[1:3, ::2], "scalar": torch.tensor(3)}
    types = (torch.float64, torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors |= {str(dtype): base.to(dtype) for dtype in types}
    tensors["parameter"] = torch.nn.Parameter(base + 1)
    entries = read_entries(save(tensors, tmp_path / name))
    assert_same_entries(entries, {name: tensor.detach().numpy() for name, tensor in tensors.items()})


@pytest.mark.parametrize("name", ["half.pth", "half.safetensors"])
def test_half_precision_becomes_float32_exactly(tmp_path, state_dict, name):
    half = {name: v.bfloat16() if v.is_floating_point() else v for name, v in state_dict.items()}
    if name.endswith("pth"):
        save(half, tmp_path / name)
    else:
        arrays = {n: v.float().numpy().astype(ml_dtypes.bfloat16) for n, v in half.items() if v.ndim}
        safetensors.numpy.save_file(arrays, tmp_path / name)
    network = names.convert_entries(read_entries(tmp_path / name), "resnet18", source=name)
    expected = {n: v.float().numpy() for n, v in half.items() if v.ndim}
    assert_same_entries(names.export_entries(network), expected)


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, state_dict):
    broken = dict(state_dict)
    del broken["layer1.0.conv1.weight"]
    broken["layer9.weight"] = torch.zeros(3)
    broken["bn1.bias"] = torch.zeros(5)
    file = save(broken, tmp_path / "broken.pth")
    message = error_of("resnet18", "--from", file, "--to", tmp_path / "weights")
    assert "missing: layer1.0.conv1.weight (4, 4, 3, 3)" in message
    assert "extra: layer9.weight (3,)" in message
    assert "wrong shape: bn1.bias is (5,), the network has (4,)" in message
    assert os.listdir(tmp_path) == ["broken.pth"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(tmp_path, state_dict, value):
    broken = {**state_dict, "bn1.weight": torch.full((4,), value)}
    file = save(broken, tmp_path / "broken.pth")
    assert "NaN or infinity in bn1.weight" in error_of("resnet18", "--from", file, "--to", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_backbone_is_converted_with_a_fresh_head_when_told_to(tmp_path, state_dict):
    backbone = {name: v for name, v in state_dict.items() if not name.startswith("fc.")}
    file = save(backbone, tmp_path / "backbone.safetensors")
    assert "--head fresh" in error_of("resnet18", "--from", file, "--to", tmp_path / "w")
    command("resnet18", "--from", file, "--head", "fresh", "--to", tmp_path / "w")
    network = store.load_network(tmp_path / "w")
    assert network.origin["head"] == "fresh"
    assert network.arguments["num_classes"] == 1000
    kept = {n: v for n, v in names.export_entries(network).items() if not n.startswith("fc.")}
    assert_same_entries(kept, without_counters(backbone))


class Malicious:
    """Unpickles by running a command."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["evil.pth", "legacy-evil.pth"])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, state_dict, name):
    file = save({**state_dict, "x": Malicious(tmp_path / "canary")}, tmp_path / name)
    message = error_of("resnet18", "--from", file, "--to", tmp_path / "w")
    assert "posix.system" in message
    assert os.listdir(tmp_path) == [name]


def test_a_bare_pickle_is_refused(tmp_path):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "canary")))
    with pytest.raises(ValueError, match=r"posix.system"):
        read_entries(tmp_path / "bare.pth")
    assert not (tmp_path / "canary").exists()


def test_a_zip_bomb_is_refused_unopened(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    with pytest.raises(ValueError, match=r"data\.pkl is compressed"):
        read_entries(tmp_path / "bomb.pth")


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "plain.safetensors"])
def test_a_file_cut_short_anywhere_is_refused(tmp_path, state_dict, name):
    whole = save(state_dict, tmp_path / name).read_bytes()
    for cut in (0, 1, 50, len(whole) // 4, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=name):
            read_entries(tmp_path / name)


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    for header in ({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}, {"a": 3}):
        text = json.dumps(header).encode()
        path = tmp_path / "lie.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        with pytest.raises(ValueError, match=r"lie.safetensors is no safetensors file"):
            read_entries(path)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    tensor = torch.zeros(4)
    torch.save({"a": tensor}, tmp_path / "far.pth")
    with zipfile.ZipFile(tmp_path / "far.pth") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    # The shape (4,) is the last K\x04 of the pickle; 9 elements are more than the storage has.
    before, after = members[pickled].rsplit(b"K\x04", 1)
    members[pickled] = before + b"K\x09" + after
    with zipfile.ZipFile(tmp_path / "far.pth", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match="reaches beyond its 4 elements"):
        read_entries(tmp_path / "far.pth")


def test_nothing_is_overwritten(tmp_path, state_dict):
    file = save(state_dict, tmp_path / "zip.pth")
    (tmp_path / "weights").mkdir()
    assert "exists already" in error_of("resnet18", "--from", file, "--to", tmp_path / "weights")
    command("resnet18", "--from", file, "--to", tmp_path / "w")
    assert "exists already" in error_of("--export", file, tmp_path / "w")
    assert "neither in .pth" in error_of("--export", tmp_path / "student.bin", tmp_path / "w")


@contextlib.contextmanager
def files_of_at_most(size):
    """Let no file grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", ["student.pth", "student.safetensors", "weights"])
def test_where_nothing_can_be_written_a_line_says_so_and_nothing_is_left(tmp_path, state_dict, capfd, to):
    file = save(state_dict, tmp_path / "w.pth")
    command("resnet18", "--from", file, "--to", tmp_path / "w")
    arguments = ("--export", tmp_path / to, tmp_path / "w")
    if to == "weights":
        arguments = ("resnet18", "--from", file, "--to", tmp_path / to)
    with files_of_at_most(1000):
        message = error_of(*arguments)
    assert message == f"error: cannot write {tmp_path / to}: File too large"
    assert sorted(os.listdir(tmp_path)) == ["w", "w.pth"]
    assert "Traceback" not in capfd.readouterr().err


def test_a_path_below_a_file_is_no_place_for_weights(tmp_path, state_dict):
    file = save(state_dict, tmp_path / "w.pth")
    assert f"cannot write {file}/w: Not a directory" in error_of(
        "resnet18", "--from", file, "--to", file / "w"
    )
    command("resnet18", "--from", file, "--to", tmp_path / "w")
    below = error_of("--export", file / "student.pth", tmp_path / "w")
    assert below == f"error: cannot write {file}/student.pth: File exists ({file})"
    (tmp_path / "folder.pth").mkdir()
    assert "folder.pth exists already" in error_of("--export", tmp_path / "folder.pth", tmp_path / "w")


def test_what_is_written_can_be_read_by_others(tmp_path, state_dict):
    before = os.umask(0o022)
    try:
        command("resnet18", "--from", save(state_dict, tmp_path / "w.pth"), "--to", tmp_path / "w")
        for ending in ("pth", "safetensors"):
            command("--export", tmp_path / f"s.{ending}", tmp_path / "w")
    finally:
        os.umask(before)
    written = [*tmp_path.glob("s.*"), *(tmp_path / "w").rglob("*")]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in written)


def checkpoint_of(run, step, entries, top1):
    """Write what an export reads of a run's checkpoint."""
    arrays = without_counters(entries)
    folder = run / "checkpoints" / str(step)
    store.save_network(folder, names.convert_entries(arrays, "resnet18", source="a test"))
    for item, said in {
        "data/metadata": store.seal({"metrics": {"top1": top1}}),
        "metrics/metrics": {"top1": top1},
    }.items():
        (folder / item).parent.mkdir()
        (folder / item).write_text(json.dumps(said))


def test_of_a_run_the_best_is_exported_and_the_last_when_asked_for(tmp_path, state_dict, capsys):
    last = {name: tensor * 2 for name, tensor in state_dict.items()}
    checkpoint_of(tmp_path / "run", 1, state_dict, 0.9)
    checkpoint_of(tmp_path / "run", 2, last, 0.8)
    chosen = {"default": (), "best": ("--checkpoint", "best"), "last": ("--checkpoint", "last")}
    for name, flags in chosen.items():
        command("--export", tmp_path / f"{name}.safetensors", tmp_path / "run", *flags)
        expected = without_counters(last if name == "last" else state_dict)
        assert_same_entries(read_entries(tmp_path / f"{name}.safetensors"), expected)
        assert f"from {tmp_path}/run/checkpoints/{2 if name == 'last' else 1}" in capsys.readouterr().out
    one = tmp_path / "run" / "checkpoints" / "1"
    message = error_of("--export", tmp_path / "one.safetensors", one, "--checkpoint", "last")
    assert "1 is one network, not a run: leave out --checkpoint last" in message


def test_a_head_that_means_nothing_is_said_at_export(tmp_path, state_dict, capsys):
    file = save(state_dict, tmp_path / "w.safetensors")
    command("resnet18", "--from", file, "--to", tmp_path / "w", "--head", "fresh")
    command("--export", tmp_path / "s.safetensors", tmp_path / "w")
    assert "its head is fresh: its logits mean nothing" in capsys.readouterr().out


def test_the_command_says_which_of_two_networks_it_took_and_keeps_it_with_the_weights(
    tmp_path, state_dict, capsys
):
    both = {"state_dict": state_dict, "state_dict_ema": {n: t * 2 for n, t in state_dict.items()}}
    file = save(both, tmp_path / "both.pth")
    command("resnet18", "--from", file, "--to", tmp_path / "plain")
    assert (
        "taken from 'state_dict.'; beside it lies 'state_dict_ema.', which --ema" in capsys.readouterr().out
    )
    command("resnet18", "--from", file, "--to", tmp_path / "ema", "--ema")
    assert "taken from 'state_dict_ema.'" in capsys.readouterr().out
    assert "taken from 'state_dict_ema.'" in store.load_network(tmp_path / "ema").origin["taken"]
    command("resnet18", "--from", file, "--to", tmp_path / "named", "--prefix", "state_dict_ema.")
    assert "taken from 'state_dict_ema.'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--export", "s.pth", "run", "--ema", "--to", "x"), "no meaning with --export: --to, --ema"),
        (("--export", "s.pth", "run", "--from", "x"), "no meaning with --export: --from"),
        (("resnet18", "--to", "x", "--checkpoint", "last"), "no meaning without --export: --checkpoint"),
        (("resnet18",), "--to says where the converted weights go"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(arguments, said, capsys):
    error_of(*arguments)
    assert said in capsys.readouterr().err


def test_help_does_not_wait_for_what_it_does_not_need():
    asked = """
        import sys
        from tat_jax import convert
        try:
            convert.main(["--help"])
        except SystemExit:
            print([name for name in ("jax", "flax", "numpy", "torch") if name in sys.modules])
    """
    assert run_python(asked).stdout.splitlines()[-1] == "[]"


@pytest.fixture
def server(tmp_path):
    """Serve a folder on this machine, with the truth or less of it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = (folder / self.path.lstrip("/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - self.server.withheld])

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        running.withheld = 0
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running, folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_download_is_kept_once_its_size_and_hash_are_right(tmp_path, server):
    running, folder, url = server
    content = b"weights" * 1000
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    cache = tmp_path / "cache"

    (folder / name).write_bytes(content)
    running.withheld = 10
    with pytest.raises((ValueError, OSError), match=r"ended after 6,990 of 7,000 bytes|cannot fetch"):
        published.fetch(name, cache, published_at=url)
    assert os.listdir(cache) == []

    running.withheld = 0
    (folder / name).write_bytes(content[:-1] + b"!")
    with pytest.raises(ValueError, match="is not the published file: its SHA-256 begins with"):
        published.fetch(name, cache, published_at=url)
    assert os.listdir(cache) == []

    (folder / name).write_bytes(content)
    path = published.fetch(name, cache, published_at=url)
    assert path.read_bytes() == content
    (folder / name).unlink()
    assert published.fetch(name, cache, published_at=url) == path


def test_a_server_that_does_not_answer_is_named_with_the_way_out(tmp_path):
    with pytest.raises(OSError, match=r"cannot fetch http://127.0.0.1:9/resnet18.*--from"):
        published.fetch("resnet18-f37072fd.pth", tmp_path, published_at="http://127.0.0.1:9")


def test_a_cache_that_cannot_be_written_is_named_and_the_server_is_not_blamed(tmp_path, server):
    _, folder, url = server
    (folder / "resnet18-0.pth").write_bytes(b"weights")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot keep .*file/cache/resnet18-0\.pth: Not a.*XDG_CACHE_HOME"):
        published.fetch("resnet18-0.pth", tmp_path / "file" / "cache", published_at=url)


def test_without_a_home_folder_a_download_has_no_place(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor passwd says one
    assert "set HOME or XDG_CACHE_HOME" in error_of("resnet18", "--to", tmp_path / "w")


@pytest.mark.parametrize("option", ["--to", "--from", "--export"])
def test_a_bucket_is_no_place_to_convert_from_or_to(option, capsys):
    error_of("resnet18", option, "gs://bucket/weights.pth")
    assert "gs://bucket/weights.pth is not on a disk of this machine; mount" in capsys.readouterr().err


def test_the_home_folder_is_found_in_the_paths_of_a_conversion(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path / "w.pth") in error_of("resnet18", "--from", "~/w.pth", "--to", "~/w")


def test_a_network_without_published_weights_says_how_to_name_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.ARCHITECTURES, "own", networks.find("resnet18")._replace(published=None))
    assert "no weights of own are published; name a file of them with --from" in error_of(
        "own", "--to", tmp_path / "weights"
    )


def test_where_others_have_a_file_is_said_before_anything_else(monkeypatch):
    place = "model.safetensors from https://huggingface.co/timm/own"
    own = networks.find("resnet18")._replace(published=None, found_at=place)
    monkeypatch.setitem(networks.ARCHITECTURES, "own", own)
    said = f"error: own is not fetched: get {place}, and name it with --from FILE"
    assert error_of("own") == said


def test_an_architecture_that_is_none_is_named_with_those_that_are(tmp_path, capsys):
    error_of("resnet19", "--to", tmp_path / "weights")
    said = capsys.readouterr().err
    assert "no architecture 'resnet19'; there are " in said
    assert "resnet18, resnet34" in said


def test_a_layer_of_one_s_own_whose_layout_pytorch_has_otherwise_is_not_exported():
    class Network(nnx.Module):
        def __init__(self):
            self.up = nnx.ConvTranspose(3, 4, (2, 2), rngs=nnx.Rngs(0))

    network = store.StoredNetwork(
        store.network_weights(Network()), {}, {"head": "trained", "source": "a test"}
    )
    with pytest.raises(ValueError, match=r"up\.kernel is the kernel of a ConvTranspose, whose layout"):
        names.export_entries(network, Network())
    with pytest.raises(ValueError, match="a network of your own; name what builds it, as --student mine"):
        names.export_entries(network)


def test_a_conversion_needs_no_accelerator(tmp_path, state_dict):
    torch.save(state_dict, tmp_path / "own.pth")
    arguments = ["resnet18", f"--from={tmp_path / 'own.pth'}", f"--to={tmp_path / 'own'}", "--head=fresh"]
    for given in (arguments, ["--export", str(tmp_path / "again.safetensors"), str(tmp_path / "own")]):
        run_python(
            f"""
            import os, runpy, sys
            os.environ["JAX_PLATFORMS"] = "nonsense"
            sys.argv = ["convert", *{given}]
            runpy.run_module("tat_jax.convert", run_name="__main__")
            """
        )
    assert (tmp_path / "again.safetensors").exists()
