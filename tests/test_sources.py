"""Sources: examples in an order that never changes, and what is missing or passed over named."""

import errno
import io
import os
from contextlib import redirect_stdout

import numpy as np
import pytest
from ml_collections import ConfigDict

from tat_jax.configs import base
from tat_jax.data.image_folder import ImageFolder, imagenet_classes
from tat_jax.data.sample import Sample
from tat_jax.data.source import class_names, notes, printable, some
from tat_jax.data.sources import Digits, open_source


class TestImageFolder:
    def test_examples_come_in_torchvisions_order_with_sorted_labels(self, folder):
        root = folder(
            "train/dog/b.JPEG",
            "train/dog/a.png",
            "train/dog/deep/er/c.jpg",
            "train/cat/z.WebP",
            "val/dog/v.jpeg",
        )
        (root / "train/dog/notes.txt").write_text("no image")
        source = ImageFolder(root, "train")
        assert source.num_classes == 2
        assert [(example.name, example.label) for example in map(source.__getitem__, range(len(source)))] == [
            (f"{root}/train/cat/z.WebP", 0),
            (f"{root}/train/dog/a.png", 1),
            (f"{root}/train/dog/b.JPEG", 1),
            (f"{root}/train/dog/deep/er/c.jpg", 1),
        ]
        assert source[1].image == (root / "train/dog/a.png").read_bytes()

    def test_imagenets_ids_have_imagenets_labels_even_if_some_are_missing(self, folder):
        root = folder("train/n13133613/a.JPEG", "train/n01440764/b.JPEG", "val/n15075141/c.JPEG")
        train, val = ImageFolder(root, "train"), ImageFolder(root, "val")
        assert (train.num_classes, [train[0].label, train[1].label]) == (1000, [0, 998])
        assert (val.num_classes, val[0].label) == (1000, 999)
        assert train.classes == val.classes == imagenet_classes()
        assert train.notes == [
            "all class folders (2) are ids of ImageNet, so that labels are those of its 1,000 classes; "
            "--config.data.classes=folders numbers the folders"
        ]

    def test_imagenets_ids_are_numbered_as_other_names_where_the_config_says_so(self, folder):
        root = folder("train/n13133613/a.jpg", "train/n01440764/b.jpg", "val/n13133613/c.jpg")
        data = base.base().data
        data.update({"root": str(root), "classes": "folders"})
        train, val = open_source(data, "train"), open_source(data, "val")
        assert train.classes == val.classes == ["n01440764", "n13133613"]
        assert (train.num_classes, train.notes, val[0].label) == (2, [], 1)

    def test_all_thousand_ids_are_no_matter_to_speak_of(self, tmp_path):
        for name in imagenet_classes():
            (tmp_path / "train" / name).mkdir(parents=True)
            (tmp_path / "train" / name / "1.jpg").touch()
        source = ImageFolder(tmp_path, "train")
        assert (len(source), source.num_classes, source.notes) == (1000, 1000, [])

    def test_the_1000_ids_are_sorted_and_distinct(self):
        assert len(imagenet_classes()) == 1000
        assert imagenet_classes() == sorted(set(imagenet_classes()))

    def test_validation_has_the_labels_of_training_even_if_it_lacks_classes(self, folder):
        root = folder("train/ant/1.jpg", "train/bee/1.jpg", "train/cat/1.jpg", "val/cat/1.jpg")
        val = ImageFolder(root, "val")
        assert (val.num_classes, val[0].label, val.classes) == (3, 2, ["ant", "bee", "cat"])
        assert val.notes == ["val lacks 2 of train's 3 classes: ant, bee"]

    def test_one_strange_folder_makes_both_splits_number_the_folders_of_train(self, folder):
        root = folder(
            "train/n01440764/a.jpg", "train/n15075141/a.jpg", "train/extra/a.jpg", "val/n15075141/a.jpg"
        )
        train, val = ImageFolder(root, "train"), ImageFolder(root, "val")
        assert train.num_classes == val.num_classes == 3
        assert train[2].label == val[0].label == 2

    def test_a_class_that_training_lacks_is_an_error(self, folder):
        root = folder("train/ant/1.jpg", "val/ant/1.jpg", "val/bee/1.jpg")
        with pytest.raises(ValueError, match=r"val has classes that train lacks: bee$"):
            ImageFolder(root, "val")

    @pytest.mark.parametrize("name", ["Ant", "ant ", "ANT", "a-n_t"])
    def test_a_class_that_is_called_almost_as_one_of_training_is_told_with_it(self, folder, name):
        root = folder("train/ant/1.jpg", f"val/{name}/1.jpg")
        with pytest.raises(ValueError, match=rf"train lacks: '{name}' \(train has 'ant'\)$"):
            ImageFolder(root, "val")

    def test_the_same_name_in_two_unicode_forms_is_one_class(self, folder):
        composed, decomposed = "caf\u00e9", "cafe\u0301"
        root = folder(
            f"train/{composed}/1.jpg", "train/dog/1.jpg", f"val/{decomposed}/1.jpg", "val/dog/1.jpg"
        )
        train, val = ImageFolder(root, "train"), ImageFolder(root, "val")
        assert train.classes == val.classes == [composed, "dog"]
        assert [val[i].label for i in range(2)] == [0, 1]
        assert val[0].name == f"{root}/val/{decomposed}/1.jpg"
        (root / "train" / decomposed).mkdir()
        with pytest.raises(ValueError, match=r"two Unicode forms, 'cafe\\u0301' and 'caf\\xe9': put their"):
            ImageFolder(root, "val")

    def test_symbolic_links_to_splits_classes_and_folders_within_work(self, folder):
        root = folder("elsewhere/ant/1.jpg", "elsewhere/more/2.jpg", "train/bee/1.jpg")
        (root / "train/ant").symlink_to(root / "elsewhere/ant")
        (root / "train/bee/more").symlink_to(root / "elsewhere/more")
        (root / "val").symlink_to(root / "train")
        source = ImageFolder(root, "val")
        assert [source[i].label for i in range(len(source))] == [0, 1, 1]
        assert source.notes == ["val and train share the folders of their images: ant, bee"]

    def test_two_classes_that_are_one_folder_are_refused(self, folder):
        root = folder("train/ant/1.jpg", "train/bee/1.jpg")
        (root / "train/cat").symlink_to("ant")
        with pytest.raises(ValueError, match=r"/train has two classes that are one folder, ant and cat: its"):
            ImageFolder(root, "train")

    def test_hidden_files_and_folders_are_passed_over_and_told_of(self, folder):
        root = folder("train/ant/1.jpg", "train/bee/._1.jpg", "train/bee/1.jpg", "train/bee/.old/2.jpg")
        (root / "train/bee/.DS_Store").touch()
        (root / "train/.ipynb_checkpoints").mkdir()
        source = ImageFolder(root, "train")
        assert (len(source), source.num_classes) == (2, 2)
        (line,) = source.notes
        assert line.startswith("train: passed over names that begin with a dot (3): ")

    def test_files_that_torchvision_does_not_read_are_counted_by_their_endings(self, folder):
        root = folder("train/ant/1.jpg", "train/bee/1.jpg", "train/0.jpg")
        for name in ("ant/a.gif", "bee/b.GIF", "bee/deep/c.gif", "ant/d.jfif", "ant/readme"):
            (root / "train" / name).parent.mkdir(exist_ok=True)
            (root / "train" / name).touch()
        os.mkfifo(root / "train/bee/2.jpg")  # who opens it waits for ever
        source = ImageFolder(root, "train")
        assert len(source) == 2
        assert source.notes == [
            "train: passed over 3 .gif, 1 .jfif, 1 without ending, 1 .jpg that are no files; read are "
            ".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp",
            f"train: passed over images outside class folders (1): {root}/train/0.jpg",
        ]

    def test_links_that_lead_nowhere_are_passed_over_and_told_of(self, folder):
        root = folder("train/ant/1.jpg", "train/bee/1.jpg")
        for i, target in enumerate(("gone.jpg", "1.jpg/gone", "3.jpg", "/gone/folder")):
            (root / f"train/ant/{i + 1 if i else 'x'}.jpg").symlink_to(target)  # 3.jpg leads to itself
        source = ImageFolder(root, "train")
        assert len(source) == 2
        (line,) = source.notes
        assert line.startswith(f"train: passed over links that lead nowhere (4): {root}/train/ant/")
        assert line.endswith(" and 2 more")

    def test_links_back_are_not_followed_whatever_they_lead_to(self, folder):
        root = folder("train/ant/1.jpg", "train/ant/deep/2.jpg", "train/bee/1.jpg", "val/ant/1.jpg")
        before = [ImageFolder(root, "train")[i].name for i in range(3)]
        for i, target in enumerate((".", "..", "../..", "deep/..", root, root.parent)):
            (root / f"train/ant/back{i}").symlink_to(target)
        (root / "train/ant/deep/back").symlink_to("../../ant")
        source = ImageFolder(root, "train")
        assert [source[i].name for i in range(len(source))] == before
        (line,) = source.notes
        assert line.startswith("train: passed over links that lead back to a folder around them (7): ")

    def test_a_class_that_is_a_link_to_nowhere_is_an_error_for_the_labels_behind_it_would_shift(self, folder):
        root = folder("train/ant/1.jpg", "train/cat/1.jpg", "val/ant/1.jpg")
        (root / "train/bee").symlink_to("/mnt/gone/bee")
        for split in ("train", "val"):
            with pytest.raises(FileNotFoundError, match=r"class folders of .*/train are links .* bee → /mnt"):
                ImageFolder(root, split)
        (root / "train/bee").unlink()
        (root / "train/bee.jpg").symlink_to("/mnt/gone/bee.jpg")
        assert ImageFolder(root, "train").classes == ["ant", "cat"]

    @pytest.mark.parametrize("unreadable", ["ant", "ant/deep", ""], ids=["class", "within", "split"])
    def test_folders_that_cannot_be_read_are_an_error_that_names_them(self, folder, monkeypatch, unreadable):
        root = folder("train/ant/deep/1.jpg", "train/ant/2.jpg", "train/bee/1.jpg")
        path, scandir = os.path.join(root, "train", unreadable).rstrip("/"), os.scandir

        def refuse(folder):  # root may read all
            if os.fspath(folder) == path:
                raise OSError(errno.EIO, "Input/output error", folder)
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(OSError, match=rf"{path}.*\(Input/output error\).* let this user read") as caught:
            ImageFolder(root, "train")
        assert "\n" not in str(caught.value)

    def test_one_class_that_holds_folders_is_told_for_the_classes_may_lie_too_deep(self, folder):
        root = folder("train/images/ant/1.jpg", "train/images/bee/1.jpg")
        source = ImageFolder(root, "train")
        assert source.classes == ["images"]
        assert source.notes == [
            "train has one class, images: nothing is to be told apart; if ant, bee in it are the classes, "
            f"they belong in {root}/train"
        ]

    def test_names_of_any_bytes_can_be_read_and_shown(self, folder):
        root = folder("train/ant/1.jpg", "val/ant/1.jpg")
        for name in (b"line\nbreak", b"latin\xe9", b"tab\t"):
            path = os.path.join(os.fsencode(root), b"train", name)
            os.mkdir(path)
            os.link(root / "train/ant/1.jpg", os.path.join(path, name + b".jpg"))
        source = ImageFolder(root, "train")
        names = [source[i].name for i in range(len(source))]
        assert names[1:3] == [f"{root}/train/{name}/{name}.jpg" for name in (r"latin\udce9", r"line\nbreak")]
        with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):  # strict
            print(*names, *ImageFolder(root, "val").notes)
        assert ImageFolder(root, "val").notes == [
            r"val lacks 3 of train's 4 classes: latin\udce9, line\nbreak, tab\t"
        ]

    def test_the_home_folder_may_be_called_by_its_sign(self, folder, monkeypatch):
        root = folder("data/train/ant/1.jpg")
        monkeypatch.setenv("HOME", str(root))
        assert ImageFolder("~/data/", "train")[0].name == f"{root}/data/train/ant/1.jpg"

    def test_a_sample_knows_the_classes_of_its_source(self, folder):
        root = folder("train/ant/1.jpg")
        assert class_names(Sample(ImageFolder(root, "train"))) == ["ant"]

    @pytest.mark.parametrize(
        ("paths", "split", "error", "message"),
        [
            (
                ["train/a/1.jpg"],
                "val",
                FileNotFoundError,
                r"no folder .*/val; images belong in .*/val/<class>/",
            ),
            (["val/a/1.jpg"], "train", FileNotFoundError, r"no folder .*/train; images belong in"),
            (
                ["val/a/1.jpg"],
                "val",
                FileNotFoundError,
                r"no class folders in .*/train to number those of val",
            ),
            (
                ["train/1.jpg", "train/2.jpg"],
                "train",
                ValueError,
                r"/train has no class folders; images belong",
            ),
            (
                ["train/a/1.jpg", "train/b/1.txt"],
                "train",
                FileNotFoundError,
                r"no images in .*/train/b \(\.jpg .*\); train: passed over 1 \.txt",
            ),
            (
                ["train/a/1.jpg", "validation/a/1.jpg"],
                "val",
                FileNotFoundError,
                r"/validation holds .* call it val",
            ),
            (
                ["train/a/1.jpg", "val"],
                "val",
                NotADirectoryError,
                r"/val is a file and no folder; images belong",
            ),
            (
                ["in/train/a/1.jpg", "in/val/a/1.jpg"],
                "train",
                FileNotFoundError,
                r"did you mean --config.data.root=.*/in\?",
            ),
        ],
        ids=["no val", "no train", "val alone", "flat", "empty class", "validation", "file", "too deep"],
    )
    def test_what_is_missing_is_named(self, folder, paths, split, error, message):
        root = folder(*paths)
        with pytest.raises(error, match=message) as caught:
            ImageFolder(root, split)
        assert "\n" not in str(caught.value)

    def test_a_split_named_as_the_root_is_answered_with_the_folder_around_it(self, folder):
        root = folder("train/a/1.jpg", "val/a/1.jpg")
        with pytest.raises(
            FileNotFoundError, match=rf"no folder .*/train/val; .*mean --config.data.root={root}\?$"
        ):
            ImageFolder(root / "train", "val")

    def test_a_missing_root_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder .*/nowhere; images belong"):
            ImageFolder(tmp_path / "nowhere", "train")


