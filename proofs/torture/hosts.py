"""Up to 64 processes of one training, as on the hosts of a pod: who reads what, who writes what."""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
from ml_collections import ConfigDict

from proofs.crowd import Crowd, Touched
from proofs.program import ROOT
from proofs.report import announce
from proofs.torture.layers import SIDE
from tat_jax.configs import supervised
from tat_jax.data.pipeline import Pipeline, open_pipeline
from tat_jax.weights import folders

COUNTS = (1, 4, 16, 64)
EPOCHS, BATCH = 2, 64
_CLASSES, _TRAIN, _VAL = "abcd", 64, 16  # classes, and images of each
STEPS = len(_CLASSES) * _TRAIN // BATCH  # of an epoch


class Hosts(NamedTuple):
    """What so many processes did: one line of the table.

    Attributes:
        processes: how many.
        wrong: what must not be; empty where all held.
        images: of an epoch that each read.
        touched: opened files and listed folders of the data before the first batch, of each but the first.
        files: of a checkpoint.
        arrays: bytes of a checkpoint that are arrays.
        others: bytes besides, which say what the arrays are.
        shares: of the arrays' bytes that processes wrote, the smallest and the largest.
        started: seconds until the first row of the log.
        seconds: of a core that a process took, the median.
    """

    processes: int
    wrong: Sequence[str]
    images: int
    touched: int
    files: int
    arrays: int
    others: int
    shares: tuple[float, float]
    started: float
    seconds: float

    @property
    def holds(self) -> bool:
        """Return whether all that must hold held."""
        return not self.wrong

    def cells(self) -> dict[str, str]:
        """Return what stands in the line, by heading."""
        least, most = self.shares
        return {
            "processes": str(self.processes),
            "read, and written by one": "; ".join(self.wrong) or "as must be",
            "images an epoch, each": str(self.images),
            "data opened and listed, each": str(self.touched),
            "checkpoint: files": str(self.files),
            "arrays, kB": f"{self.arrays / 1e3:,.0f}",
            "by each": f"{least:.1%}" if least == most else f"{least:.1%} to {most:.1%}",
            "else, kB": f"{self.others / 1e3:,.0f}",
            "s to first row": f"{self.started:.0f}",
            "CPU s, each": f"{self.seconds:.1f}",
        }


