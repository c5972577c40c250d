"""Files from strangers: weights that attack, images that are broken, and what mutation makes of good ones.

Everything is tried in a process of its own, which is watched: for time, for memory, for a crash and, through
Python's audit events, for anything executed or written.
"""

import itertools
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from proofs.torture import hostile_images, hostile_weights, mutation, packing
from proofs.torture.fault import Fault
from proofs.torture.packing import Files
from proofs.torture.watch import Outcome, try_all


def command(path: Path) -> str:
    """Try a weight file through the command that converts it."""
    from tat_jax import convert

    try:
        convert.main(["resnet18", "--from", str(path), "--to", str(path.with_suffix(".converted"))])
    except SystemExit as stopped:
        message = str(stopped.code)
        named = message.startswith("error: ") and str(path) in message
        return "refused" if named else f"refused without its name: {message:.200}"
    return "read"


def weights(path: Path) -> str:
    """Try a weight file as the command does, short of writing."""
    from tat_jax.weights.files import read_entries
    from tat_jax.weights.names import convert_entries

    try:
        entries = read_entries(path)
        distinct = {id(array): array.nbytes for array in entries.values()}
        if sum(distinct.values()) > path.stat().st_size:
            return "read as more than it holds"
        convert_entries(entries, "resnet18", source=str(path))
    except ValueError as error:
        return "refused" if str(path) in str(error) else f"refused without its name: {error!r:.200}"
    return "read"


def pixels(path: Path) -> str:
    """Try an image as the pipeline does, in training and in evaluation."""
    from tat_jax.data.transforms import DecodeError, decode, eval_transform, train_transform

    try:
        image = decode(path.read_bytes(), str(path))
    except DecodeError as error:
        return (
            "refused" if str(error).startswith(f"{path}: ") else f"refused without its name: {error!r:.200}"
        )
    rng = np.random.default_rng(0)
    crop = train_transform(image, rng, size=32, scale=(0.08, 1), ratio=(3 / 4, 4 / 3), flip=True)
    centre = eval_transform(image, resize=36, size=32)
    sound = all(x.dtype == np.uint8 and x.shape == (32, 32, 3) for x in (crop, centre))
    return "read" if sound else "no image came of it"


def input_road(path: Path) -> str:
    """Try an image in a folder of images of its own, with and without `data.skip_broken`."""
    from tat_jax.configs import base
    from tat_jax.data.pipeline import open_pipeline
    from tat_jax.data.transforms import DecodeError

    config = base.base()
    root = path.parent / "images"
    file = root / "train" / "class" / path.name
    file.parent.mkdir(parents=True)
    os.link(path, file)
    try:
        config.data.update({"root": str(root), "threads": 1, "skip_broken": True})
        skipping = open_pipeline(config, "train", batch_size=1)
        (batch,) = skipping.epoch(0)
        config.data.skip_broken = False
        try:
            (image,) = open_pipeline(config, "train", batch_size=1).epoch(0)
        except DecodeError as error:
            named = str(error).startswith(f"{file}: ") and skipping.skipped == {0: str(file)}
            return "refused" if named and not batch.where.any() else f"not reported: {error!r:.200}"
        return "read" if image.where.all() and not skipping.skipped else "skipped and read"
    finally:
        shutil.rmtree(root)


def write_in_turns(folder: Path, files: Files) -> Iterator[Path]:
    """Write each file, yield its path, and remove it."""
    for name, data in files.items():
        path = folder / name
        path.write_bytes(data)
        yield path
        path.unlink()


def _mutants(folder: Path, seeds: Files, seconds: float, seed: int) -> Iterator[Path]:
    """Write mutants of the files for so long; the sound ones come first, and must be read."""
    yield from write_in_turns(folder, {f"sound-{name}": data for name, data in seeds.items()})
    rng = np.random.default_rng(seed)
    names, end = sorted(seeds), time.monotonic() + seconds
    for count in itertools.count():
        if time.monotonic() > end:
            return
        name, other = (names[int(i)] for i in rng.integers(len(names), size=2))
        zipped = name.endswith(".zip.pth") and rng.random() < 0.8
        mutate = mutation.mutated_members if zipped else mutation.mutated
        yield from write_in_turns(folder, {f"{seed}-{count}-{name}": mutate(seeds[name], seeds[other], rng)})


def _fault(title: str, outcomes: Sequence[Outcome], wanted: Sequence[str], keep: Path) -> Fault:
    """Return a line of the table, having said on stderr which files did not end as wanted."""
    failed = [outcome for outcome in outcomes if not outcome.survived or outcome.verdict not in wanted]
    for outcome in failed:
        print(f"{title}: {outcome}; kept in {keep}", file=sys.stderr)
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    counts = ", ".join(f"{verdicts[x]:,} {x}" for x in ("refused", "read") if verdicts[x])
    worst = max(outcome.seconds for outcome in outcomes), max(outcome.mebibytes for outcome in outcomes)
    cost = f"at worst {worst[0]:.1f} s, {worst[1]:.0f} MiB"
    lost = f"{len(failed)} files, kept in {keep}" if failed else "nothing"
    return Fault(title, len(outcomes), len(outcomes) - len(failed), f"{lost}: {counts}; {cost}")


