"""Files that attack, files that are broken, and what mutation makes of good ones, as bytes by name."""

import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Files = dict[str, bytes]


def name(module: str, attribute: str) -> bytes:
    """Return the operations that push a global."""
    return f"c{module}\n{attribute}\n".encode()


def value(x: int | str | tuple[int, ...]) -> bytes:
    """Return the operations that push a number, a text or a tuple of numbers."""
    if isinstance(x, int):
        encoded = pickle.encode_long(x)
        return b"\x8a" + bytes([len(encoded)]) + encoded
    if isinstance(x, str):
        return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
    return b"(" + b"".join(map(value, x)) + b"t"


def storage(key: str = "0", size: int = 4, kind: bytes = name("torch", "FloatStorage")) -> bytes:
    """Return the operations that refer to a storage."""
    return b"(" + value("storage") + kind + value(key) + value("cpu") + value(size) + b"tQ"


def tensor(
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
    offset: int = 0,
    of: bytes = storage(),
) -> bytes:
    """Return the operations that push a tensor."""
    arguments = of + value(offset) + value(shape) + value(strides) + b"\x89" + b"}"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def pickled(entries: Mapping[str, bytes]) -> bytes:
    """Return the pickle of a dictionary whose values are given as operations."""
    return b"\x80\x02}(" + b"".join(value(key) + ops for key, ops in entries.items()) + b"u."


def zipped(root: bytes, storages: Mapping[str, bytes] | None = None, **options: Any) -> bytes:
    """Return a `.pth` file in its zip form."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", root)
        for key, data in ({"0": bytes(16)} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def legacy(root: bytes, sizes: Mapping[str, int] | None = None, keys: bytes | None = None) -> bytes:
    """Return a `.pth` file in the form before PyTorch 1.6, its storages of float32 zeros.

    Args:
        root: the pickle of the tensors.
        sizes: of the storages, as claimed; no more than four elements are there.
        keys: instead of the pickle of their names.
    """
    sizes = {"0": 4} if sizes is None else sizes
    heads = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    keys = keys or pickle.dumps(list(sizes), 2)
    tail = b"".join(struct.pack("<Q", size) + bytes(4 * min(size, 4)) for size in sizes.values())
    return b"".join(pickle.dumps(head, 2) for head in heads) + root + keys + tail


def safetensors_file(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    """Return a `.safetensors` file with this header (text or JSON), which may claim another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def gadgets(canary: Path) -> dict[str, bytes]:
    """Return operations that touch `canary` where an unpickler lets them, or change what it works with."""
    command = value(f"touch {canary}")
    code = value(f"open({str(canary)!r}, 'w').close()")
    system, rebuild = name("posix", "system"), name("torch._utils", "_rebuild_tensor_v2")
    ordered = name("collections", "OrderedDict")
    call = {
        "os": system,
        "builtins eval": name("builtins", "eval"),
        "__builtin__ exec": name("__builtin__", "exec"),
        "numpy": name("numpy.testing._private.utils", "runstring"),
        "torch._inductor": name("torch._inductor.codecache", "compile_file"),
        "torch.storage": name("torch.storage", "_load_from_bytes"),
        "runpy": name("runpy", "_run_code"),
    }
    found = {
        f"REDUCE of {key}": ops + (code if "os" not in key else command) + b"\x85R"
        for key, ops in call.items()
    }
    return found | {
        "INST": b"(" + command + b"iposix\nsystem\n",
        "OBJ": b"(" + system + command + b"o",
        "STACK_GLOBAL": value("posix") + value("system") + b"\x93" + command + b"\x85R",
        "NEWOBJ": name("subprocess", "Popen") + b"(" + command + b"t\x81",
        "NEWOBJ_EX": name("subprocess", "Popen") + b"(" + command + b"t" + b"}" + b"\x92",
        "an attribute of what is allowed": value("collections")
        + value("OrderedDict.__init__.__globals__")
        + b"\x93",
        "the globals of our function": value("torch._utils")
        + value("_rebuild_tensor_v2.__globals__")
        + b"\x93",
        "getattr": name("builtins", "getattr") + b"(" + ordered + value("__init__") + b"tR",
        "BUILD of __setstate__": ordered + b")R}" + value("__setstate__") + system + b"sb" + command + b"b",
        "BUILD of our function's defaults": rebuild + b"N}" + value("__defaults__") + b"K\x01\x85s\x86b",
        "BUILD of a type": name("torch", "FloatStorage")
        + b"(K\x03X\x01\0\0\0>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb",
        "BUILD of a storage": tensor(
            of=storage() + b"}" + value("size") + value(1 << 60) + b"sb", shape=(1 << 50,)
        ),
        "copyreg": name("copyreg", "_reconstructor") + b"(" + name("subprocess", "Popen") + ordered + b"NtR",
        "copyreg's extensions": name("copyreg", "add_extension")
        + b"("
        + value("posix")
        + value("system")
        + b"K\x01tR0"
        b"\x82\x01" + command + b"\x85R",
        "a persistent id in text": b"Pposix.system\n",
        "a persistent id of a module": b"(" + value("module") + system + command + command + value(4) + b"tQ",
        "a persistent id of a function": storage(kind=rebuild),
        "a call of a storage": storage() + command + b"\x85R",
    }


