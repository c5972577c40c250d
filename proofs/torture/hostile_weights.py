"""Weight files that attack or lie, as bytes by name."""

import argparse
import datetime
import io
import json
import pathlib
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from proofs.torture.packing import (
    Files,
    legacy,
    name,
    pickled,
    safetensors_file,
    storage,
    tensor,
    value,
    zipped,
)


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
        **_of_harmless_names(system, command),
        "a persistent id in text": b"Pposix.system\n",
        "a persistent id of a module": b"(" + value("module") + system + command + command + value(4) + b"tQ",
        "a persistent id of a function": storage(kind=rebuild),
        "a call of a storage": storage() + command + b"\x85R",
    }


def _of_harmless_names(system: bytes, command: bytes) -> dict[str, bytes]:
    """Return operations that run code by way of names that are stepped over, or of what lies beside them."""
    namespace = name("argparse", "Namespace")
    reaching = {
        "argparse": "Namespace.__init__.__globals__",
        "pathlib": "Path.touch",
        "builtins": "object.__reduce_ex__",
        "collections": "namedtuple",
        "numpy": "load",
        "torch": "load",
        "types": "FunctionType",
        "typing": "get_type_hints",
        "_codecs": "decode",
        "mmengine.config.config": "Config.fromfile",
    }
    found = {
        f"{module}.{path}": value(module) + value(path) + b"\x93" + command + b"\x85R"
        for module, path in reaching.items()
    }
    return found | {
        "a factory that runs code": name("collections", "defaultdict") + system + b"\x85R",
        "attributes that run code": namespace + b")\x81}" + value("__reduce__") + system + b"sb",
        "an array whose type runs code": name("numpy.core.multiarray", "_reconstruct") + system + b"\x85R",
        "a call of what was made of a harmless name": namespace + b")\x81" + command + b"\x85R",
        "an item of what was made of a harmless name": namespace + b")\x81" + system + command + b"s",
        "a path that is made": name("pathlib", "PosixPath") + command + b"\x85R",
        "a codec": name("_codecs", "encode") + command + value("zip") + b"\x86R",
    }


def bombs() -> dict[str, Files]:
    """Return files of little content that ask for much memory or time, by what they do."""
    return {
        "pickles that grow": _growing(),
        "tensors larger than their file": _oversized(),
        "zip bombs": _zip_bombs(),
    }


def _growing() -> Files:
    doubled = b")" + b"".join(b"q\0h\0h\0\x86" for _ in range(40))
    files: Files = {"keys.pth": legacy(_sound(), keys=b"\x80\x02](" + doubled + b"e.")}
    for key, operations in _growing_operations(doubled).items():
        root = pickled({"conv1.weight": operations})
        files |= {f"{key}.pth": zipped(root), f"{key}-legacy.pth": legacy(root)}
    return files


def _growing_operations(doubled: bytes) -> dict[str, bytes]:
    """Return operations that grow; `doubled` are those of a tuple of two tuples of two tuples, and so on."""
    nested = b")" + b"\x85" * 900_000
    lists = b"]" + b"q\0h\0h\0\x86" * 40
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    return {
        "memo": b"Nr\xff\xff\xff\x7f",
        "hash": doubled + b"}h\0K\x01s",
        "repr": lists + b"Q",
        "names": lists + b"}h\0K\x01s",
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
        **_growing_beside(),
        "negative": tensor(strides=(-1,), offset=3),
    }


def _growing_beside() -> dict[str, bytes]:
    """Return operations that grow, were they done, by way of what a weight file may have beside tensors."""
    pairs = b"](" + (b"](" + value("a") + b"Ne") * 100_000 + b"eq\1"
    size = value(1 << 60) + b"\x85R"
    return {
        "items": pairs + name("collections", "OrderedDict") + b"q\2" + b"h\2h\1\x85R" * 100_000 + b"t",
        "range": name("builtins", "list") + name("builtins", "range") + size + b"\x85R",
        "bytes": name("builtins", "bytes") + size,
        "array": name("numpy", "ndarray") + size,
        "set": b"\x8f(" + b"N" * 400_000 + b"\x90",
        "frozen": b"(" + b"N" * 400_000 + b"\x91",
        "twice": b"}(" + value("x0") + b"}q\0" + _doubling(60) + b"u",
        "within": b"}q\0" + value("a") + b"h\0s",
        "deep": (b"}" + value("a")) * 100_000 + b"N" + b"s" * 100_000,
        "name": b"}" * 300 + (value("a" * 100_000) + b"Ns") + (value("a" * 400) + b"Ns"),
    }


