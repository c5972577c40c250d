"""Files from strangers: weights and images made to hurt, and both changed at random."""

import copy
import io
import json
import multiprocessing
import os
import pickle
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import torch
from PIL import Image

from configs import base
from fidelity.photographs import photographs
from fidelity.torch_resnet import random_torch_resnet
from tat_jax import convert
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.sources import open_source
from tat_jax.data.transforms import DecodeError, decode
from tat_jax.torch_file import read_entries
from torture.fault import Fault

Files = dict[str, bytes]  # by name
SECONDS, MIB = 10.0, 1000.0  # that one file may take, and memory above what its reader has at its start


# The reader: a process of its own, for what may crash, hang or take all memory.


class Outcome(NamedTuple):
    """What came of a file.

    Attributes:
        said: "read", the error it was refused with, or what went wrong otherwise.
        kind: "read", "refused" or "wrong".
        seconds: it took.
        mib: of memory it took at most.
    """

    said: str
    kind: str
    seconds: float
    mib: float


class Reader:
    """A process that reads files one by one, and is started again when one of them ends it."""

    def __enter__(self) -> "Reader":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def read(self, what: str, path: Path) -> Outcome:
        """Read a file as an "image", as "weights", or "convert" it as the command does."""
        began = time.monotonic()
        self._connection.send((what, str(path)))
        try:
            # The first answer waits for imports, too.
            if self._connection.poll(SECONDS + 60):
                return self._connection.recv()
            said = "hangs"
        except EOFError:
            self._process.join()
            said = f"ended the process with {self._process.exitcode}"
        self._process.kill()
        self._start()
        return Outcome(said, "wrong", time.monotonic() - began, 0.0)


def _serve(connection: Connection) -> None:
    memory = np.empty(3 * 2048**2, np.uint8)
    while True:
        what, name = connection.recv()
        path = Path(name)
        began = time.monotonic()
        Path("/proc/self/clear_refs").write_text("5")  # forget how much memory this process ever had
        before = _peak_mib()
        said, kind = "read", "read"
        try:
            match what:
                case "image":
                    pixels = decode(path.read_bytes(), name, memory)
                    assert pixels.dtype == np.uint8
                    assert pixels.shape[2:] == (3,)
                case "weights":
                    for array in read_entries(path).values():
                        array.sum()
                case _:
                    with redirect_stdout(io.StringIO()):
                        convert.main(["resnet18", "--from", name, "--to", str(path.parent / "converted")])
        except (DecodeError, ValueError, SystemExit) as error:
            said, kind = str(error), "refused" if name in str(error) else "wrong"
        except BaseException as error:
            said, kind = repr(error), "wrong"
        connection.send(Outcome(said, kind, time.monotonic() - began, _peak_mib() - before))


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


# Weights.


def as_archive(pickled: bytes, members: Mapping[str, bytes] | None = None) -> bytes:
    """Return a `.pth` file of today's form, with a pickle and other members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in (members or {}).items():
            archive.writestr(name, content)
    return file.getvalue()


def as_legacy(pickled: bytes, rest: bytes = b"") -> bytes:
    """Return a `.pth` file of the form before PyTorch 1.6, with a pickle and what follows it."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001})
    return b"".join(pickle.dumps(part, 2) for part in head) + pickled + rest


def codes(canary: Path) -> dict[str, bytes]:
    """Return pickles that would make the file `canary`, or call or change what they should not."""
    command = f"touch {canary}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n"
    made = {f"reduce_{protocol}": pickle.dumps(_Command(command.decode()), protocol) for protocol in range(6)}
    return made | {
        "inst": b"(S'" + command + b"'\nios\nsystem\n.",
        "object": b"(cos\nsystem\nS'" + command + b"'\no.",
        "new_object": b"\x80\x02cos\nsystem\n" + text + b"\x85\x81.",
        "eval": b'cbuiltins\neval\n(S\'__import__("os").system("' + command + b"\")'\ntR.",
        "attribute": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02cos\nsystem\nQ.",
        "build_function": tensor + b"N}X\x0c\x00\x00\x00__defaults__)s\x86b.",
        "build_type": b"ctorch\nFloatStorage\n(K\x01K\x02tb.",
        "call_type": b"ctorch\nFloatStorage\n" + text + b"\x85R.",
        "call_text": text + b")R.",
        "tensor_of_nothing": tensor + b"(NK\x00))NN}tR.",
    }


