"""Files from strangers: read right or refused by name, in bounded time and memory; nothing is executed."""

import io
import os
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proofs.photographs import photographs
from proofs.torch_resnet import random_torch_resnet
from proofs.torture import hostile_images, hostile_weights, packing, strangers, watch
from tat_jax.data.transforms import DecodeError, decode
from tat_jax.weights.files import read_entries
from tat_jax.weights.names import convert_entries
from tests.images import encode, photograph


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """Return a folder for what should not happen."""
    return tmp_path_factory.mktemp("keep")


@pytest.fixture(scope="module")
def photo():
    """Return one JPEG file."""
    return photographs(None, 1)[0].jpeg


@pytest.fixture(scope="module")
def bombs():
    """Return files of little content that ask for much, by what they do and by name."""
    return hostile_weights.bombs()


def assert_survived(faults, capfd):
    assert all(fault.tried for fault in faults)
    assert [f.fault for f in faults if f.survived < f.tried] == [], capfd.readouterr().err


def test_the_command_refuses_every_weight_file_that_attacks_or_lies_and_writes_nothing(keep, capfd):
    assert_survived(strangers.weight_faults(keep), capfd)


def test_the_input_pipeline_reports_every_broken_image_by_its_path(keep, photo, capfd):
    assert_survived(strangers.image_faults([photo], keep, flips=20), capfd)


def test_mutants_of_weight_files_and_images_are_read_or_refused(keep, photo, capfd):
    found = [strangers.fuzz_weights(2, 1, keep), strangers.fuzz_images([photo], 2, 1, keep)]
    assert_survived(found, capfd)
    assert all(fault.tried > 50 for fault in found)


def misbehave(path: Path) -> str:
    """Do what the file's name says, as a reader with a hole would."""
    match path.name:
        case "raise":
            raise RuntimeError("not ours")
        case "execute":
            os.system("true")
        case "execute and read":
            os.system("true")
            return "read"
        case "write":
            (path.parent / "left").write_text("behind")
        case "grow":
            np.ones(1700 << 20, np.uint8)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(60)
    return "refused"


class TestTheWatch:
    def outcomes(self, folder: Path, *names: str) -> dict[str, watch.Outcome]:
        for part in ("tried", "kept"):
            (folder / part).mkdir()
        files = {name: name.encode() for name in ("sound", *names)}
        arguments = (folder / "tried", files)
        found = watch.try_all(misbehave, strangers.write_in_turns, arguments, folder / "kept")
        return {outcome.name: outcome for outcome in found}

    def test_it_sees_what_no_reader_may_do_and_keeps_the_files(self, tmp_path):
        names = ("raise", "execute", "execute and read", "write", "grow", "crash")
        found = self.outcomes(tmp_path, *names)
        assert [name for name, outcome in found.items() if outcome.survived] == ["sound"]
        assert found["raise"].verdict == "RuntimeError: not ours"
        assert found["execute"].verdict.startswith("os.system")
        assert found["execute and read"].verdict.startswith("os.system")
        assert "left" in found["write"].verdict
        assert found["grow"].mebibytes > 1690
        assert found["crash"].verdict == "the process ended with -11"
        assert {*names, "output.txt"} == set(os.listdir(tmp_path / "kept"))

    def test_it_ends_what_hangs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(watch, "SECONDS", 0.5)
        found = self.outcomes(tmp_path, "hang", "next")
        assert found["hang"].verdict == "it hangs"
        assert "next" not in found


def reason(folder: Path, name: str, data: bytes) -> str:
    """Return why a weight file is refused."""
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=name) as refused:
        read_entries(folder / name)
    return str(refused.value)


