"""Images that are broken or ask for much, as bytes by name."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from proofs.torture.packing import Files


def kinds(photo: bytes) -> Files:
    """Return a photograph in the formats that are read, small, so that much can be tried."""
    small = Image.open(io.BytesIO(photo)).convert("RGB").resize((96, 64))
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, 6, 0)
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "JPEG", {"restart_marker_rows": 1, "exif": exif}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("P", "PNG", {"transparency": bytes(range(256))}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("RGB", "TIFF", {"compression": "jpeg"}),
        ("1", "TIFF", {"compression": "group4"}),
        ("RGB", "TIFF", {}),
        ("RGB", "WEBP", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("P", "GIF", {}),
        ("P", "BMP", {}),
        ("RGB", "PPM", {}),
    ]
    files = {"tile.tiff": tiff(16, 16, 64, deflated(64 * 32))}
    for i, (mode, kind, options) in enumerate(wanted):
        file = io.BytesIO()
        small.convert(mode).save(file, kind, **options)
        files[f"{i}.{kind.lower()}"] = file.getvalue()
    return files


def broken_images(photos: Sequence[bytes]) -> dict[str, Files]:
    """Return broken files by what is wrong with them; every one of them must be reported."""
    photo = photos[0]
    cut = {
        f"{i}-{percent}.JPEG": image[: len(image) * percent // 100]
        for i, image in enumerate(photos)
        for percent in range(100)
    }
    cut |= {
        f"{percent}-{key}": image[: len(image) * percent // 100]
        for key, image in kinds(photo).items()
        if not key.endswith(("gif", "tiff", "bmp", "ppm"))  # GIF images are not reported when cut short
        for percent in range(0, 100, 10)
    }
    start = photo.index(b"\xff\xd8")
    return {
        "images cut at every 1 %": cut,
        "files that are no images": {
            "empty.JPEG": b"",
            "zeros.JPEG": bytes(len(photo)),
            "page.JPEG": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
            "headless.JPEG": photo[start + 2 :],
            "noise.JPEG": np.random.default_rng(0).bytes(len(photo)),
            "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
        },
        "image bombs": {
            "wide.JPEG": jpeg_of_scans(30_000, 1),
            "claims.JPEG": _claims_size(photo, 30_000),
            "scans.JPEG": jpeg_of_scans(9_000, 5_000),
            "header.png": _png(30_000, 30_000, b""),
            "zeros.png": _png(30_000, 30_000, deflated(900_000_000 // 8)),
            "text.png": _png(8, 8, bytes(10), _chunk(b"zTXt", b"a\0\0" + deflated(300_000_000))),
            "profile.png": _png(8, 8, bytes(10), _chunk(b"iCCP", b"a\0\0" + deflated(300_000_000))),
            "canvas.webp": _webp(16_383, 16_383),
            "canvas.tiff": tiff(30_000, 30_000, 0, b""),
            "tile.tiff": tiff(16, 16, 40_000, deflated(200_000_000)),
            "bytes.tiff": tiff(16, 16, 3_400_000, bytes(1000)).replace(
                struct.pack("<HHII", 322, 4, 1, 3_400_000), struct.pack("<HHII", 322, 7, 1000, 8)
            ),
            "screen.bmp": _bmp(9_000, 90_000),
            "screen.ppm": b"P6 65535 65535 255\n" + bytes(100),
            "screen.webp": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\1\0\0",
        },
    }


def largest_images() -> Files:
    """Return images of few bytes with as many pixels as are allowed."""
    side = 9_450
    return {
        "scans.JPEG": jpeg_of_scans(side, 100),
        "bits.png": _png(side, side, deflated(side * (side + 14) // 8)),
        "line.png": _png(side**2, 1, deflated(side**2 // 8 + 2)),
        "whole.tiff": tiff(side, side, 0, deflated(side * side)),
    }


def flipped(photos: Sequence[bytes], count: int) -> Files:
    """Return photographs with random bytes changed; some of them remain images."""
    rng = np.random.default_rng(0)
    files = {}
    for i in range(count):
        image = bytearray(photos[i % len(photos)])
        for place in rng.integers(len(image), size=1 << int(rng.integers(10))):
            image[place] = int(rng.integers(256))
        files[f"{i}.JPEG"] = bytes(image)
    return files


def deflated(zeros: int) -> bytes:
    """Return so many zeros as zlib packs them."""
    packer = zlib.compressobj(9)
    whole, rest = divmod(zeros, 1 << 20)
    return b"".join(packer.compress(bytes(n)) for n in [1 << 20] * whole + [rest]) + packer.flush()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, data: bytes, extra: bytes = b"") -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _claims_size(photo: bytes, side: int) -> bytes:
    place = photo.index(b"\xff\xc0") + 5
    return photo[:place] + struct.pack(">HH", side, side) + photo[place + 4 :]


def jpeg_of_scans(side: int, scans: int) -> bytes:
    """Return a progressive JPEG of zeros, of a hundred bytes a scan, each a pass over all its pixels."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    blocks = ((side + 7) // 8) ** 2
    run = "0" + "1" * 14  # the one code, for runs of up to 32,767 blocks
    bits = run * (blocks // 32_767 + 1)
    bits += "1" * (-len(bits) % 8)
    data = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    return b"".join(
        [
            b"\xff\xd8",
            segment(0xDB, b"\0" + b"\1" * 64),
            segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"),
            segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0"),
            segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0"),
            segment(0xDA, b"\1\1\0\0\0\0") + bytes(blocks // 8 + 1),
            (segment(0xDA, b"\1\1\0\1\x3f\0") + data) * (scans - 1),
            b"\xff\xd9",
        ]
    )


def _webp(width: int, height: int) -> bytes:
    picture = b"\x2f" + struct.pack("<I", (width - 1) | ((height - 1) << 14)) + bytes(101)
    chunks = b"WEBPVP8L" + struct.pack("<I", len(picture)) + picture
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def tiff(width: int, height: int, tile: int, data: bytes) -> bytes:
    """Return a grey, deflated TIFF; with `tile`, of one tile of that width and half that height."""
    count = 10 if tile else 9
    begin = 8 + 2 + 12 * count + 4
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    if tile:
        tags += [(322, 4, tile), (323, 4, tile // 2), (324, 4, begin), (325, 4, len(data))]
    else:
        tags += [(273, 4, begin), (278, 4, height), (279, 4, len(data))]
    entries = [struct.pack("<HHII", tag, kind, 1, x) for tag, kind, x in sorted(tags)]
    assert len(entries) == count
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(entries) + bytes(4) + data


def _bmp(width: int, height: int) -> bytes:
    rle = b"\0\2\xff\xff" * 20 + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rle), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(rle), 0, 0, 1078) + header + bytes(1024) + rle