def _tried(
    attempt: Callable[[Path], str],
    groups: Mapping[str, tuple[Files, Sequence[str]]],
    folder: Path,
    keep: Path,
    *,
    may_write: bool = False,
) -> list[Fault]:
    """Return a line for each group of files and the verdicts wanted of them, all tried by one process."""
    numbered = [
        (title, f"{i}-{name}", data)
        for i, (title, (files, _)) in enumerate(groups.items())
        for name, data in files.items()
    ]
    files = {name: data for _, name, data in numbered}
    found = try_all(attempt, write_in_turns, (folder, files), keep, may_write=may_write)
    outcomes = {outcome.name: outcome for outcome in found}

    def outcome_of(name: str) -> Outcome:
        return outcomes.get(name, Outcome(name, "not tried, as its process had died", 0, 0))

    return [
        _fault(title, [outcome_of(name) for group, name, _ in numbered if group == title], wanted, keep)
        for title, (_, wanted) in groups.items()
    ]


def weight_faults(keep: Path) -> list[Fault]:
    """Have the command convert weight files that attack or lie; a sound one is read before and after them."""
    with tempfile.TemporaryDirectory() as name:
        folder, outside = Path(name) / "folder", f"outside-{os.getpid()}"
        folder.mkdir()
        networks = hostile_weights.networks()
        sound = networks.pop("good")
        running = {
            f"{title}{ending}": pack(packing.pickled({"conv1.weight": operations}))
            for title, operations in hostile_weights.gadgets(folder / "canary").items()
            for ending, pack in ((".pth", packing.zipped), ("-legacy.pth", packing.legacy))
        }
        hostile = {
            "weight files that run code": running,
            **hostile_weights.bombs(),
            "names that climb out": hostile_weights.climbing(outside),
            "safetensors headers that lie": hostile_weights.lying_headers(),
            "indexes of weight files that lie": hostile_weights.lying_indexes(outside),
            **networks,
        }
        groups = {
            "sound weight files": (sound, ["read"]),
            **{title: (files, ["refused"]) for title, files in hostile.items()},
            "the sound ones after the attacks": (sound, ["read"]),
        }
        found = _tried(command, groups, folder, keep)
        # The folder itself is watched: a canary in it would be the verdict of its file.
        if any((place / outside).exists() for place in (Path(name), Path("/tmp"))):
            raise AssertionError(f"{outside} was written")
        return found


def image_faults(photos: Sequence[bytes], keep: Path, *, flips: int) -> list[Fault]:
    """Have the input pipeline read broken images; all but those with a few bytes changed must be reported."""
    groups = {
        "sound photographs": ({f"{i}.JPEG": photo for i, photo in enumerate(photos)}, ["read"]),
        **{title: (files, ["refused"]) for title, files in hostile_images.broken_images(photos).items()},
        "images of 89 million pixels": (hostile_images.largest_images(), ["read"]),
        "images with bytes changed": (hostile_images.flipped(photos, flips), ["refused", "read"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        # The road makes a folder of its own, and deletes it.
        return _tried(input_road, groups, Path(folder), keep, may_write=True)


def fuzz_images(photos: Sequence[bytes], seconds: float, seed: int, keep: Path) -> Fault:
    """Read mutants of photographs, and of one photograph in every other format, for so long."""
    seeds = {f"{i}.JPEG": photo for i, photo in enumerate(photos)} | hostile_images.kinds(photos[0])
    return _fuzz("mutated images", pixels, seeds, seconds, seed, keep)


def fuzz_weights(seconds: float, seed: int, keep: Path) -> Fault:
    """Read mutants of a network's weight file, and of one of a single tensor, in every form for so long."""
    small = packing.pickled({"module.a": packing.tensor()})
    seeds = {"small.zip.pth": packing.zipped(small), "small.legacy.pth": packing.legacy(small)}
    seeds |= hostile_weights.networks()["good"]
    return _fuzz("mutated weight files", weights, seeds, seconds, seed, keep)


def _fuzz(
    title: str, attempt: Callable[[Path], str], seeds: Files, seconds: float, seed: int, keep: Path
) -> Fault:
    outcomes: list[Outcome] = []
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:  # a process that dies is followed by another
        with tempfile.TemporaryDirectory() as folder:
            outcomes += try_all(attempt, _mutants, (Path(folder), seeds, left, seed), keep)
        seed += 1
    return _fault(title, outcomes, ["refused", "read"], keep)


def faults(*, photos: Sequence[bytes], seconds: float, keep: Path) -> list[Fault]:
    """Try every hostile file, then mutants of weight files and of images for so many seconds each.

    Args:
        photos: JPEG files.
        seconds: of mutation, of weight files and of images each.
        keep: the folder for the files that did what no file may do.
    """
    return [
        *weight_faults(keep),
        *image_faults(photos[:3], keep, flips=200),
        fuzz_weights(seconds, 0, keep),
        fuzz_images(photos, seconds, 0, keep),
    ]
