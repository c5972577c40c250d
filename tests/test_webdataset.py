"""Images in tar shards as WebDataset writes them, on disks and in buckets."""

import gzip
import io
import os
import re
import tarfile
import time
from pathlib import Path

import pytest

from tat_jax.configs import base
from tat_jax.data import sample
from tat_jax.data.source import class_names
from tat_jax.data.sources import WebDataset
from tests.images import encode, photograph
from tests.test_pipeline import assert_same, make

IMAGES = [encode(photograph(12, 16, seed=i)) for i in range(12)]


def pack(members: dict[str, bytes | tarfile.TarInfo], format: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar file of members by name: contents, or headers without any."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members.items():
            member, data = (
                (content, b"") if isinstance(content, tarfile.TarInfo) else (tarfile.TarInfo(), content)
            )
            member.name, member.size = name, len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def samples(*numbers: int) -> dict[str, bytes]:
    """Return images with their labels, which are their numbers modulo 3, as members of a shard."""
    return {
        name: content
        for i in numbers
        for name, content in ((f"{i:04d}.jpg", IMAGES[i]), (f"{i:04d}.cls", str(i % 3).encode()))
    }


SHARDS = {
    "train/00000.tar": pack(samples(0, 1, 2)),
    "train/00001.tar": pack(samples(5, 4)),
    "val/0.tar": pack(samples(6, 7, 8)),
}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Return a function that writes the shards and further files, and returns their root."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda files=(): write(tmp_path / "data", SHARDS | dict(files))


def examples(source) -> list[tuple[bytes, int]]:
    return [source[i][:2] for i in range(len(source))]


def header(name: str = "", **said) -> tarfile.TarInfo:
    """Return the header of a member that is no file as others are."""
    member = tarfile.TarInfo(name)
    for key, value in said.items():
        setattr(member, key, value)
    return member


def test_images_come_by_shard_in_their_order_with_their_labels(shards):
    root = shards()
    train, val = WebDataset(root, "train"), WebDataset(root, "val")
    assert examples(train) == [(IMAGES[i], i % 3) for i in (0, 1, 2, 5, 4)]
    assert examples(val) == [(IMAGES[i], i % 3) for i in (6, 7, 8)]
    assert train[3].name == f"{root}/train/00001.tar/0005.jpg"
    assert (train.num_classes, class_names(train), train.notes) == (3, None, [])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_only_names_in_every_kind_of_tar(shards, format):
    deep = "d" * 90
    names = [f"{deep}/{deep}/0", "../0", "/etc/0", "a/0", "./0", "b c/犬", "x" * 90]
    if format != tarfile.USTAR_FORMAT:  # which has no room for it
        names.append(f"{deep}/{deep}/{deep}/{deep}/0")
    members = {"a": header("a", type=tarfile.DIRTYPE)}
    for i, name in enumerate(names):
        members |= {f"{name}.JPG": IMAGES[i], f"{name}.cls": f"{i}\n".encode()}
    source = WebDataset(shards({"train/00000.tar": pack(members, format)}), "train")
    assert examples(source)[: len(names)] == [(IMAGES[i], i) for i in range(len(names))]
    shard = f"{source._folder.root}/train/00000.tar"
    assert [source[i].name for i in range(len(names))] == [f"{shard}/{name}.JPG" for name in names]


def test_times_to_the_second_and_to_the_nanosecond_are_taken(shards):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in samples(0, 1, 2).items():
            tar.addfile(header(name, size=len(content), mtime=1.7e9 + 0.5), io.BytesIO(content))
    assert file.getvalue() != SHARDS["train/00000.tar"]
    assert len(WebDataset(shards({"train/00000.tar": file.getvalue()}), "train")) == 5


def test_classes_that_nothing_says_are_asked_for(shards):
    unlabelled = pack({"0.jpg": IMAGES[0]})
    root = shards({"train/00000.tar": unlabelled, "train/00001.tar": unlabelled})
    with pytest.raises(ValueError, match=r"^no image of .*/train has a class index beside it, in \.cls$"):
        WebDataset(root, "val")


def test_what_is_no_file_is_never_opened(shards):
    root = shards()
    os.mkfifo(root / "train" / "00002.tar")
    assert len(WebDataset(root, "train")) == 5


def test_what_is_neither_image_nor_class_index_is_passed_over_and_told(shards):
    more = {
        "0000.json": b"{}",
        "0000.seg.png": b"",
        "._0001.jpg": b"",
        "9.gif": b"",
        "9.cls": b"0",
    }
    source = WebDataset(
        shards(
            {
                "train/00000.tar": pack(samples(0, 1, 2) | more),
                "train/00000_stats.json": b"",
                "train/._00000.tar": b"",
                "train/deep/1.tar": b"",
            }
        ),
        "train",
    )
    assert examples(source) == [(IMAGES[i], i % 3) for i in (0, 1, 2, 5, 4)]
    endings, hidden = source.notes
    assert endings.startswith(
        "train: passed over 2 .json, 1 folders with all in them, 1 .seg.png, 1 .gif, 1 .cls "
    )
    assert re.match(r"train: passed over names that begin with a dot \(2\): .*/train/\._00000\.tar, ", hidden)


def test_classes_may_have_names(shards):
    root = shards({"classes.txt": b"ant\r\nbee, a\ncat\ndodo\n"})
    (root / "train/00000.tar").unlink()
    (root / "train/00001.tar").unlink()
    val = WebDataset(root, "val")
    assert (val.num_classes, val.classes) == (4, ["ant", "bee, a", "cat", "dodo"])
    assert val.notes == ["val has no images of 1 of 4 classes: dodo"]


def test_without_names_there_are_as_many_classes_as_training_has(shards):
    root = shards({"train/00000.tar": pack({"0.jpg": IMAGES[0], "0.cls": b"6"})})
    assert WebDataset(root, "val").num_classes == 7
    assert WebDataset(root, "val").notes == ["val has no images of 4 of 7 classes: 3, 4, 5, 6"]


def of_0(**members) -> bytes:
    """Return a shard of the members by their endings, beside an image and its class index."""
    return pack({"0.jpg": IMAGES[0], "0.cls": b"0"} | {f"1.{key}": value for key, value in members.items()})


WHOLE = SHARDS["train/00000.tar"]
FAULTS = {
    "no class index": (
        of_0(jpg=IMAGES[1]),
        r"/1\.jpg has no class index beside it, .* of 4 images 1 have none$",
    ),
    "text": (
        of_0(jpg=IMAGES[1], cls=b"cat"),
        r"/1\.cls holds no class index but b'cat'; it is a whole number",
    ),
    "negative": (of_0(jpg=IMAGES[1], cls=b"-1"), r"/1\.cls holds no class index but b'-1'"),
    "empty index": (of_0(jpg=IMAGES[1], cls=b""), r"/1\.cls holds no class index but b''"),
    "huge index": (of_0(jpg=IMAGES[1], cls=b"1" * 99), r"/1\.cls holds no class index but b'1+'"),
    "two images": (
        of_0(jpg=IMAGES[1], cls=b"0", png=b""),
        r"/1\.png is of the same sample as 1\.jpg: name them",
    ),
    "a link": (
        of_0(jpg=header(type=tarfile.LNKTYPE, linkname="0.jpg")),
        r"/1\.jpg is a link: .* --hard-deref",
    ),
    "a symbolic link": (of_0(jpg=header(type=tarfile.SYMTYPE, linkname="0.jpg")), r"/1\.jpg is a link: "),
    "sparse": (
        of_0(jpg=header(type=tarfile.GNUTYPE_SPARSE)),
        r"/1\.jpg is a sparse file: .* without --sparse",
    ),
    "sparse by PAX": (
        of_0(jpg=header(pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"})),
        r"/1\.jpg is a sparse file",
    ),
    "a pipe": (of_0(jpg=header(type=tarfile.FIFOTYPE)), r"/1\.jpg is no file$"),
    "a tar within": (
        of_0(tar=WHOLE),
        r"00000\.tar holds other tar files, as 1\.tar: put those into its place",
    ),
    "no images": (
        pack({"0.txt": b"a"}),
        r"no images in .*/00000\.tar \(\.jpg .*passed over 1 \.txt; .*; remove it$",
    ),
    "no members": (pack({}), r"no images in .*/00000\.tar"),
    "empty": (b"", r"/00000\.tar is empty$"),
    "compressed": (
        gzip.compress(WHOLE),
        r"/00000\.tar is compressed \(gzip\), .*: decompress it, as `gunzip`",
    ),
    "text as tar": (b"no tar file\n" * 99, r"/00000\.tar is damaged \(.*\): pack or copy it anew$"),
    "damaged": (
        WHOLE[:1024] + b"x" * 1024 + WHOLE[2048:],
        r"/00000\.tar is damaged \(no member begins at byte 1,536\)",
    ),
    "joined": (
        WHOLE + WHOLE,
        r"/00000\.tar is damaged \(it goes on after its end at byte [\d,]+, as files do that `cat`",
    ),
    "negative size": (
        pack({"0.jpg": header(pax_headers={"size": "-512"})}),
        r"/00000\.tar is damaged \(.*\): pack",
    ),
}


@pytest.mark.parametrize(("shard", "told"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_with_a_shard_is_told_in_a_line(shards, shard, told):
    with pytest.raises(ValueError, match=f"(?s){told}") as caught:
        WebDataset(shards({"train/00000.tar": shard}), "train")
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_short_anywhere_is_told(shards):
    end = len(pack(samples(0, 1, 2)).rstrip(b"\0"))
    for length in range(1, end + 511, 300):
        with pytest.raises(ValueError, match=r"/00000\.tar is damaged \(.*\): pack or copy it anew"):
            WebDataset(shards({"train/00000.tar": WHOLE[:length]}), "train")


@pytest.mark.parametrize(
    ("files", "split", "told"),
    [
        ({"train/2.tar.gz": b""}, "train", r"/train/2\.tar\.gz is compressed, so that"),
        (
            {"val/1.tar": pack({"0.jpg": b"", "0.cls": b"3"})},
            "val",
            r"0\.jpg is of class 3, and train has 3, from 0",
        ),
        (
            {"classes.txt": b"ant\nbee"},
            "train",
            r"/0002\.jpg is of class 2, and classes\.txt names 2, from 0 on",
        ),
        (
            {"classes.txt": b"ant\n\nbee"},
            "train",
            r"line 2 of .*/classes\.txt is empty: each one names a class",
        ),
        ({"classes.txt": b"\xff"}, "train", r"/classes\.txt is no text in UTF-8"),
        ({"test/1.txt": b""}, "test", r"no \.tar files in .*/test; shards belong in .*/train/ and .*/val/"),
        ({}, "dev", r"no folder .*/dev; shards belong in "),
    ],
)
def test_what_is_no_folder_of_shards_is_told(shards, files, split, told):
    with pytest.raises((ValueError, FileNotFoundError), match=told) as caught:
        WebDataset(shards(files), split)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_a_link_to_nowhere_is_named(shards):
    root = shards()
    (root / "train/2.tar").symlink_to("nowhere")
    with pytest.raises(OSError, match=rf"^{root}/train/2\.tar cannot be read \(No such file or directory\)$"):
        WebDataset(root, "train")


def age(root: Path) -> None:
    """Let no file of a folder have changed for long."""
    for file in root.rglob("*"):
        os.utime(file, (0, time.time() - 60))


def test_a_list_is_kept_for_as_long_as_every_shard_is_the_same(shards):
    root = shards()
    age(root)
    expected = examples(WebDataset(root, "train"))
    shard = root / "train/00001.tar"
    before = shard.stat()
    shard.write_bytes(pack(samples(4, 5)))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    labels = [label for _, label in expected]
    assert [label for _, label in examples(WebDataset(root, "train"))] == labels  # as nothing tells of it
    os.utime(shard, (0, time.time() - 50))
    assert examples(WebDataset(root, "train")) == [(IMAGES[i], i % 3) for i in (0, 1, 2, 4, 5)]
    write(root, {"train/00002.tar": pack(samples(9))})
    age(root)
    assert len(WebDataset(root, "train")) == 6
    (root / "train/00000.tar").unlink()
    assert examples(WebDataset(root, "train")) == [(IMAGES[i], i % 3) for i in (4, 5, 9)]


def test_a_shard_that_changes_while_it_is_read_is_named(shards):
    root = shards()
    source = WebDataset(root, "train")
    write(root, {"train/00001.tar": WHOLE})
    assert source[0].image == IMAGES[0]
    with pytest.raises(OSError, match=f"^{root}/train/00001.tar has changed since it was listed$"):
        source[4]
    (root / "train/00001.tar").unlink()
    with pytest.raises(
        OSError, match=f"^{root}/train/00001.tar cannot be read \\(No such file or directory\\)$"
    ):
        source[4]


def test_an_image_is_read_whole_from_a_disk_that_gives_it_piece_by_piece(shards, monkeypatch):
    source, whole = WebDataset(shards(), "train"), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, start: whole(file, min(size, 100), start))
    assert source[1].image == IMAGES[1]


def test_processes_read_the_same_batches(shards):
    source = WebDataset(shards(), "train")
    expected = make(source, batch_size=2).epoch(1)
    shared = make(source, batch_size=2, processes=2, threads=1)
    assert_same(shared.epoch(1), expected)
    shared.close()


def test_a_check_says_how_many_images_there_are_and_names_one_that_is_broken(shards):
    broken = pack(samples(0, 1, 2) | {"0001.jpg": b"no image"})
    config = base.base()
    config.data.update({"source": "webdataset", "root": str(shards({"train/00000.tar": broken}))})
    said, data = sample.open_data(config, "train")
    assert said == "5 images, 3 classes, 1 step an epoch"
    with pytest.raises(
        ValueError, match=r"1 of 5 images cannot be read; .*\n.*/00000\.tar/0001\.jpg: not an image"
    ):
        sample.read_sample(config, data, "train")


# In buckets


@pytest.fixture
def stored(bucket, emulator):
    """Gives a folder in a bucket that holds the shards."""
    for name, content in SHARDS.items():
        emulator.write(f"runs/a/{name}", content)
    return bucket


def test_shards_in_a_bucket_are_those_of_a_disk(shards, stored):
    root = shards()
    for split in ("train", "val"):
        theirs, ours = WebDataset(root, split), WebDataset(str(stored), split)
        assert examples(ours) == examples(theirs)
        assert ours[0].name == theirs[0].name.replace(str(root), str(stored))


def test_the_mark_of_a_folder_in_a_bucket_is_no_shard(stored, emulator):
    of_folder = WebDataset(stored, "train")
    emulator.write("runs/a/train/", b"")
    assert examples(WebDataset(stored, "train")) == examples(of_folder)
    assert WebDataset(stored, "train").notes == of_folder.notes


def test_the_list_of_a_bucket_is_kept_for_as_long_as_no_shard_is_written(stored, emulator):
    expected = examples(WebDataset(str(stored), "train"))
    emulator.faults.requests.clear()
    again = WebDataset(str(stored), "train")
    assert not [path for _, path in emulator.faults.requests if path.endswith(".tar")]
    assert examples(again) == expected
    emulator.write("runs/a/train/00001.tar", pack(samples(4, 5)))
    assert examples(WebDataset(str(stored), "train"))[3:] == [(IMAGES[i], i % 3) for i in (4, 5)]


def test_a_shard_of_a_bucket_that_is_gone_or_another_is_named(stored, emulator):
    source = WebDataset(str(stored), "train")
    emulator.write("runs/a/train/00000.tar", pack(samples(3, 1, 2)))  # as long as it was
    with pytest.raises(OSError, match=f"^{stored}/train/00000.tar has changed since it was listed$"):
        source[0]
    emulator.delete("runs/a/train/00000.tar")
    with pytest.raises(FileNotFoundError, match=f"^there is no {stored}/train/00000.tar$"):
        source[0]


def test_a_shard_that_cannot_be_reached_is_named(stored, emulator, monkeypatch):
    monkeypatch.setattr("tat_jax.buckets._RETRIES", {"max_retries": 0})
    emulator.faults.fails = lambda method, path: path.endswith("00001.tar")
    with pytest.raises(
        OSError, match=f"^{stored}/train/00001.tar cannot be reached: 503 Service Unavailable$"
    ):
        WebDataset(str(stored), "train")