def hosts(counts: Sequence[int] = COUNTS) -> list[Hosts]:
    """Train the same with so many processes, and look at what each did."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_images(folder / "images")
        return [_together(folder, count) for count in counts]


def make_images(root: Path) -> None:
    """Write a folder of small images, `_TRAIN` and `_VAL` of each class."""
    rng = np.random.default_rng(0)
    for split, images in (("train", _TRAIN), ("val", _VAL)):
        for name in _CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
                PIL.Image.fromarray(pixels).save(root / split / name / f"{i:03}.png")


def arguments(root: Path, run: Path, **changes: object) -> list[str]:
    """Return the arguments of `main.py` that train the two layers on a folder of images."""
    fields = {
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "optimizer.learning_rate": 0.01,
        **{f"data.{name}": value for name, value in _of_data(root).items()},
        **changes,
    }
    return [
        f"--config={ROOT / 'configs' / 'supervised.py'}:smoke",
        f"--workdir={run}",
        f"--student={Path(__file__).with_name('layers.py')}:Layers",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def _of_data(root: Path) -> dict[str, object]:
    # Without threads files are opened in the order of the batches.
    sizes = {"image_size": SIDE, "eval_resize": SIDE}
    return {"source": "imagefolder", "root": str(root), "labels_per_class": None, "threads": 0, **sizes}


def _together(folder: Path, count: int) -> Hosts:
    announce(f"{count} processes")
    run, root = folder / f"run{count}", folder / "images"
    crowd = Crowd(folder / f"crowd{count}", count, *arguments(root, run))
    began = time.monotonic()
    crowd.wait_until(lambda: _bytes(run / "metrics.jsonl"), "its first row")
    started = time.monotonic() - began
    ended = crowd.ended()
    if failed := [i for i, of in enumerate(ended) if of.code]:
        said = "\n".join(f"process {i} ended with {ended[i].code}: {crowd.said(i)[-500:]}" for i in failed)
        raise RuntimeError(f"of {count} processes {len(failed)} failed:\n{said}")
    touched = [crowd.touched(i) for i in range(count)]
    train, val = _pipelines(root)
    read = [[t.path for t in of if t.what == "open" and t.path.startswith(str(root))] for of in touched]
    wrong = [*_read_wrongly(read, train, val), *_written_wrongly(touched, run)]
    checkpoint = folders.last(run)
    of_arrays = [list(_arrays_of(checkpoint, i)) for i in range(count)]
    sizes = [sum(map(_bytes, files)) for files in of_arrays]
    merged = {path for files in of_arrays for path in files}
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    return Hosts(
        processes=count,
        wrong=wrong,
        images=len(train.source) // count,
        touched=_before_first_batch(touched[-1], root, _share(train, count, count - 1)[0]),
        files=len(files),
        arrays=sum(sizes),
        others=sum(_bytes(path) for path in files if path not in merged),
        shares=(min(sizes) / sum(sizes), max(sizes) / sum(sizes)),
        started=started,
        seconds=float(np.median([of.seconds for of in ended])),
    )


def _pipelines(root: Path) -> tuple[Pipeline, Pipeline]:
    """Return what one process alone would read."""
    config: ConfigDict = supervised.get_config("smoke")
    config.batch_size = BATCH
    config.data.update(_of_data(root))
    return open_pipeline(config, "train"), open_pipeline(config, "val")


def _share(pipeline: Pipeline, count: int, index: int) -> list[str]:
    """Return the images that a process is to read, in order."""
    batches = [
        pipeline.names(epoch, step) for epoch in range(EPOCHS) for step in range(pipeline.steps_per_epoch)
    ]
    return [name for batch in batches for name in np.split(np.array(batch), count)[index].tolist()]


def _read_wrongly(read: Sequence[Sequence[str]], train: Pipeline, val: Pipeline) -> Iterator[str]:
    """Yield which processes read others than their own rows of every batch, in order."""
    for index, paths in enumerate(read):
        for pipeline, part in ((train, "/train/"), (val, "/val/")):
            mine = _share(pipeline, len(read), index)
            found = [path for path in paths if part in path]
            # The first process looks at some before, for its picture.
            if found[-len(mine) :] != mine or (index and len(found) != len(mine)):
                yield f"process {index} read {len(found)} of {part}, {len(mine)} are its own"


def _written_wrongly(touched: Sequence[Sequence[Touched]], run: Path) -> Iterator[str]:
    """Yield what was written by others than it must be."""
    for index, of in enumerate(touched[1:], 1):
        files = {t.path.removeprefix(f"{run}/") for t in of if t.writes and t.path.startswith(str(run))}
        if others := {path for path in files if not path.startswith("checkpoints/")}:
            yield f"process {index} wrote {', '.join(sorted(others))}"
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    if sorted(set(lines)) != list(range(1, EPOCHS * STEPS + 1)) or len(lines) != EPOCHS * (STEPS + 1):
        yield f"rows of steps {lines}"


def _arrays_of(checkpoint: Path, index: int) -> Iterator[Path]:
    """Yield the files of arrays that a process wrote."""
    yield from (path for path in checkpoint.glob(f"*/ocdbt.process_{index}/d/*"))


def _before_first_batch(touched: Sequence[Touched], root: Path, first: str) -> int:
    """Return how many folders and files of the data a process touched before its first image."""
    of_data = [t for t in touched if t.path.startswith(str(root))]
    return [t.path for t in of_data].index(first)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
