"""Folders in buckets, in both stores, also where requests fail."""

import sys

import pytest

from tat_jax import networks
from tat_jax.buckets import Bucket, place
from tat_jax.data.image_folder import ImageFolder
from tat_jax.export import export
from tat_jax.weights import store
from tests.emulator import Faults
from tests.images import encode, photograph
from tests.test_checkpoints import save, state_of
from tests.test_store import tiny, written
from tests.tiny import Tiny


def test_what_is_written_is_listed_and_read(bucket, tmp_path):
    (tmp_path / "file").write_bytes(b"of a file")
    bucket.write("x/y", b"bytes")
    bucket.write("x/z", tmp_path / "file")
    (bucket / "b").write("file", b"further down")
    assert {name: entry.size for name, entry in bucket.objects().items()} == {
        "x/y": 5,
        "x/z": 9,
        "b/file": 12,
    }
    assert bucket.objects("x").keys() == {"x/y", "x/z"}
    assert bucket.folders() == ["b", "x"]
    assert bucket.read("x/z") == b"of a file"
    bucket.delete(["x/y", "x/never"])
    assert bucket.objects().keys() == {"x/z", "b/file"}


def test_objects_are_fetched_whole_in_whatever_parts(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("tat_jax.buckets._PART", 1000)
    data = bytes(range(256)) * 20
    bucket.write("a/large", data)
    bucket.write("empty", b"")
    bucket.fetch(bucket.objects(), tmp_path)
    assert (tmp_path / "a/large").read_bytes() == data
    assert (tmp_path / "empty").read_bytes() == b""


def test_an_object_is_written_in_the_place_of_one_version_alone(bucket):
    first = bucket.write_instead("lock", b"first", None)
    with pytest.raises(FileExistsError):
        bucket.write_instead("lock", b"second", None)
    second = bucket.write_instead("lock", b"second", first)
    with pytest.raises(FileExistsError):
        bucket.write_instead("lock", b"third", first)
    assert bucket.read_stamped("lock") == (b"second", second)


def test_what_is_not_there_is_named(bucket):
    with pytest.raises(FileNotFoundError, match=f"there is no {bucket}/nothing"):
        bucket.read("nothing")
    assert bucket.objects() == {}


def test_a_bucket_that_is_not_there_is_named(bucket, emulator):
    emulator.faults = Faults(lambda *_: True, ("404 Not Found", "NoSuchBucket"))
    with pytest.raises(FileNotFoundError, match=f"there is no bucket of {bucket}$"):
        bucket.objects()


def test_requests_that_fail_now_and_then_are_sent_again(bucket, emulator):
    emulator.faults = Faults(lambda *_: len(emulator.faults.requests) % 3 > 0)
    for i in range(3):
        bucket.write(f"object{i}", b"data")
    assert len(bucket.objects()) == 3
    assert bucket.read("object0") == b"data"


def test_a_store_that_does_not_answer_is_told_in_a_line(bucket, emulator, monkeypatch):
    monkeypatch.setattr("tat_jax.buckets._RETRIES", {"max_retries": 1})
    emulator.faults = Faults(lambda *_: True)
    with pytest.raises(OSError, match=f"^{bucket}/x cannot be reached: 503 Service Unavailable$"):
        bucket.read("x")


def test_access_that_is_denied_is_told_in_a_line(bucket, emulator):
    emulator.faults = Faults(lambda *_: True, ("403 Forbidden", "AccessDenied"))
    with pytest.raises(PermissionError, match=f"^access to {bucket}/x is denied; give the account"):
        bucket.read("x")


@pytest.mark.parametrize(
    ("url", "way_out"), [("s3://bucket/x", "AWS_ACCESS_KEY_ID"), ("gs://bucket/x", "GOOGLE_APPLICATION_CRED")]
)
def test_credentials_that_are_missing_are_told_in_a_line(url, way_out, emulator, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_SERVICE_ACCOUNT_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr("tat_jax.buckets._RETRIES", {"max_retries": 0})
    with pytest.raises(
        PermissionError, match=f"^no credentials for {url}; they come from .*{way_out}"
    ) as error:
        Bucket(url).objects()
    assert "\n" not in str(error.value)


def test_without_the_library_its_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ModuleNotFoundError, match=r"^gs://bucket/x needs obstore: pip install obstore$"):
        Bucket("gs://bucket/x").objects()


@pytest.mark.parametrize("address", ["file:///x", "hdfs://x/y", "gs:/x", "gs://", "az://x/y", "http://x/y"])
def test_an_address_of_another_kind_is_refused(address):
    with pytest.raises(ValueError, match=f"^{address} is not on a disk of this machine, or in a bucket"):
        place(address)


# Weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three checkpoints, of which the first is the best."""
    folder = tmp_path_factory.mktemp("run")
    for step, measure in ((1, 0.9), (2, 0.5), (3, 0.7)):
        save(folder, state_of(tiny(seed=step), step=step), {"top1": measure})
    return folder


def build(num_classes, rngs):
    return Tiny(2, rngs=rngs)


def assert_is(network, seed):
    expected = store.network_weights(tiny(seed=seed))
    found = store.network_weights(network.view.network)
    assert all((found[name] == array).all() for name, array in expected.items())


def test_weights_in_a_bucket_are_those_of_a_folder(bucket, emulator, tmp_path):
    written(tmp_path / "w", seed=4)
    emulator.copy(tmp_path / "w", "runs/a")
    assert_is(networks.restore(str(bucket), network=build), seed=4)


def test_the_best_network_of_a_run_in_a_bucket_is_found_and_the_training_is_not_fetched(
    bucket, emulator, run
):
    emulator.copy(run, "runs/a")
    network = networks.restore(str(bucket), network=build)
    assert_is(network, seed=1)
    assert network.origin["source"] == str(bucket)
    assert not any(m == "GET" and "/training/" in path for m, path in emulator.faults.requests)
    assert_is(networks.restore(f"{bucket}/checkpoints/3", network=build), seed=3)


def test_a_checkpoint_in_a_bucket_that_is_not_whole_is_passed_over(bucket, emulator, run):
    emulator.copy(run, "runs/a")
    emulator.delete("runs/a/checkpoints/1/_CHECKPOINT_METADATA")
    assert_is(networks.restore(str(bucket), network=build), seed=3)


def test_weights_in_a_bucket_prove_what_they_hold(bucket, emulator, tmp_path):
    written(tmp_path / "w")
    emulator.copy(tmp_path / "w", "runs/a")
    said = emulator.read("runs/a/network/metadata")
    emulator.write("runs/a/network/metadata", said.replace(b"a test", b"a lie!"))
    with pytest.raises(ValueError, match=f"^cannot read the network in {bucket}: network does not say"):
        networks.restore(str(bucket), network=build)


def test_where_a_bucket_holds_no_weights_it_is_told(bucket):
    with pytest.raises(FileNotFoundError, match=f"^there are no weights and no run in {bucket}$"):
        networks.restore(str(bucket), network=build)


def test_a_student_is_handed_on_from_a_bucket(bucket, emulator, run, tmp_path):
    emulator.copy(run, "runs/a")
    exported = export(bucket, tmp_path / "w.safetensors", "last", student=build)
    assert exported.folder == f"{bucket}/checkpoints/3"
    assert (tmp_path / "w.safetensors").exists()


# Images


def pictures(emulator, *names):
    """Put images of those names into the bucket, and return their bytes by name."""
    files = {name: encode(photograph(12, 16, seed=i)) for i, name in enumerate(names)}
    for name, data in files.items():
        emulator.write(f"runs/a/{name}", data)
    return files


def test_images_in_a_bucket_are_those_of_a_folder_in_its_order(bucket, emulator, tmp_path):
    names = ("b/2.jpg", "b/10.jpg", "a b/é.JPEG", "a b/deep/1.png", "a b/deep-er/1.png", "a b/z#1 50%.jpg")
    files = pictures(emulator, *(f"train/{name}" for name in names), "val/b/1.jpg", "val/b/notes.txt")
    pictures(emulator, "train/.hidden/1.jpg", "train/b/.2.jpg")
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    for split in ("train", "val"):
        ours, theirs = ImageFolder(str(bucket), split), ImageFolder(tmp_path, split)
        assert ours.classes == theirs.classes == ["a b", "b"]
        assert len(ours) == len(theirs)
        for i in range(len(ours)):
            assert ours[i].name == theirs[i].name.replace(str(tmp_path), str(bucket))
            assert ours[i][:2] == theirs[i][:2]
    assert ours.notes == theirs.notes
    assert "names that begin with a dot (2)" in ImageFolder(str(bucket), "train").notes[0]


@pytest.mark.parametrize(
    ("names", "split", "answer"),
    [
        ((), "train", "no folders in {}/train; images belong in {}/train/<class>/"),
        (("train/a/1.jpg",), "val", "no folders in {}/val; images belong in"),
        (("train/a/1.jpg", "train/b/1.txt"), "train", "no images in {}/train/b "),
        (("train/a/1.jpg", "val/b/1.jpg"), "val", "{}/val has classes that train lacks: b"),
    ],
)
def test_what_is_no_folder_of_images_in_a_bucket_is_told(names, split, answer, bucket, emulator):
    pictures(emulator, *names)
    with pytest.raises((ValueError, FileNotFoundError), match=answer.format(bucket, bucket)):
        ImageFolder(str(bucket), split)


def test_an_image_that_cannot_be_reached_is_named(bucket, emulator, monkeypatch):
    monkeypatch.setattr("tat_jax.buckets._RETRIES", {"max_retries": 0})
    pictures(emulator, "train/a/1.jpg")
    source = ImageFolder(str(bucket), "train")
    emulator.faults = Faults(lambda *_: True)
    with pytest.raises(OSError, match=f"^{bucket}/train/a/1.jpg cannot be reached: 503 Service Unavailable$"):
        source[0]
