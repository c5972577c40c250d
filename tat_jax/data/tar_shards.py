"""Which members of a split's tar files are images, and which class index stands beside each of them."""

import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO

import numpy as np
from jaxtyping import Integer

from tat_jax.buckets import Entry
from tat_jax.data import kept_lists
from tat_jax.data.folders import Folder
from tat_jax.data.listing import EXTENSIONS, PassedOver, Paths, is_image
from tat_jax.data.source import printable

UNLABELLED = -1
_AT_ONCE = 16  # shards that are listed
_DIGITS = 7  # of a class index at most
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_DECOMPRESS = "so that its images cannot be read in any order: decompress it, as `gunzip` and `unzstd` do"
_RECORD = 20 * tarfile.BLOCKSIZE  # to a multiple of which tar files are filled up


@dataclass(frozen=True)
class Shards:
    """The images of a split's tar files, in arrays, which processes share.

    Attributes:
        files: sizes and versions of the tar files by their paths in the folder of the splits, in order.
        names: of the images within their files.
        shard: for each image the number of its file.
        start: where it begins in it.
        size: its bytes.
        label: its class index; `UNLABELLED` where none stands beside it.
        passed: what was passed over.
    """

    files: dict[str, Entry]
    names: Paths
    shard: Integer[np.ndarray, " images"]
    start: Integer[np.ndarray, " images"]
    size: Integer[np.ndarray, " images"]
    label: Integer[np.ndarray, " images"]
    passed: PassedOver


class ShardImages:
    """The images of a split's tar files, read one by one.

    Args:
        folder: holds the split.
        split: holds files that end in `.tar`, see `list_shards`.

    Attributes:
        shards: what was found.
    """

    def __init__(self, folder: Folder, split: str):
        self._folder, self.shards = folder, list_shards(folder, split)
        self._files = list(self.shards.files.items())

    def __len__(self) -> int:
        return len(self.shards.names)

    def read(self, index: int) -> tuple[bytes, str]:
        """Return an image, and what errors call it."""
        path, entry = self._files[self.shards.shard[index]]
        start, size = int(self.shards.start[index]), int(self.shards.size[index])
        return self._folder.read_part(path, entry, start, size), self.name(index)

    def name(self, index: int) -> str:
        """Return what errors call an image."""
        path, _ = self._files[self.shards.shard[index]]
        return printable(f"{self._folder.root}/{path}/{self.shards.names[index]}")


def list_shards(folder: Folder, split: str) -> Shards:
    """Return the images of a split's tar files: files by name, and in each the images as they come.

    A sample are the members whose names are the same up to the first dot after the last slash. Its image ends
    as torchvision's do, its class index in `.cls`; all else is passed over. The list is kept, and holds for
    as long as files are of the same names, sizes and versions.

    Args:
        folder: holds the split.
        split: holds files that end in `.tar`.

    Raises:
        FileNotFoundError: there are none.
        OSError: one cannot be read.
        ValueError: one is compressed or damaged, has no images, or cannot be what it should be.
    """
    passed = PassedOver()
    files = _find(folder, split, passed)
    of, versions = [str(folder.root / split / "*.tar")], {path: list(entry) for path, entry in files.items()}
    kept = kept_lists.load(of)
    if kept and kept[1]["files"] == versions:
        arrays, said = kept
        names = Paths(arrays.pop("text"), arrays.pop("ends"))
        within = PassedOver.of(said["passed"])
    else:
        within = PassedOver()
        names, arrays = _list(folder, files, within)
        if folder.have_settled(files):
            paths = {"text": names.text, "ends": names.ends}
            kept_lists.save(of, paths | arrays, {"files": versions, "passed": vars(within)})
    passed.add(within)
    return Shards(files, names, **arrays, passed=passed)


def _find(folder: Folder, split: str, passed: PassedOver) -> dict[str, Entry]:
    """Return the tar files of a split by their paths, sorted."""
    files = {}
    for name, entry in sorted(folder.files(split).items()):
        if name[0] == ".":
            if name.endswith(".tar"):
                passed.hidden.append(f"{folder.root}/{split}/{name}")
        elif name.lower().endswith(_COMPRESSED):
            raise ValueError(f"{printable(f'{folder.root}/{split}/{name}')} is compressed, {_DECOMPRESS}")
        elif name.lower().endswith(".tar"):
            files[f"{split}/{name}"] = entry
        else:
            _pass_over(name, passed)
    if inner := [name for name in folder.folders(split) if name[0] != "."]:
        passed.endings["folders with all in them"] += len(inner)
    if not files:
        raise FileNotFoundError(
            f"no .tar files in {folder.root / split}; {folder.where_images_belong(split)}"
        )
    return files