def bombs() -> dict[str, Files]:
    """Return files of little content that ask for much memory or time, by what they do."""
    four = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    nested = b")" + b"\x85" * 900_000
    doubled = b")" + b"".join(b"q\0h\0h\0\x86" for _ in range(40))
    lists = b"]" + b"q\0h\0h\0\x86" * 40
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    pickles = {
        "memo": b"Nr\xff\xff\xff\x7f",
        "hash": b"}" + doubled + b"K\x01s",
        "repr": lists + b"Q",
        "names": b"}" + lists + b"K\x01s",
        "global": doubled + value("system") + b"\x93",
        "arguments": b"("
        + storage()
        + b"K\x01))"
        + b"N" * 400_000
        + b"tq\1"
        + rebuild
        + b"q\2"
        + b"h\2h\1R" * 100_000,
        "dup": b"N" + b"2" * 2_000_000 + b"t",
        "marks": b"(" * 3_000_000,
        "dicts": b"}" * 3_000_000,
        "nested": nested,
        "long": b"\x8b\xff\xff\xff\x7f" + b"\1",
        "unicode": b"X\xff\xff\xff\xff",
        "unicode8": b"\x8d" + struct.pack("<Q", 1 << 62),
        "bytes8": b"\x8e" + struct.pack("<Q", 1 << 40),
        "bytearray8": b"\x96" + struct.pack("<Q", 1 << 40),
        "frame": b"\x95" + struct.pack("<Q", 1 << 62),
        "decimal": b"I" + b"9" * 2_000_000 + b"\n",
        "unfinished": b"}" + value("a") + b"(",
        "pops": b"0" * 100,
        "shape": tensor(shape=(1 << 2000,) * 30, strides=(0,) * 30),
        "dimensions": tensor(shape=(1,) * 400_000, strides=(1,) * 400_000),
        "strides": tensor(shape=(1 << 40,), strides=(0,)),
        "overflow": tensor(shape=(0, 1 << 62, 1 << 62), strides=(1 << 62, 1 << 62, 1)),
        "offset": tensor(offset=1 << 70),
        "negative": tensor(strides=(-1,), offset=3),
    }
    found: dict[str, Files] = {"pickles that grow": {}}
    for key, ops in pickles.items():
        root = pickled({"conv1.weight": ops})
        found["pickles that grow"] |= {f"{key}.pth": zipped(root), f"{key}-legacy.pth": legacy(root)}
    whole = pickled({"conv1.weight": tensor()})
    found["pickles that grow"]["keys.pth"] = legacy(whole, keys=b"\x80\x02](" + doubled + b"e.")
    giant = pickled({"conv1.weight": tensor(shape=(1 << 60,), of=storage(size=1 << 60))})
    shared = b"q\1"
    views = {"first": tensor((1 << 20,), of=storage(size=1 << 20)) + shared}
    views |= {f"layer{i}.weight": b"h\1" for i in range(20_000)}
    found["tensors larger than their file"] = {
        "claimed.pth": zipped(giant),
        "claimed-legacy.pth": legacy(giant, {"0": 1 << 60}),
        "shared.pth": zipped(pickled(views), {"0": bytes(4 << 20)}),
        "empty.pth": zipped(
            pickled(
                {
                    "conv1.weight": tensor((10**12, 3, 7, 0), (0, 0, 0, 0)),
                    "fc.weight": tensor((10**12, 0), (1, 1)),
                }
            )
        ),
        "empty.safetensors": safetensors_file(
            {
                key: {**four, "shape": [1 << 40, 0], "data_offsets": [0, 0]}
                for key in ("conv1.weight", "fc.weight")
            },
            b"",
        ),
        "wide.safetensors": safetensors_file(
            {
                "conv1.weight": {"dtype": "F32", "shape": [10**6, 1, 1, 1], "data_offsets": [0, 4 * 10**6]},
                "fc.weight": {"dtype": "F32", "shape": [4, 1], "data_offsets": [4 * 10**6, 4 * 10**6 + 16]},
            },
            bytes(4 * 10**6 + 16),
        ),
    }
    found["zip bombs"] = {
        "deflated.pth": zipped(whole, {"0": bytes(200_000_000)}, compression=zipfile.ZIP_DEFLATED),
        "overlapping.pth": _overlapping(1_000, 4_000_000),
        "member.pth": _claiming(zipped(whole), 1 << 31),
        "nested.pth": zipped(zipped(zipped(whole))),
    }
    return found


