"""Pixels: decoded as Pillow does or refused by name, cropped as torchvision does."""

import contextlib
import io
import resource
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tat_jax.data.transforms import (
    DecodeError,
    decode,
    eval_transform,
    random_resized_crop_box,
    train_transform,
)
from tests.images import encode, photograph
from tests.interpreter import run_python

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunks(header, b"IDAT")


def png_chunks(*chunks: bytes) -> bytes:
    return b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


class TestDecode:
    @pytest.mark.filterwarnings("ignore:Palette images with Transparency")
    @pytest.mark.parametrize(
        ("mode", "kind", "options"),
        [
            ("RGB", "JPEG", {}),
            ("RGB", "JPEG", {"progressive": True}),
            ("L", "JPEG", {}),
            ("CMYK", "JPEG", {}),
            ("1", "PNG", {}),
            ("L", "PNG", {}),
            ("LA", "PNG", {}),
            ("P", "PNG", {}),
            ("P", "PNG", {"transparency": bytes(range(256))}),
            ("RGBA", "PNG", {}),
            ("RGB", "WEBP", {"lossless": True}),
            ("RGB", "BMP", {}),
            ("RGB", "PPM", {}),
            ("RGB", "TIFF", {}),
        ],
    )
    def test_every_mode_becomes_what_pillow_makes_of_it(self, mode, kind, options):
        data = encode(Image.fromarray(photograph()).convert(mode), kind, **options)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        got = decode(data, "photo.JPEG")
        assert got.dtype == np.uint8
        assert got.shape == (40, 60, 3)
        np.testing.assert_array_equal(got, expected)

    def test_pixels_may_lie_in_the_callers_memory_if_they_fit(self):
        data = encode(photograph())
        whole, short = np.empty(40 * 60 * 3 + 5, np.uint8), np.empty(40 * 60 * 3 - 1, np.uint8)
        kept, new = decode(data, "a", whole), decode(data, "a", short)
        assert np.shares_memory(kept, whole)
        assert not np.shares_memory(new, short)
        for pixels in (kept, new):
            np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data))))

    def test_cmyk_inks_are_not_inverted(self):
        red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        assert np.abs(decode(encode(red), "red.JPEG").astype(int) - [255, 0, 0]).max() < 8

    def test_the_exif_orientation_is_not_applied(self):
        image = Image.fromarray(photograph(40, 60))
        exif = Image.Exif()
        exif[0x0112] = 6
        np.testing.assert_array_equal(decode(encode(image, exif=exif), "a"), decode(encode(image), "b"))

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "the file is empty"),
            (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", r"not an image; .*<!DOCTYPE"),
            (b"\0" * 5000, "not an image"),
            (encode(photograph())[100:], "not an image"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "not an image"),
            (encode(photograph())[:20], "not an image"),
        ],
        ids=["empty", "html", "zeros", "headless", "postscript", "header"],
    )
    def test_what_is_no_image_is_named(self, data, reason):
        with pytest.raises(DecodeError, match=rf"^/data/n01440764/broken\.JPEG: {reason}.*$"):
            decode(data, "/data/n01440764/broken.JPEG")

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"kind": "PNG"}], ids=str)
    @settings(deadline=None)
    @given(kept=st.floats(0, 1))
    def test_a_truncated_file_is_an_error_and_never_half_an_image(self, options, kept):
        data = encode(photograph(), **options)
        try:
            image = decode(data[: int(kept * len(data))], "cut.JPEG")
        except DecodeError:
            return
        np.testing.assert_array_equal(image, decode(data, "whole.JPEG"))

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF"])
    @settings(deadline=None)
    @given(st.data())
    def test_whatever_is_wrong_with_a_file_the_error_is_ours(self, kind, data):
        bytes_ = bytearray(encode(photograph(12, 12), kind))
        for place in data.draw(st.lists(st.integers(0, len(bytes_) - 1), min_size=1, max_size=8)):
            bytes_[place] = data.draw(st.integers(0, 255))
        with contextlib.suppress(DecodeError):
            assert decode(bytes(bytes_), "x").dtype == np.uint8

    # Pillow itself only warns of the second.
    @pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (10_000, 10_000)])
    def test_a_decompression_bomb_is_refused_before_it_takes_memory(self, width, height):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DecodeError, match=r"bomb\.png: .*pixels"):
            decode(png_header(width, height), "bomb.png")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB

    def test_pillows_warnings_do_not_reach_the_user(self):
        done = run_python(
            """
            import io
            from PIL import Image
            from tat_jax.data.transforms import DecodeError, decode
            from tests.images import encode
            from tests.test_transforms import png_header
            palette = Image.new("P", (8, 8))
            assert decode(encode(palette, "PNG", transparency=bytes(range(256))), "a").shape == (8, 8, 3)
            try:
                decode(png_header(10_000, 10_000), "bomb")
            except DecodeError as error:
                print(error)
            """
        )
        assert done.stdout.strip() == "bomb: 100,000,000 pixels, more than the 89,478,485 allowed"
        assert done.stderr == ""


