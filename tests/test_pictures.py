"""The picture of what networks see: made of the pipeline's own images, whatever their classes are called."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tat_jax.configs import base
from tat_jax.data.label_maps import OUTSIDE
from tat_jax.data.pipeline import open_pipeline
from tat_jax.overlays import legend, names, overlay, palette
from tat_jax.pictures import _caption, draw_crops, draw_images

NAMES = ["ant", "\u72ac", "\U0001f41d", "line\nbreak", "\u0645\u0631\u062d\u0628\u0627", "x" * 200, "a\udce9"]


@pytest.mark.parametrize(("size", "side"), [(16, 96), (50, 100), (100, 100), (300, 224)])
def test_images_to_train_and_to_validate_lie_in_two_rows_each_as_networks_see_them(folder, size, side):
    root = folder(*(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in NAMES))
    config = base.base()
    config.data.update({"root": str(root), "image_size": size, "threads": 0})
    train, val = open_pipeline(config, "train"), open_pipeline(config, "val")
    draw_images(train, val, root / "images.png")
    with Image.open(root / "images.png") as opened:
        picture = np.asarray(opened)
    assert picture.shape == (2 * (18 + 2 * (side + 18)), 8 * (side + 6), 3)
    for block, data in enumerate((train, val)):
        top = block * len(picture) // 2 + 18
        for i, (image, _, _) in enumerate(data.look(16)):
            cell = picture[top : top + side, 3 + i * (side + 6) :][:, :side]
            expected = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))
            np.testing.assert_array_equal(cell, expected)
            caption = picture[top + side : top + side + 18, i * (side + 6) :][:, : side + 6]
            assert (caption < 128).any()


def test_a_class_that_has_no_name_is_shown_by_its_number_and_a_map_by_its_file():
    nameless, ants = SimpleNamespace(), SimpleNamespace(classes=["ant"])
    assert _caption(3, "a/b.jpg", nameless) == "3"
    assert _caption(3, "a/b.jpg", ants) == "3"
    assert _caption(0, "a/b.jpg", ants) == "ant"
    assert _caption(np.zeros((2, 2), np.uint8), "a/b.jpg", ants) == "b.jpg"


def scenes(split):
    config = base.base()
    config.task = "segmentation"
    config.data.update({"source": "digit_masks", "image_size": 65, "threads": 0})
    return open_pipeline(config, split)


def cell(picture, block, i, rows):
    """Return the image that is drawn in a block of so many rows of eight."""
    top = block * (18 + rows * (130 + 18)) + 18 + i // 8 * (130 + 18)
    return picture[top : top + 130, 3 + i % 8 * (130 + 6) :][:, :130]


def test_label_maps_lie_over_their_images_and_a_legend_says_what_colours_are(tmp_path):
    splits = {split: scenes(split) for split in ("train", "val")}
    draw_images(*splits.values(), tmp_path / "images.png")
    with Image.open(tmp_path / "images.png") as opened:
        picture = np.asarray(opened)
    colours, labels = palette(11), []
    for block, data in enumerate(splits.values()):
        for i, (image, label, _) in enumerate(data.look(16)):
            labels.append(label)
            if block:  # squashed like its image
                inside = label[: (label[:, 0] != OUTSIDE).sum(), : (label[0] != OUTSIDE).sum()]
                label = np.asarray(Image.fromarray(inside).resize((65, 65), Image.Resampling.NEAREST))
            expected = overlay(image, label, colours).repeat(2, 0).repeat(2, 1)
            np.testing.assert_array_equal(cell(picture, block, i, rows=2), expected)
    below = picture[2 * (18 + 2 * (130 + 18)) :]
    drawn = legend(names(labels, ["background", *"0123456789"]), colours, picture.shape[1])
    np.testing.assert_array_equal(below, drawn)


def test_crops_to_train_on_are_drawn_alone_and_with_their_label_maps(tmp_path):
    draw_crops(scenes("train"), tmp_path / "check.png")
    with Image.open(tmp_path / "check.png") as opened:
        picture = np.asarray(opened)
    for i, (image, label, _) in enumerate(scenes("train").look(8)):
        for block, expected in enumerate((image, overlay(image, label, palette(11)))):
            np.testing.assert_array_equal(cell(picture, block, i, rows=1), expected.repeat(2, 0).repeat(2, 1))