def _doubling(count: int) -> bytes:
    """Return items of a dictionary that are dictionaries, each with the one before twice."""
    return b"".join(
        value(f"x{i}") + b"}(" + value("a") + b"h%c" % (i - 1) + value("b") + b"h%c" % (i - 1) + b"uq%c" % i
        for i in range(1, count)
    )


def _oversized() -> Files:
    four = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    giant = pickled({"conv1.weight": tensor(shape=(1 << 60,), of=storage(size=1 << 60))})
    size = 1 << 20
    first = {"first": tensor((size,), of=storage(size=size) + b"q\1") + b"q\2"}
    views = {f"layer{i}.weight": tensor((size - i,), offset=i, of=b"h\1") for i in range(20_000)}
    again = {f"layer{i}.weight": b"h\2" for i in range(20_000)}
    return {
        "claimed.pth": zipped(giant),
        "claimed-legacy.pth": legacy(giant, {"0": 1 << 60}),
        "shared.pth": zipped(pickled(first | views), {"0": bytes(4 << 20)}),
        "again.pth": zipped(pickled(first | again), {"0": bytes(4 << 20)}),
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


def _zip_bombs() -> Files:
    whole = _sound()
    return {
        "deflated.pth": zipped(whole, {"0": bytes(200_000_000)}, compression=zipfile.ZIP_DEFLATED),
        "overlapping.pth": _overlapping(1_000, 4_000_000),
        "member.pth": _claiming(zipped(whole), 1 << 31),
        "nested.pth": zipped(zipped(zipped(whole))),
    }


def _sound() -> bytes:
    return pickled({"conv1.weight": tensor()})


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


def lying_indexes(outside: str) -> Files:
    """Return indexes of weight files that name what is not beside them, or that ask for much."""
    places: dict[str, Any] = {
        "absolute": {"a": "/etc/passwd"},
        "endless": {"a": "/dev/zero"},
        "climbing": {"a": f"../{outside}"},
        "the folder": {"a": "."},
        "the one above": {"a": ".."},
        "itself": {"a": "7-itself.index.json"},
        "missing": {"a": "missing.safetensors"},
        "nameless": {"a": ""},
        "a null": {"a": "a\0.bin"},
        "numbers": {"a": 3},
        "a list": ["a.bin"],
        "nothing": {},
    }
    files = {title: json.dumps({"weight_map": place}).encode() for title, place in places.items()}
    files |= {
        "deep": b'{"weight_map":' + b"[" * 1_000_000,
        "large": b'{"weight_map":{}}' + b" " * (5 << 20),
        "many": json.dumps({"weight_map": {str(i): f"{i}.bin" for i in range(100_000)}}).encode(),
        "twice": b'{"weight_map":{"a":"a.bin","a":"b.bin"}}',
        "no JSON": b"\xff{{{",
        "empty": b"",
        "a number": b"9" * 1_000_000,
    }
    return {f"{key}.index.json": file for key, file in files.items()}


def networks() -> dict[str, Files]:
    """Return a narrow ResNet-18 in every form, other networks, and it with weights that are no numbers."""
    # Imported here, because the processes that are watched have no use for it.
    import safetensors.torch
    import torch

    from proofs.torch_resnet import random_torch_resnet

    def saved(entries: dict[str, Any], form: str) -> bytes:
        file = io.BytesIO()
        if form == "safetensors":
            return safetensors.torch.save({key: x.contiguous() for key, x in entries.items()})
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
    training: dict[str, Any] = {
        **{"model": own, "epoch": 3, "metric": np.float64(71.5), "time": datetime.datetime(2026, 1, 1)},
        "args": argparse.Namespace(lr=0.1, root=pathlib.PosixPath("/data"), sizes=torch.Size([1])),
    }
    return {
        "good": forms(own, "resnet18") | {"training.zip.pth": saved(training, "zip.pth")},
        "weights of another network": {
            k: v for title, e in other.items() for k, v in forms(e, title).items()
        },
        "weights that are no numbers": {
            k: v for title, e in unreal.items() for k, v in forms(e, title).items()
        },
    }
