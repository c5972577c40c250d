"""Weight files, written operation by operation, so that they may be any."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

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