def _list(folder: Folder, files: dict[str, Entry], passed: PassedOver) -> tuple[Paths, dict[str, np.ndarray]]:
    """Return the names of the images, and the arrays of `Shards`."""

    def list_file(path: str) -> tuple[list[str], np.ndarray, PassedOver]:
        name = printable(f"{folder.root}/{path}")
        try:
            with folder.open(path, files[path]) as opened:
                return _list_file(name, opened, files[path].size)
        except OSError as error:
            if error.strerror is None:  # it says all itself
                raise
            raise type(error)(f"{name} cannot be read ({error.strerror})") from error

    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        listed = list(pool.map(list_file, files))
    finally:
        pool.shutdown(cancel_futures=True)
    for _, _, within in listed:
        passed.add(within)
    start, size, label = np.concatenate([places for _, places, _ in listed]).T
    counts = [len(names) for names, _, _ in listed]
    return Paths.of(list(chain.from_iterable(names for names, _, _ in listed))), {
        "shard": np.repeat(np.arange(len(files), dtype=np.int32), counts),
        "start": start.copy(),
        "size": size.copy(),
        "label": label.astype(np.int32),
    }


def _list_file(shard: str, file: BinaryIO, size: int) -> tuple[list[str], np.ndarray, PassedOver]:
    """Return the names of a tar file's images, start, size and label of each, and what was passed over."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    passed = PassedOver()
    for member in _members(shard, file, size):
        name = member.name
        base = name.rpartition("/")[2]
        stem, _, ending = base.partition(".")
        key, ending = name[: len(name) - len(base) + len(stem)], f".{ending.lower()}"
        if member.isdir():
            continue
        if not stem:
            if is_image(base):
                passed.hidden.append(f"{shard}/{name}")
        elif ending in EXTENSIONS:
            _check(shard, member, images[key][0] if key in images else None)
            images[key] = name, member.offset_data, member.size
        elif ending == ".cls":
            _check(shard, member, f"{key}.cls" if key in labels else None)
            labels[key] = _label(shard, member, file)
        elif ending == ".tar":
            raise ValueError(
                f"{shard} holds other tar files, as {printable(name)}: put those into its place, or, of "
                "ImageNet's own, see `make imagenet`"
            )
        else:
            _pass_over(base, passed)
    if lonely := len(labels.keys() - images.keys()):
        passed.endings[".cls without an image"] += lonely
    if not images:
        what = "".join(f"; {line}" for line in passed.lines("in it"))
        raise ValueError(f"no images in {shard} ({' '.join(EXTENSIONS)}){what}; remove it")
    places = [(start, size, labels.get(key, UNLABELLED)) for key, (_, start, size) in images.items()]
    return [name for name, _, _ in images.values()], np.array(places, np.int64), passed


def _members(shard: str, file: BinaryIO, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file, which is whole, whatever `tarfile` would take for its end.

    Raises:
        OSError: it cannot be read.
        ValueError: it is compressed, damaged or cut short.
    """
    begins = file.read(8)
    for magic, kind in _MAGIC.items():
        if begins.startswith(magic):
            raise ValueError(f"{shard} is compressed ({kind}), {_DECOMPRESS}")
    if not size:
        raise ValueError(f"{shard} is empty")
    file.seek(0)
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                if not end <= member.offset_data <= member.offset_data + member.size:
                    raise tarfile.ReadError(f"{member.name} is of a negative size")
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it is cut short within {member.name}")
                yield member
                end = tar.offset
            _check_end(file, tar.offset)
    except OSError:
        raise
    except Exception as error:  # whatever its parser meets
        raise ValueError(f"{shard} is damaged ({printable(str(error))}): pack or copy it anew") from error


def _check_end(file: BinaryIO, end: int) -> None:
    """Raise a ReadError unless a tar file is closed there by zeros, and nothing follows."""
    file.seek(end)
    rest = file.read(_RECORD)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it is cut short: nothing closes it")
    if any(rest[: tarfile.BLOCKSIZE]):
        raise tarfile.ReadError(f"no member begins at byte {end:,}")
    if any(rest):
        raise tarfile.ReadError(f"it goes on after its end at byte {end:,}, as files do that `cat` joined")


def _check(shard: str, member: tarfile.TarInfo, first: str | None) -> None:
    """Raise a ValueError unless a member is a file of its own, and the first of its kind in its sample."""
    name = printable(f"{shard}/{member.name}")
    if first is not None:
        raise ValueError(f"{name} is of the same sample as {printable(first)}: name them apart")
    if member.islnk() or member.issym():
        raise ValueError(f"{name} is a link: pack it anew with --dereference --hard-dereference")
    if member.issparse():
        raise ValueError(f"{name} is a sparse file: pack it anew without --sparse")
    if not member.isreg():
        raise ValueError(f"{name} is no file")


def _label(shard: str, member: tarfile.TarInfo, file: BinaryIO) -> int:
    file.seek(member.offset_data)
    text = file.read(min(member.size, 100)).strip()
    if not text.isdigit() or len(text) > _DIGITS:
        raise ValueError(
            f"{printable(f'{shard}/{member.name}')} holds no class index but {text[:16]!r}; it is a whole "
            "number from 0 on, as text"
        )
    return int(text)


def _pass_over(name: str, passed: PassedOver) -> None:
    ending = name.partition(".")[2].lower()
    passed.endings[f".{ending}" if ending else "without ending"] += 1