def _overlapping(count: int, size: int) -> bytes:
    """Return an archive whose directory lists one member under many names."""
    keys = [f"{i:04}" for i in range(count)]
    root = pickled({key: tensor((size // 4,), of=storage(key, size // 4)) for key in keys})
    whole = zipped(root, {keys[0]: bytes(size)})
    end = whole.rindex(b"PK\5\6")
    start = whole.index(b"PK\1\2", len(whole) - 400)
    directory = whole[start:end]
    own = directory[directory.index(b"PK\1\2", 4) :]
    more = b"".join(own.replace(keys[0].encode(), key.encode()) for key in keys[1:])
    total = struct.pack("<HHII", count + 1, count + 1, len(directory + more), start)
    return whole[:start] + directory + more + whole[end : end + 8] + total + b"\0\0"


def _claiming(archive: bytes, size: int) -> bytes:
    """Return an archive whose last member claims to be of another size."""
    place = archive.rindex(b"PK\1\2")
    return archive[: place + 20] + struct.pack("<II", size, size) + archive[place + 28 :]


def climbing(outside: str) -> Files:
    """Return files whose members or tensors are named as paths to `outside`."""
    four = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    files: Files = {}
    for i, path in enumerate(
        (f"../{outside}", f"../../../../../../tmp/{outside}", f"/tmp/{outside}", f"a/../{outside}")
    ):
        root = pickled({path: tensor(of=storage(path))})
        files |= {
            f"{i}.pth": zipped(root, {path: bytes(16)}),
            f"{i}-legacy.pth": legacy(root, {path: 4}),
            f"{i}.safetensors": safetensors_file({path: four}),
        }
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{path}/data.pkl", root)
            archive.writestr(f"{path}/data/{path}", bytes(16))
        files[f"{i}-folder.pth"] = file.getvalue()
    return files


def lying_headers() -> Files:
    """Return `.safetensors` files whose header lies."""
    four = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    twice = b'{"a":%b,"a":%b}' % ((json.dumps(four).encode(),) * 2)
    ones = b"1," * 7_000_000
    files = {
        "longer than the file": safetensors_file({"a": four}, length=1 << 20),
        "of all numbers": safetensors_file({"a": four}, length=(1 << 64) - 1),
        "shorter than it is": safetensors_file({"a": four}, length=9),
        "empty": safetensors_file(b""),
        "no JSON": safetensors_file(b"\xff{{{"),
        "deep JSON": safetensors_file(b'{"a":' * 100_000),
        "overlapping": safetensors_file({"a": four, "b": four}),
        "a hole": safetensors_file({"a": four, "b": {**four, "data_offsets": [20, 36]}}, bytes(36)),
        "backwards": safetensors_file({"a": {**four, "data_offsets": [16, 0]}}),
        "negative": safetensors_file({"a": {**four, "shape": [-4]}}),
        "another shape": safetensors_file({"a": {**four, "shape": [5]}}),
        "a product that overflows": safetensors_file({"a": {**four, "shape": [1 << 33, 1 << 33]}}),
        "an empty product": safetensors_file(
            {"a": {**four, "shape": [0, 1 << 63], "data_offsets": [0, 0]}}, b""
        ),
        "seventy dimensions": safetensors_file({"a": {**four, "shape": [4] + [1] * 69}}),
        "seven million dimensions": safetensors_file(
            b'{"a":{"dtype":"F32","shape":[' + ones + b'4],"data_offsets":[0,16]}}'
        ),
        "a hundred megabytes": safetensors_file(b" " * 99_000_000 + b"{}"),
        "one name twice": safetensors_file(twice),
        "an unknown type": safetensors_file({"a": {**four, "dtype": "F77"}}),
        "an eight-bit type": safetensors_file({"a": {**four, "dtype": "F8_E4M3", "shape": [16]}}),
        "no entry": safetensors_file({"a": 3}),
        "no end": safetensors_file({"a": four}, bytes(15)),
        "more than it says": safetensors_file({"a": four}, bytes(17)),
    }
    return {f"{key}.safetensors": file for key, file in files.items()}


def networks() -> dict[str, Files]:
    """Return a narrow ResNet-18 in every form, other networks, and it with weights that are no numbers."""
    import torch

    from proofs.fidelity.torch_resnet import random_torch_resnet

    def saved(entries: dict[str, Any], form: str) -> bytes:
        file = io.BytesIO()
        if form == "safetensors":
            from safetensors.torch import save

            return save({key: x.contiguous() for key, x in entries.items()})
        torch.save(entries, file, _use_new_zipfile_serialization=form == "zip.pth")
        return file.getvalue()

    def forms(entries: dict[str, Any], title: str) -> Files:
        return {f"{title}.{form}": saved(entries, form) for form in ("zip.pth", "legacy.pth", "safetensors")}

    own = random_torch_resnet("resnet18", width=2, num_classes=3).state_dict()
    other = {
        "resnet50": random_torch_resnet("resnet50", width=2, num_classes=3).state_dict(),
        "resnet34": random_torch_resnet("resnet34", width=2, num_classes=3).state_dict(),
        "transformer": torch.nn.TransformerEncoderLayer(8, 2, 16).state_dict(),
        "nothing": {},
    }
    unreal = {
        str(x): {**own, "layer3.1.bn2.running_var": torch.full((8,), x, dtype=torch.float64)}
        for x in (float("nan"), float("inf"), float("-inf"), 1e300)
    }
    return {
        "good": forms(own, "resnet18"),
        "weights of another network": {
            k: v for title, e in other.items() for k, v in forms(e, title).items()
        },
        "weights that are no numbers": {
            k: v for title, e in unreal.items() for k, v in forms(e, title).items()
        },
    }


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


def mutated(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Return `data` with bytes changed, cut off, deleted, repeated, or taken from `other`."""
    for _ in range(int(rng.integers(1, 7))):
        # Half of the places are at the beginning, where headers are.
        limit = max(1, min(len(data), 600) if rng.random() < 0.5 else len(data))
        at, size = int(rng.integers(limit)), 1 << int(rng.integers(9))
        match int(rng.integers(8)):
            case 0 | 1:
                data = data[:at] + rng.bytes(1) + data[at + 1 :]
            case 2:
                data = (
                    data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
                    if data
                    else data
                )
            case 3:
                number = int(rng.choice([0, 1, 127, 255, 32_767, 65_535, (1 << 31) - 1, (1 << 32) - 1]))
                order: Any = rng.choice(["<I", ">I"])
                data = data[:at] + struct.pack(order, number) + data[at + 4 :]
            case 4:
                data = data[:at] if rng.random() < 0.3 else data
            case 5:
                data = data[:at] + data[at + size :]
            case 6:
                data = data[: at + size] + data[at:]
            case _:
                begin = int(rng.integers(max(1, len(other))))
                data = data[:at] + other[begin : begin + size] + data[at + size * int(rng.integers(2)) :]
    return data


def mutated_members(archive: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Return a sound archive around a pickle that is not, so that what it holds reaches the reader."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as read, zipfile.ZipFile(file, "w") as written:
        for member in read.namelist():
            data = read.read(member)
            chosen = member.endswith("data.pkl") or rng.random() < 0.01
            written.writestr(member, mutated(data, other, rng) if chosen else data)
    return file.getvalue()
