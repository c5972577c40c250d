"""Label maps as pictures: the colours of VOC or of the data, over the image, and what they mean."""

import subprocess
import sys

import numpy as np
import pytest

from tat_jax.data.label_maps import IGNORED, OUTSIDE
from tat_jax.overlays import colourise, legend, names, overlay, palette

VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)]
VOC += [(128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128)]
VOC += [(64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128)]


def test_colours_are_those_of_the_data_or_voc_s_and_no_two_of_254_classes_are_alike():
    assert list(map(tuple, palette(21)[:21].tolist())) == VOC
    assert len(np.unique(palette(254)[:254], axis=0)) == 254
    own = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    np.testing.assert_array_equal(palette(2, own)[:2], own)
    with pytest.raises(ValueError, match="2 colours for 3 classes"):
        palette(3, own)


def test_ignored_and_outside_look_like_no_class_and_not_like_each_other():
    colours = palette(21)
    maps = (np.full((16, 16), value, np.uint8) for value in (IGNORED, OUTSIDE))
    ignored, outside = (colourise(label, colours) for label in maps)
    assert (ignored == 255).all()
    assert len(np.unique(outside.reshape(-1, 3), axis=0)) == 2  # hatched
    shades = {tuple(colour) for picture in (ignored, outside) for colour in picture.reshape(-1, 3).tolist()}
    assert len(shades) == 3
    assert not shades & set(map(tuple, colours[:254].tolist()))


def test_an_overlay_mixes_image_and_colours_by_its_opacity_but_for_what_is_outside():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    label = rng.integers(0, 21, (5, 7)).astype(np.uint8)
    label[0, :3] = IGNORED, OUTSIDE, OUTSIDE
    colours = palette(21)
    for opacity in (0.0, 0.3, 1.0):
        mixed = overlay(image, label, colours, opacity)
        expected = np.rint((1 - opacity) * image.astype(float) + opacity * colours[label])
        inside = label != OUTSIDE
        np.testing.assert_allclose(mixed[inside], expected[inside], atol=1 if 0 < opacity < 1 else 0)
        np.testing.assert_array_equal(mixed[~inside], colourise(label, colours)[~inside])


def test_an_image_and_a_label_of_two_sizes_are_refused(unchecked):
    image, label = np.zeros((5, 7, 3), np.uint8), np.zeros((4, 7), np.uint8)
    with pytest.raises(ValueError, match="not of one size: 5 × 7 and 4 × 7"):
        overlay(image, label, palette(21))


def test_a_legend_names_what_occurs_in_its_colour_whatever_the_names_are():
    maps = [np.array([[0, 2, OUTSIDE]], np.uint8), np.array([[2, 5], [IGNORED, 0]], np.uint8)]
    found = names(maps, ["sky", "x", "line\nbreak\udce9"])
    assert found == {0: "sky", 2: "line\nbreak\udce9", 5: "5", IGNORED: "ignored"}
    assert names(maps[:1], None) == {0: "0", 2: "2"}
    colours = palette(254)
    for width in (20, 100, 400):
        drawn = legend(found, colours, width)
        assert drawn.shape[1] == width
        shown = {tuple(colour) for colour in drawn.reshape(-1, 3).tolist()}
        assert {tuple(colours[value].tolist()) for value in found} <= shown
    assert len(legend(found, colours, 400)) < len(legend(found, colours, 100))
    assert legend({}, colours, 50).shape[1] == 50
    every = legend({value: f"class {value}" for value in range(254)}, colours, 700)
    assert len(np.unique(every.reshape(-1, 3), axis=0)) >= 254


def test_overlays_need_no_jax():
    code = "import sys, tat_jax.overlays; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