def tiff(levels: np.ndarray, *, bits=None, white_is_zero=False) -> bytes:
    """Write grey levels as they are, in a TIFF of one strip and their byte order."""
    kind = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    order = ">" if levels.dtype.byteorder == ">" else "<"
    data = levels.tobytes()
    if bits == 12:  # two pixels in three bytes
        data = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in levels.reshape(-1, 2))
    fields = {256: levels.shape[1], 257: levels.shape[0], 258: bits or 8 * levels.itemsize, 259: 1}
    fields |= {262: int(not white_is_zero), 273: 8, 277: 1, 278: levels.shape[0], 279: len(data), 339: kind}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    return head + data + struct.pack(f"{order}H", len(fields)) + entries + bytes(4)


RAMP = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)


class TestGrey:
    @pytest.mark.parametrize(
        "data",
        [
            encode(RAMP, "PNG"),
            encode(RAMP, "PPM"),
            tiff(RAMP),
            tiff(RAMP.astype(">u2")),
            tiff((RAMP.astype(int) - 32768).astype(np.int16)),
            tiff((RAMP.astype(int) - 32768).astype(">i2")),
            tiff(65535 - RAMP, white_is_zero=True),
            tiff(RAMP // 16, bits=12),
            b"P5 60 40 4095\n" + (RAMP // 16).astype(">u2").tobytes(),
            encode(RAMP, "TIFF", compression="tiff_lzw"),
        ],
        ids=[
            *("PNG", "PGM", "II", "MM", "II signed", "MM signed", "white is zero", "12 bits"),
            *("PGM of 12 bits", "compressed"),
        ],
    )
    def test_of_16_bits_spreads_from_the_least_to_the_greatest_of_its_type(self, data):
        seen = decode(data, "xray")
        assert (seen.shape, seen.dtype) == ((40, 60, 3), np.uint8)
        assert (seen == seen[..., :1]).all()
        assert np.abs(seen[..., 0] - RAMP / 257).max() <= 0.6  # half a level, and a sixteenth for 12 bits
        assert len(np.unique(seen)) == 256

    @pytest.mark.parametrize(
        ("levels", "black", "white"),
        [
            (RAMP, 1000, 5095),
            (RAMP.astype(np.uint32) + 2**31, 2**31, 2**31 + 65535),
            (RAMP.astype(np.int32) - 65535, -65535, 0),
            (RAMP.astype(np.float32) / 65535, 0.25, 0.5),
        ],
        ids=["16 bits", "32 bits", "32 bits signed", "floats"],
    )
    def test_of_any_kind_is_black_and_white_where_it_is_said(self, levels, black, white):
        seen = decode(tiff(levels), "xray", grey_range=(black, white))
        expected = np.clip((levels.astype(float) - black) / (white - black), 0, 1) * 255
        assert np.abs(seen[..., 0] - expected).max() <= 0.501

    @pytest.mark.parametrize("said", [{}, {"grey_range": (0, 4095)}], ids=["unsaid", "said"])
    @pytest.mark.parametrize("kind", ["P2", "P5"])
    def test_a_pgm_has_the_levels_that_are_written_in_it(self, kind, said):
        levels = RAMP // 16
        data = levels.astype(">u2").tobytes() if kind == "P5" else b" ".join(b"%d" % n for n in levels.flat)
        seen = decode(b"%s 60 40 4095\n%s" % (kind.encode(), data), "xray", **said)
        assert np.abs(seen[..., 0] - levels * (255 / 4095)).max() <= 0.501

    def test_of_8_bits_with_a_sign_begins_at_the_least(self):
        levels = (RAMP // 256).astype(int) - 128
        np.testing.assert_array_equal(decode(tiff(levels.astype(np.int8)), "a")[..., 0], levels + 128)

    @pytest.mark.parametrize(
        ("levels", "kind"),
        [
            (RAMP.astype(np.float32), "floats"),
            (RAMP.astype(np.int32), "whole numbers of 32 bits"),
            (RAMP.astype(np.uint32), "whole numbers of 32 bits"),
        ],
        ids=["floats", "signed", "unsigned"],
    )
    def test_whose_type_says_nothing_of_its_levels_is_refused(self, levels, kind):
        message = rf'^a/b\.tif: its grey levels are {kind}; say which .*data\.grey_range="\(0, 1\)"$'
        with pytest.raises(DecodeError, match=message):
            decode(tiff(levels), "a/b.tif")

    def test_that_is_no_number_is_refused(self):
        levels = RAMP.astype(np.float32)
        levels[3, 5] = np.nan
        with pytest.raises(DecodeError, match=r"^a: some of its grey levels are no numbers$"):
            decode(tiff(levels), "a", grey_range=(0, 1))

    @pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGB"])
    def test_of_8_bits_and_colours_stay_as_they_are_whatever_the_range(self, mode):
        data = encode(Image.fromarray(photograph()).convert(mode), "PNG")
        np.testing.assert_array_equal(decode(data, "a", grey_range=(100, 4095)), decode(data, "a"))

    @pytest.mark.parametrize("kind", [2, 4, 6], ids=["colour", "grey with alpha", "colour with alpha"])
    def test_of_16_bits_in_several_channels_keeps_the_high_byte(self, kind):
        channels = {2: 3, 4: 2, 6: 4}[kind]
        pixels = np.random.default_rng(0).integers(0, 65536, (4, 6, channels)).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        header = b"IHDR" + struct.pack(">IIBBBBB", 6, 4, 16, kind, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + png_chunks(header, b"IDAT" + zlib.compress(rows), b"IEND")
        high = (pixels[..., : 1 if kind == 4 else 3] >> 8).astype(np.uint8)
        np.testing.assert_array_equal(decode(data, "a"), np.broadcast_to(high, (4, 6, 3)))


class TestOrientation:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(10))
    def test_is_undone_exactly_as_pillow_undoes_it_and_only_if_asked_for(self, kind, orientation):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(Image.fromarray(photograph(8, 12)), kind, exif=exif, **options)
        with Image.open(io.BytesIO(data)) as opened:
            upright = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        with Image.open(io.BytesIO(data)) as opened:
            as_it_is = np.asarray(opened.convert("RGB"))
        memory = np.empty(3 * 8 * 12, np.uint8)
        np.testing.assert_array_equal(decode(data, "a", memory, exif_orientation=True), upright)
        np.testing.assert_array_equal(decode(data, "a", memory), as_it_is)

    def test_may_be_said_in_xmp_as_pillow_reads_it(self):
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
        data = encode(Image.fromarray(photograph(8, 12)), xmp=xmp)
        with Image.open(io.BytesIO(data)) as opened:
            upright = np.asarray(ImageOps.exif_transpose(opened))
        assert upright.shape == (12, 8, 3)
        np.testing.assert_array_equal(decode(data, "a", exif_orientation=True), upright)

    def test_of_a_file_that_says_none_is_upright(self):
        data = encode(photograph())
        np.testing.assert_array_equal(decode(data, "a", exif_orientation=True), decode(data, "a"))


class TestRandomResizedCrop:
    @given(
        height=st.integers(1, 600),
        width=st.integers(1, 600),
        seed=st.integers(0, 2**32),
        low=st.floats(0.01, 1),
    )
    def test_a_crop_lies_in_the_image_and_in_the_ranges(self, height, width, seed, low):
        rng = np.random.default_rng(seed)
        top, left, crop_height, crop_width = random_resized_crop_box(height, width, rng, (low, 1.0), RATIO)
        assert 0 <= top <= top + crop_height <= height
        assert 0 <= left <= left + crop_width <= width
        assert crop_height > 0
        assert crop_width > 0
        # Each side is rounded by up to half a pixel.
        assert (crop_width - 0.5) / (crop_height + 0.5) <= RATIO[1] + 1e-9
        assert (crop_width + 0.5) / (crop_height - 0.5) >= RATIO[0] - 1e-9

    @pytest.mark.parametrize(
        ("height", "width", "box"),
        [
            (10, 1000, (0, 493, 10, 13)),
            (1000, 10, (493, 0, 13, 10)),
            (1, 1000, (0, 499, 1, 1)),
            (100, 110, (0, 0, 100, 110)),
        ],
    )
    def test_what_never_fits_becomes_the_central_crop(self, height, width, box):
        # Four times the area of the image fits nowhere.
        rng = np.random.default_rng(0)
        assert random_resized_crop_box(height, width, rng, (4.0, 4.0), RATIO) == box

    def test_the_whole_area_of_a_square_is_the_square(self):
        assert random_resized_crop_box(64, 64, np.random.default_rng(0), (1.0, 1.0), (1.0, 1.0)) == (
            0,
            0,
            64,
            64,
        )


class TestTransforms:
    @given(seed=st.integers(0, 2**32))
    def test_training_crops_first_and_then_resizes_with_antialias(self, seed):
        image = photograph()
        got = train_transform(
            image, np.random.default_rng(seed), size=16, scale=SCALE, ratio=RATIO, flip=False
        )
        top, left, height, width = random_resized_crop_box(40, 60, np.random.default_rng(seed), SCALE, RATIO)
        crop = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = np.asarray(crop.resize((16, 16), Image.Resampling.BILINEAR))
        # Another implementation of the filter, in fixed point of fewer bits.
        difference = np.abs(got.astype(int) - expected)
        assert difference.max() <= 2
        assert difference.mean() < 0.5

    def test_half_of_the_images_are_mirrored(self):
        image = photograph(16, 16)
        rng = np.random.default_rng(0)
        mirrored = 0
        for _ in range(400):
            got = train_transform(image, rng, size=16, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=True)
            is_mirrored = np.array_equal(got, image[:, ::-1])
            assert is_mirrored or np.array_equal(got, image)
            mirrored += is_mirrored
        assert 160 < mirrored < 240

    @pytest.mark.parametrize(
        ("height", "width", "top", "left"),
        # Halves are rounded to the even neighbour: 58.5 to 58, 59.5 to 60.
        [(256, 341, 16, 58), (256, 343, 16, 60), (341, 256, 58, 16), (256, 256, 16, 16)],
    )
    def test_evaluation_takes_the_centre(self, height, width, top, left):
        image = photograph(height, width)
        expected = image[top : top + 224, left : left + 224]
        np.testing.assert_array_equal(eval_transform(image, resize=256, size=224), expected)

    def test_evaluation_resizes_the_shorter_side_and_cuts_off_the_fraction_of_the_longer(self):
        image = photograph(300, 500)
        resized = np.asarray(Image.fromarray(image).resize((426, 256), Image.Resampling.BILINEAR))
        got = eval_transform(image, resize=256, size=224)
        difference = np.abs(got.astype(int) - resized[16:240, 101:325])
        # The centre's own coordinates differ from the whole's by rounding, which halves of a level can show.
        assert difference.max() <= 1
        assert difference.mean() < 0.01

    @given(height=st.integers(1, 80), width=st.integers(1, 80), margin=st.integers(0, 9))
    def test_evaluation_gives_its_size_for_every_image(self, height, width, margin):
        image = np.zeros((height, width, 3), np.uint8)
        assert eval_transform(image, resize=20 + margin, size=20).shape == (20, 20, 3)

    def test_a_centre_larger_than_the_image_is_an_error(self):
        with pytest.raises(ValueError, match=r"224 pixels .* 200$"):
            eval_transform(photograph(), resize=200, size=224)