class _Command:
    """Unpickles by running a command."""

    def __init__(self, command: str):
        self._command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self._command,)


def _of_storage(size: bytes, shape: bytes, strides: bytes, count: int = 1) -> bytes:
    """Return the pickle of a dictionary of `count` tensors that share a storage."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + size
    one = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQK\x00" + shape + strides + b"\x89NtR"
    names = (b"X\x06\x00\x00\x00" + f"{i:06}".encode() for i in range(count))
    return b"\x80\x02}(" + b"".join(name + one for name in names) + b"u."


def bombs() -> Files:
    """Return small `.pth` files that claim, name or nest more than memory or a stack can hold."""
    huge = b"\x8a\x06\x00\x00\x00\x00\x00\x01"  # 2⁴⁰
    pickles = {
        "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b".",
        "array": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
        "long": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
        "storage": _of_storage(huge, b"K\x01\x85", b"K\x01\x85"),
        "shape": _of_storage(b"K\x04", b"(" + 2 * huge + b"t", b"K\x00K\x00\x86"),
        "axes": _of_storage(b"K\x04", b"(" + 100_000 * b"\x8a\xff" + b"t", b"K\x01\x85"),
        "long_axes": _of_storage(
            b"K\x04", b"(" + 50_000 * (b"\x8a\xfe" + 254 * b"\x7f") + b"t", b"(" + 50_000 * b"K\x00" + b"t"
        ),
        "nested_key": b"\x80\x02}" + b")" + 1_000_000 * b"\x85" + b"Ns.",
        "nested": b"\x80\x02}X\x01\x00\x00\x00a" + b"]" + 1_000_000 * b"]" + 1_000_000 * b"a" + b"s.",
        "laughs": b"\x80\x02]q\x00" + b"".join(_laugh(i) for i in range(60)) + b"Q.",
    }
    made = {
        f"{name}_archive.pth": as_archive(pickled, {"archive/data/0": bytes(16)})
        for name, pickled in pickles.items()
    }
    made |= {f"{name}_legacy.pth": as_legacy(pickled) for name, pickled in pickles.items()}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    made["compressed.pth"] = packed.getvalue()
    overlapping = io.BytesIO()
    with zipfile.ZipFile(overlapping, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(1_000_000))
        for i in range(1, 10_000):
            member = copy.copy(archive.getinfo("archive/data/0"))
            member.filename = f"archive/data/{i}"
            archive.filelist.append(member)
    made["overlapping.pth"] = overlapping.getvalue()
    # 20,000 views of 4 MB: read, in no more memory than the file; and refused as weights of no network.
    side = b"M\xe8\x03"
    shared = _of_storage(b"J@B\x0f\x00", side + side + b"\x86", side + b"K\x01\x86", count=20_000)
    made["shared.pth"] = as_archive(shared, {"archive/data/0": bytes(4_000_000)})
    return made


def _laugh(i: int) -> bytes:
    """Return the instructions for a list of twice the list before it."""
    return b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])


def lying_headers() -> Files:
    """Return `.safetensors` files whose headers do not tell what follows them."""

    def said(header: object, length: int | None = None, body: int = 4) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + bytes(body)

    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers = {
        "long": said({"a": one}, length=2**40),
        "longest": said({"a": one}, length=2**64 - 1),
        "short": said({"a": one}, length=3),
        "shape": said({"a": {**one, "shape": [10**9]}}),
        "overflow": said({"a": {**one, "shape": [2**32, 2**32]}}),
        "negative": said({"a": {**one, "shape": [-1]}}),
        "backwards": said({"a": {**one, "data_offsets": [4, 0]}}),
        "beyond": said({"a": {**one, "data_offsets": [0, 400]}}),
        "overlap": said({"a": one, "b": one}),
        "hole": said({"a": one}, body=100),
        "type": said({"a": {**one, "dtype": "F99"}}),
        "other_type": said({"a": {**one, "dtype": "U32"}}),
        "number": said({"a": 3}),
        "list": said([1, 2]),
        "nested": said(b"[" * 1_000_000),
        "twice": said(b'{"a":%s,"a":%s}' % ((json.dumps(one).encode(),) * 2)),
        "no_text": said(b"\xff\xfe\xfd"),
        "spaces": said(b" " * 150_000_000),
    }
    return {f"{name}.safetensors": content for name, content in headers.items()}


def unfit_weights() -> Files:
    """Return well-made files of another network, of odd names, and with NaN or infinity."""
    own = random_torch_resnet("resnet18", width=4, num_classes=6).state_dict()
    states = {
        "other_network": random_torch_resnet("resnet34", width=4, num_classes=6).state_dict(),
        "climbing_name": {**own, "../../canary": torch.zeros(1)},
        "absolute_name": {**own, "/tmp/canary": torch.zeros(1)},
        "nan": {**own, "bn1.weight": torch.full((4,), float("nan"))},
        "infinity": {**own, "fc.bias": torch.full((6,), float("-inf"))},
    }
    made = {}
    for name, state in states.items():
        for legacy in (False, True):
            file = io.BytesIO()
            torch.save(state, file, _use_new_zipfile_serialization=not legacy)
            made[f"{name}_{'legacy' if legacy else 'archive'}.pth"] = file.getvalue()
        arrays = {key: np.asarray(value) for key, value in state.items()}
        made[f"{name}.safetensors"] = safetensors.numpy.save(arrays)
    climbing = {"../../../canary": b"x", "/tmp/canary": b"x", "archive/../../canary": b"x"}
    made["climbing_members.pth"] = as_archive(b"\x80\x02}.", climbing)
    return made


def weight_faults(*, only: int | None = None) -> list[Fault]:
    """Convert every hostile file by the command, and see that nothing is written and nothing executed.

    Args:
        only: so many of each kind.
    """
    with tempfile.TemporaryDirectory() as temporary, Reader() as reader:
        folder = Path(temporary) / "a" / "b" / "c"
        folder.mkdir(parents=True)
        canary = folder / "canary"
        forms: dict[str, Callable[[bytes], bytes]]
        forms = {"archive": as_archive, "legacy": as_legacy, "bare": bytes}
        code = {f"{n}_{f}.pth": make(p) for n, p in codes(canary).items() for f, make in forms.items()}
        kinds = {
            "pickle that runs code, calls or changes what it should not": code,
            "zip bomb, huge claim, deep nest": bombs(),
            ".safetensors whose header lies": lying_headers(),
            "weights of another network, ../ in a name, NaN": unfit_weights(),
        }
        return [_convert_all(kind, files, folder, reader, only) for kind, files in kinds.items()]


def _convert_all(kind: str, files: Files, folder: Path, reader: Reader, only: int | None) -> Fault:
    wrong, seconds, mib = [], 0.0, 0.0
    chosen = list(files.items())[:: max(1, len(files) // only) if only else 1]
    for name, content in chosen:
        path = folder / name
        path.write_bytes(content)
        outcome = reader.read("convert", path)
        path.unlink()
        left = [str(p) for p in folder.parents[2].rglob("*") if p not in (folder, *folder.parents)]
        if outcome.kind != "refused" or outcome.seconds > SECONDS or outcome.mib > MIB or left:
            wrong.append(
                f"{name}: {outcome.said[:200]} ({outcome.seconds:.0f} s, {outcome.mib:.0f} MiB) {left}"
            )
        seconds, mib = max(seconds, outcome.seconds), max(mib, outcome.mib)
    lost = "; ".join(wrong) or f"nothing; refused, {_at_most(seconds, mib)}"
    return Fault(kind, len(chosen), len(chosen) - len(wrong), lost)


# Images.


def broken_images(photo: bytes) -> dict[str, Files]:
    """Return broken images by kind; what Pillow can still read of some is decided by `decode` alone."""
    rng = np.random.default_rng(0)
    header = photo.index(b"\xff\xc0")
    wide = bytearray(photo)
    wide[header + 5 : header + 9] = struct.pack(">HH", 30_000, 30_000)
    return {
        "JPEG cut at every 1 %": {f"cut{i:02}.JPEG": photo[: len(photo) * i // 100] for i in range(100)},
        "JPEG with bytes flipped": {f"flip{i:03}.JPEG": flip(photo, rng) for i in range(100)},
        "no image at all": {
            "zeros.JPEG": bytes(len(photo)),
            "html.JPEG": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
            "script.JPEG": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
            "noise.JPEG": rng.bytes(5000),
        },
        "bomb": {
            "30000.JPEG": bytes(wide),
            "scans.JPEG": _many_scans(),
            "pixels.png": _png(30_000, 30_000),
            "claim.png": _png(9_000, 9_000),
            "strips.tiff": _huge_tiff(),
        },
    }


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a file with one to twenty of its bytes changed."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 21)):
        changed[rng.integers(len(changed))] = rng.integers(256)
    return bytes(changed)


def _many_scans() -> bytes:
    """Return a progressive JPEG of 9,000² pixels whose last scan comes 4,000 times: minutes of decoding."""
    file = io.BytesIO()
    Image.new("RGB", (9_000, 9_000)).save(file, "JPEG", progressive=True, quality=50)
    content = file.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + 4_000 * scan + content[-2:]


def _png(width: int, height: int) -> bytes:
    """Return a PNG of so many pixels, of which few bytes are there."""
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(1000)),
        b"IEND",
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def _huge_tiff() -> bytes:
    """Return a TIFF that claims 60,000² pixels."""
    file = io.BytesIO()
    Image.new("L", (10, 10)).save(file, "TIFF")
    content = bytearray(file.getvalue())
    first = struct.unpack_from("<I", content, 4)[0]
    for i in range(struct.unpack_from("<H", content, first)[0]):
        at = first + 2 + 12 * i
        if struct.unpack_from("<H", content, at)[0] in (256, 257):
            struct.pack_into("<HII", content, at + 2, 4, 1, 60_000)
    return bytes(content)


def image_faults(photo: bytes) -> list[Fault]:
    """Read every broken image alone, and all of a kind together as training reads a folder."""
    found = []
    with tempfile.TemporaryDirectory() as temporary, Reader() as reader:
        for number, (kind, files) in enumerate(broken_images(photo).items()):
            folder = Path(temporary) / str(number) / "train" / "class"
            folder.mkdir(parents=True)
            wrong, refused, seconds, mib = [], set(), 0.0, 0.0
            for name, content in files.items():
                (folder / name).write_bytes(content)
                outcome = reader.read("image", folder / name)
                may_be_read = "flipped" in kind
                if outcome.kind == "refused":
                    refused.add(str(folder / name))
                if outcome.kind != "refused" and not (may_be_read and outcome.kind == "read"):
                    wrong.append(f"{name}: {outcome.said[:200]}")
                if outcome.seconds > SECONDS or outcome.mib > MIB:
                    wrong.append(f"{name}: {outcome.seconds:.0f} s, {outcome.mib:.0f} MiB")
                seconds, mib = max(seconds, outcome.seconds), max(mib, outcome.mib)
            if _skipped(folder.parents[1]) != refused:
                wrong.append("training skips others")
            read = len(files) - len(refused)
            lost = f"nothing; {len(refused)} told by path, {read} read, {_at_most(seconds, mib)}"
            found.append(Fault(kind, len(files), len(files) - len(wrong), "; ".join(wrong) or lost))
    return found


def _skipped(root: Path) -> set[str]:
    """Return the files that an epoch of training over a folder leaves out."""
    config = base.base()
    config.data.update({"root": str(root), "skip_broken": True, "image_size": 32, "eval_resize": 32})
    data = Pipeline(
        open_source(config.data, "train"), config.data, batch_size=16, train=True, seed=0, threads=2
    )
    for _ in data.epoch(0):
        pass
    return set(data.skipped.values())


# At random.


def fuzz_images(photos: Sequence[bytes], seconds: float, *, seed: int = 0, keep: Path) -> Fault:
    """Read photographs changed at random; files that are neither read nor refused are kept."""
    return _fuzz("image", "JPEG", list(photos), seconds, seed, keep)


def fuzz_weights(seconds: float, *, seed: int = 0, keep: Path) -> Fault:
    """Read weight files changed at random, pickles within their archives, too."""
    state = random_torch_resnet("resnet18", width=1, num_classes=2).state_dict()
    few = {name: state[name] for name in list(state)[:12]}
    files = []
    for legacy in (False, True):
        file = io.BytesIO()
        torch.save(few, file, _use_new_zipfile_serialization=not legacy)
        files.append(file.getvalue())
    files.append(safetensors.numpy.save({name: np.asarray(value) for name, value in few.items()}))
    return _fuzz("weights", "pth", files, seconds, seed, keep)


def _fuzz(what: str, ending: str, files: list[bytes], seconds: float, seed: int, keep: Path) -> Fault:
    rng = np.random.default_rng(seed)
    counts = {"read": 0, "refused": 0, "wrong": 0}
    slowest, mib = 0.0, 0.0
    wrong: list[str] = []
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as temporary, Reader() as reader:
        while time.monotonic() < end:
            original = files[rng.integers(len(files))]
            name = f"changed.{'safetensors' if original[8:9] == b'{' else ending}"
            path = Path(temporary) / name
            path.write_bytes(change(original, files, rng))
            outcome = reader.read(what, path)
            kind = "wrong" if outcome.mib > MIB else outcome.kind
            counts[kind] += 1
            slowest, mib = max(slowest, outcome.seconds), max(mib, outcome.mib)
            if kind == "wrong":
                kept = keep / f"{what}_{seed}_{len(wrong)}_{name}"
                kept.write_bytes(path.read_bytes())
                wrong.append(f"{kept}: {outcome.said[:200]}")
    tried = sum(counts.values())
    lost = f"nothing; {counts['refused']:,} refused, {counts['read']:,} read, {_at_most(slowest, mib)}"
    files_changed = "photographs" if what == "image" else "weight files"
    name = f"{files_changed} changed at random, {seconds / 60:g} minutes"
    return Fault(name, tried, tried - len(wrong), "; ".join(wrong) or lost)


def _at_most(seconds: float, mib: float) -> str:
    return f"at most {seconds:.1f} s and {mib:.0f} MiB"


def change(content: bytes, others: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Return a file changed in one of six ways; of an archive, half of the time its pickle."""
    if content[:2] == b"PK" and rng.random() < 0.5:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        pickled = next(name for name in members if name.endswith("data.pkl"))
        members[pickled] = change(members[pickled], others, rng)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, member in members.items():
                archive.writestr(name, member)
        return file.getvalue()
    changed = bytearray(content)
    at, length = int(rng.integers(len(changed))), int(rng.integers(1, 200))
    match rng.integers(6):
        case 0:
            return flip(content, rng)
        case 1:
            del changed[at:]
        case 2:
            del changed[at : at + length]
        case 3:
            changed[at:at] = changed[at : at + length] * int(rng.integers(1, 20))
        case 4:
            near_start = changed[: min(700, len(changed))]
            changed[: len(near_start)] = flip(bytes(near_start), rng)
        case _:
            other = others[int(rng.integers(len(others)))]
            changed[at : at + length] = bytes(other[at : at + length])
    return bytes(changed)


def faults(photos: Path | None, minutes: float, *, keep: Path) -> list[Fault]:
    """Read all of the above; change files at random for so many minutes each."""
    jpegs = [photo.jpeg for photo in photographs(photos)]
    return [
        *weight_faults(),
        *image_faults(jpegs[0]),
        fuzz_images(jpegs, 60 * minutes, keep=keep),
        fuzz_weights(60 * minutes, keep=keep),
    ]
