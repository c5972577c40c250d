"""Sources: examples in an order that never changes, and what is missing named."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from tat_jax.data.sources import Digits, ImageFolder, imagenet_classes, open_source


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

    def test_the_1000_ids_are_sorted_and_distinct(self):
        assert len(imagenet_classes()) == 1000
        assert imagenet_classes() == sorted(set(imagenet_classes()))

    def test_validation_has_the_labels_of_training_even_if_it_lacks_classes(self, folder):
        root = folder("train/ant/1.jpg", "train/bee/1.jpg", "train/cat/1.jpg", "val/cat/1.jpg")
        val = ImageFolder(root, "val")
        assert (val.num_classes, val[0].label) == (3, 2)

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

    def test_symbolic_links_to_splits_classes_and_folders_within_work(self, folder):
        root = folder("elsewhere/ant/1.jpg", "elsewhere/more/2.jpg", "train/bee/1.jpg")
        (root / "train/ant").symlink_to(root / "elsewhere/ant")
        (root / "train/bee/more").symlink_to(root / "elsewhere/more")
        (root / "val").symlink_to(root / "train")
        source = ImageFolder(root, "val")
        assert [source[i].label for i in range(len(source))] == [0, 1, 1]

    def test_hidden_files_and_folders_are_passed_over(self, folder):
        root = folder("train/ant/1.jpg", "train/ant/._1.jpg", "train/.ipynb_checkpoints/1.jpg")
        assert (len(ImageFolder(root, "train")), ImageFolder(root, "train").num_classes) == (1, 1)

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
                r"no images in .*/train/b \(\.jpg ",
            ),
        ],
        ids=["no val", "no train", "val alone", "flat", "empty class"],
    )
    def test_what_is_missing_is_named(self, folder, paths, split, error, message):
        root = folder(*paths)
        with pytest.raises(error, match=message) as caught:
            ImageFolder(root, split)
        assert "\n" not in str(caught.value)

    def test_a_missing_root_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no folder .*/nowhere; images belong"):
            ImageFolder(tmp_path / "nowhere", "train")


class TestDigits:
    def test_the_splits_are_apart_and_whole(self):
        train, val = Digits("train"), Digits("val")
        assert (len(train), len(val), train.num_classes) == (1000, 797, 10)
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
        with pytest.raises(ValueError, match="'webdataset'; there are imagefolder, tfds, digits"):
            open_source(ConfigDict({"source": "webdataset"}), "train")

    def test_an_unknown_split_is_answered_with_the_known(self):
        with pytest.raises(ValueError, match="'test'; there are train, val"):
            open_source(ConfigDict({"source": "digits"}), "test")