def test_a_file_is_read_whole_from_a_disk_that_gives_it_piece_by_piece(folder, monkeypatch):
    root, whole = folder("train/a/0.jpg"), os.read
    expected = (root / "train/a/0.jpg").read_bytes()
    monkeypatch.setattr(os, "read", lambda file, size: whole(file, min(size, 100)))
    assert ImageFolder(root, "train")[0].image == expected


def test_a_source_need_not_know_names_or_have_notes():
    class Bare:
        num_classes = 3

        def __len__(self):
            return 0

        def __getitem__(self, index):
            raise IndexError

    assert (class_names(Bare()), notes(Bare())) == (None, [])


def test_many_names_are_some_and_a_number():
    assert some(["a", "b"]) == "a, b"
    assert some(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert printable("caf\u00e9 犬\r\u202e") == "café 犬\\r\\u202e"


class TestDigits:
    def test_the_splits_are_apart_and_whole(self):
        train, val = Digits("train"), Digits("val")
        assert (len(train), len(val), train.num_classes) == (1000, 797, 10)
        assert train.classes == [*"0123456789"]
        names = {source[i].name for source in (train, val) for i in range(len(source))}
        assert len(names) == 1797

    def test_every_class_has_the_same_share_of_both(self):
        train, val = (
            np.bincount([source[i].label for i in range(len(source))])
            for source in map(Digits, ("train", "val"))
        )
        np.testing.assert_allclose(train / (train + val), 1000 / 1797, atol=0.01)

    def test_images_are_grey_and_use_the_whole_range(self):
        source = Digits("train")
        images = np.stack([source[i].image for i in range(100)])
        assert (images.shape, images.dtype) == ((100, 8, 8, 3), np.uint8)
        assert (images.min(), images.max()) == (0, 255)
        assert (images[..., :1] == images).all()

    def test_few_labels_are_the_first_of_each_class(self):
        every, few = Digits("train"), Digits("train", labels_per_class=5)
        assert len(few) == 50
        first = {label: [] for label in range(10)}
        for i in range(len(every)):
            first[every[i].label].append(every[i].name)
        assert {few[i].name for i in range(50)} == {name for names in first.values() for name in names[:5]}
        assert len(Digits("val", labels_per_class=5)) == 797

    def test_no_labels_are_an_error(self):
        with pytest.raises(ValueError, match="labels_per_class=0"):
            Digits("train", labels_per_class=0)


class TestOpenSource:
    def test_an_unknown_source_is_answered_with_the_known(self):
        with pytest.raises(
            ValueError, match="'coco'; there are imagefolder, images, webdataset, tfds, cifar10"
        ):
            open_source(ConfigDict({"source": "coco"}), "train")

    def test_an_unknown_split_is_answered_with_the_known(self):
        with pytest.raises(ValueError, match="'test'; there are train, val"):
            open_source(ConfigDict({"source": "digits"}), "test")
