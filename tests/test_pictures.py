"""The picture of what networks see: made of the pipeline's own images, whatever their classes are called."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tat_jax.configs import base
from tat_jax.data.pipeline import open_pipeline
from tat_jax.pictures import _caption, draw_images

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
