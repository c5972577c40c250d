"""The transform of segmentation: the published one, of an image and of its label by one box and one flip."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image, ImageFilter

from proofs.published_crops import flip_scale_crop_and_blur
from tat_jax.data.blur import gaussian_blur
from tat_jax.data.label_maps import IGNORED, nearest
from tat_jax.data.segments import segment
from tests.images import photograph


def options(size=48, **said) -> ConfigDict:
    return ConfigDict(
        {"image_size": size, "scale_range": (0.5, 2.0), "pad_label": "background", "blur": True, "flip": True}
        | said
    )


def pair(height=60, width=90, seed=0) -> tuple[np.ndarray, np.ndarray]:
    label = np.random.default_rng(seed).integers(0, 20, (height, width), np.uint8)
    label[:2, :3] = IGNORED
    return photograph(height, width, seed), label


class TestTraining:
    @pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 61), (50, 50), (17, 130), (200, 150)])
    @pytest.mark.parametrize("pad_label", ["background", "ignored"])
    def test_crops_are_those_of_the_published_transforms_on_whole_images(self, height, width, pad_label):
        image, label = pair(height, width)
        data = options(pad_label=pad_label)
        fill = {"background": 0, "ignored": IGNORED}[pad_label]
        for seed in range(20):
            ours, our_label = segment(image, label, np.random.default_rng(seed), data)
            theirs, their_label = flip_scale_crop_and_blur(
                Image.fromarray(image), Image.fromarray(label), np.random.default_rng(seed), 48, fill
            )
            np.testing.assert_array_equal(our_label, np.asarray(their_label))
            assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 2

    def test_what_is_missing_is_on_the_right_and_below_black_and_labelled_as_is_said(self):
        image, label = pair(60, 60)
        for pad_label, fill in (("background", 0), ("ignored", IGNORED)):
            data = options(scale_range=(0.5, 0.5), pad_label=pad_label, blur=False)
            crop, of_label = segment(image, np.maximum(label, 1), np.random.default_rng(0), data)
            outside = np.ones((48, 48), bool)
            outside[:24, :24] = False
            assert crop[outside].max() == 0
            assert (of_label[outside] == fill).all()
            assert (of_label[~outside] >= 1).all()

    def test_what_is_switched_off_changes_nothing_else(self):
        image, label = pair()
        for seed in range(8):
            sharp, blurred = (
                segment(image, label, np.random.default_rng(seed), options(blur=blur))
                for blur in (False, True)
            )
            np.testing.assert_array_equal(sharp[1], blurred[1])
            assert np.abs(sharp[0].astype(int) - blurred[0]).mean() < 20
            either, *ways = (
                segment(*of, np.random.default_rng(seed), options(flip=flip, blur=False))[1]
                for of, flip in (
                    ((image, label), True),
                    ((image, label), False),
                    ((image[:, ::-1], label[:, ::-1]), False),
                )
            )
            assert any(np.array_equal(either, way) for way in ways)

    def test_half_are_mirrored_and_shorter_sides_are_spread_over_the_range(self):
        columns = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
        image = np.repeat(columns[..., None], 3, -1)
        data, rng = options(size=20, pad_label="ignored", blur=False), np.random.default_rng(0)
        labels = [segment(image, columns, rng, data)[1] for _ in range(300)]
        mirrored = np.mean([label[0, 0] > label[0, 5] for label in labels])
        assert 0.42 < mirrored < 0.58
        sides = [int((label[0] != IGNORED).sum()) for label in labels]
        assert min(sides) == 10
        assert 0.23 < np.mean(np.array(sides) < 20) < 0.43  # published: a third is padded

    def test_a_line_of_pixels_is_refused(self):
        image, label = pair(1, 100_000)
        with pytest.raises(ValueError, match=r"^100000 × 1 pixels"):
            segment(image, label, np.random.default_rng(0), options(size=513))


class TestEvaluation:
    def test_the_image_is_squashed_as_pillow_does_and_the_label_stays_as_it_is(self):
        image, label = pair(60, 90)
        squashed, same = segment(image, label, None, options())
        expected = Image.fromarray(image).resize((48, 48), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(squashed, np.asarray(expected))
        np.testing.assert_array_equal(same, label)


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)], ids=["evaluation", "training"])
def test_a_label_of_another_size_is_refused(rng):
    image, label = pair(60, 90)
    with pytest.raises(ValueError, match=r"^the image is 90 × 60 pixels, its label 89 × 60$"):
        segment(image, label[:, :-1], rng, options())
    with pytest.raises(ValueError, match=r"^the image is 90 × 60 pixels, its label no map$"):
        segment(image, 3, rng, options())


@given(st.integers(1, 700), st.integers(1, 1500))
def test_nearest_pixels_are_pillows(size, new_size):
    row = Image.fromarray(np.arange(size, dtype=np.int32)[None])
    expected = row.resize((new_size, 1), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(nearest(size, new_size), np.asarray(expected)[0])


@pytest.mark.parametrize("radius", [0.0, 0.003, 0.11, 0.35, 0.6, 0.9, 0.9999])
@pytest.mark.parametrize("shape", [(1, 1), (2, 150), (230, 3), (97, 40)])
def test_the_blur_is_pillows(radius, shape):
    for image in (photograph(*shape), np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)):
        expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))
        difference = np.abs(gaussian_blur(image, radius).astype(int) - np.asarray(expected))
        assert difference.max() <= 1
        assert difference.mean() < 0.001