# A check of the annotations of each call would be minutes over a million operations of a pickle.
@pytest.mark.usefixtures("unchecked")
class TestWeights:
    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("memo", "it holds no tensors by name"),  # filled 16 GB: an index of four bytes
            ("hash", "keys that are neither names nor numbers"),  # hashed 2⁴⁰ tuples: two in two in two …
            ("names", "keys that are neither names nor numbers"),
            ("global", "names something by what is no name"),
            ("arguments", "calls something with what are no arguments"),  # copied a long tuple for minutes
            ("repr", "missing 3 required"),  # was to be written into the error, 2⁴⁰ times
            ("dup", "no need of pickle's DUP"),
            ("dicts", "more than 1,000,000 operations"),
            ("bytes8", "damaged"),  # asked for a terabyte at once
            ("pops", "no need of pickle's POP"),
            ("shape", "a tensor of shape"),
            ("dimensions", "no shape and strides that a tensor can have"),
            ("strides", "reaches beyond its 4 elements"),  # a terabyte of one element
            ("negative", "negative"),
            ("items", "more than 1,000,000 operations"),  # of Python 2, copied a hundred thousand times
            ("twice", "it holds no tensors by name"),  # a dictionary in two, in two …
            ("within", "it holds no tensors by name"),
            ("deep", "it holds no tensors by name"),
            ("range", "it holds no tensors by name"),  # stepped over, and so the next two
            ("bytes", "it holds no tensors by name"),
            ("array", "it holds no tensors by name"),
        ],
    )
    def test_a_pickle_that_grows_is_refused_for_what_it_does(self, tmp_path, bombs, name, why):
        name = f"{name}.pth"
        assert why in reason(tmp_path, name, bombs["pickles that grow"][name])

    @pytest.mark.parametrize(
        ("group", "name", "why"),
        [
            ("tensors larger than their file", "shared.pth", "together are larger than its"),
            ("tensors larger than their file", "claimed-legacy.pth", "not of the size it claims"),
            ("pickles that grow", "keys.pth", "one of its storages has no name"),
            ("zip bombs", "deflated.pth", "archive/data.pkl is compressed"),
            ("zip bombs", "overlapping.pth", "members claim more bytes than it has"),
            ("zip bombs", "member.pth", "members claim more bytes than it has"),
        ],
    )
    def test_a_file_that_would_be_larger_in_memory_is_refused(self, tmp_path, bombs, group, name, why):
        assert why in reason(tmp_path, name, bombs[group][name])

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("seventy dimensions", "maximum supported dimension"),  # an error without the file's name
            ("an empty product", "is no safetensors file"),  # the same
            (
                "a hundred megabytes",
                "its header claims 99,000,002 bytes",
            ),  # JSON made 2.4 GB of such a header
        ],
    )
    def test_a_header_beyond_what_arrays_can_have_is_refused(self, tmp_path, name, why):
        name = f"{name}.safetensors"
        assert why in reason(tmp_path, name, hostile_weights.lying_headers()[name])

    @pytest.mark.parametrize(
        ("tensor", "why"),
        [
            (packing.tensor(shape=(2, 2), strides=(3, 1)), "reaches beyond its 4 elements"),
            (packing.tensor(shape=(1,), offset=4), "reaches beyond its 4 elements"),
            (packing.tensor(of=packing.storage(size=5)), "a storage of 5 elements has 16 bytes"),
            (packing.tensor(of=packing.value(0)), "a tensor has no storage"),
            (packing.storage() + packing.value("x") + b"\x85R", "it calls a Storage"),
        ],
    )
    def test_a_tensor_that_is_not_in_its_storage_is_refused(self, tmp_path, tensor, why):
        assert why in reason(tmp_path, "tensor.pth", packing.zipped(packing.pickled({"a": tensor})))

    def test_attributes_that_a_pickle_sets_change_nothing(self, tmp_path):
        changed = packing.storage() + b"}" + packing.value("size") + packing.value(9) + b"sb"
        path = tmp_path / "attributes.pth"
        path.write_bytes(packing.zipped(packing.pickled({"a": packing.tensor(of=changed)})))
        np.testing.assert_array_equal(read_entries(path)["a"], np.zeros(4, np.float32))

    def test_two_tensors_or_members_of_one_name_are_refused(self, tmp_path):
        inner = b"}" + packing.value("a") + packing.tensor() + b"s"
        both = packing.pickled({"module.a": packing.tensor(), "module": inner})
        assert "tensors are named module.a" in reason(tmp_path, "both.pth", packing.zipped(both))
        one = packing.zipped(packing.pickled({"a": packing.tensor()}))
        (tmp_path / "twice.pth").write_bytes(one)
        with zipfile.ZipFile(tmp_path / "twice.pth", "a") as archive, pytest.warns(UserWarning, match="Dupl"):
            archive.writestr("archive/data/0", bytes(16))
        twice = (tmp_path / "twice.pth").read_bytes()
        assert "two of its members have one name" in reason(tmp_path, "twice.pth", twice)

    @pytest.mark.parametrize(
        ("stem", "why"),
        [
            # A division by the width; arrays of every claimed size were made.
            ((0, 3, 7, 7), r"f has no numbers in conv1\.weight"),
            ((10**12, 3, 7, 0), r"f has no numbers in conv1\.weight"),
            ((10**6, 1, 1, 1), "f does not hold this network"),
        ],
    )
    def test_a_stem_cannot_ask_for_a_network_of_any_width(self, stem, why):
        whole = random_torch_resnet("resnet18", width=2, num_classes=3).state_dict()
        entries = {name: tensor.numpy() for name, tensor in whole.items()}
        entries["conv1.weight"] = np.zeros(stem, np.int8)
        with pytest.raises(ValueError, match=why):
            convert_entries(entries, "resnet18", source="f")


class TestImages:
    def test_a_chroma_sampling_that_the_fast_reader_does_not_know_is_read_as_pillow_reads_it(self):
        whole = encode(photograph(32, 32), subsampling=2)
        other = whole.replace(b"\1\x22\0\2\x11\1", b"\1\x14\0\2\x11\1")  # 4:2:0 to 4:4:1
        assert other != whole
        expected = np.asarray(Image.open(io.BytesIO(other)).convert("RGB"))
        np.testing.assert_array_equal(decode(other, "a.JPEG"), expected)

    def test_a_jpeg_of_thousands_of_scans_is_refused_and_one_of_a_hundred_is_read(self):
        assert decode(hostile_images.jpeg_of_scans(64, 100), "a").shape == (64, 64, 3)
        with pytest.raises(DecodeError, match=r"^scans\.JPEG: more than 100 scans"):
            decode(hostile_images.jpeg_of_scans(64, 101), "scans.JPEG")

    def test_a_tile_may_be_larger_than_its_image_but_not_than_all_images(self):
        whole = hostile_images.tiff(16, 16, 64, hostile_images.deflated(64 * 32))
        assert decode(whole, "a").shape == (16, 16, 3)
        with pytest.raises(DecodeError, match=r"^tile\.tiff: 800,000,000 pixels, more than"):
            decode(hostile_images.tiff(16, 16, 40_000, hostile_images.deflated(1 << 20)), "tile.tiff")
