"""Lists of many images are kept, and hold for as long as no folder changes."""

import os
import time
from pathlib import Path

import pytest

from tat_jax.data import disk_folder
from tat_jax.data.image_folder import ImageFolder

FIRST = [("ant/1.jpg", 0), ("ant/deep/2.jpg", 0), ("bee/3.jpg", 1)]


@pytest.fixture
def root(folder, tmp_path, monkeypatch):
    """Return a folder in which nothing has changed for long, with a list that is kept though it is short."""
    monkeypatch.setattr(disk_folder, "_MANY", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = folder("train/ant/1.jpg", "train/ant/deep/2.jpg", "train/bee/3.jpg", "train/loose.jpg")
    (root / "train/ant/notes.txt").write_text("no image")
    for place, _, _ in os.walk(root / "train"):
        os.utime(place, (0, time.time() - 60))
    assert images(root) == FIRST
    return root


def images(root) -> list[tuple[str, int]]:
    source = ImageFolder(root, "train")
    one_of_each = ["train: passed over 1 .txt", "train: passed over images outside class folders (1)"]
    assert [note.startswith(line) for note, line in zip(source.notes, one_of_each, strict=True)] == [True] * 2
    examples = map(source.__getitem__, range(len(source)))
    return [(example.name.removeprefix(f"{root}/train/"), example.label) for example in examples]


def lists(root) -> list[Path]:
    return list((root / "cache/tat_jax/lists").glob("*"))


def test_a_list_is_kept_with_what_was_passed_over(root):
    before = (root / "train/bee").stat()
    (root / "train/bee/9.jpg").touch()
    os.utime(root / "train/bee", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert images(root) == FIRST  # as nothing tells that the folder is another one
    assert len(lists(root)) == 1


@pytest.mark.parametrize("place", ["bee", "ant/deep", "cat"])
def test_a_new_image_in_any_folder_is_seen(root, place):
    (root / "train" / place).mkdir(exist_ok=True)
    (root / "train" / place / "9.jpg").write_bytes((root / "train/ant/1.jpg").read_bytes())
    assert f"{place}/9.jpg" in dict(images(root))


def test_an_image_that_is_gone_is_gone(root):
    (root / "train/ant/deep/2.jpg").unlink()
    assert images(root) == [FIRST[0], FIRST[2]]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", None], ids=["empty", "another", "cut short"])
def test_a_list_that_is_damaged_is_made_anew(root, content):
    (kept,) = lists(root)
    kept.write_bytes(kept.read_bytes()[:500] if content is None else content)
    assert images(root) == FIRST
    assert len(ImageFolder(root, "train")) == 3


def test_a_list_of_folders_that_just_changed_is_not_kept(root):
    (kept,) = lists(root)
    kept.unlink()
    (root / "train/bee/9.jpg").write_bytes((root / "train/ant/1.jpg").read_bytes())
    assert len(images(root)) == 4
    assert not lists(root)


def test_without_a_place_to_keep_it_images_are_listed(root, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "train/ant/notes.txt"))
    assert images(root) == FIRST
