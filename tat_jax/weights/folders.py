"""Where networks lie: in folders of converted weights, and in the checkpoints of runs."""

import json
from pathlib import Path

from tat_jax.weights.orbax_quiet import try_to_read
from tat_jax.weights.store import read_sealed


def network_folder(folder: Path, architecture: str = "ARCHITECTURE") -> Path:
    """Return where the network of a folder of converted weights, or the best one of a run, lies.

    Raises:
        FileNotFoundError: `folder` is neither.
        NotADirectoryError: it is a file, as those are that can be converted.
    """
    folder = Path(folder)
    if folder.is_file():
        to = Path("weights") / folder.name.partition(".")[0]
        raise NotADirectoryError(
            f"{folder} is a file, not a folder of converted weights; make one with: "
            f"python -m tat_jax.convert {architecture} --from {folder} --to {to}, and name {to} instead"
        )
    return folder if is_network(folder) else best(folder)


def is_network(folder: Path) -> bool:
    """Return whether a folder holds a network itself, as converted weights and checkpoints do."""
    return (folder / "student").is_dir()


def best(run: Path) -> Path:
    """Return the checkpoint of a run whose evaluation was best, that is whose first measure is highest.

    Raises:
        FileNotFoundError: the run has no evaluated checkpoint.
        ValueError: one of its checkpoints cannot be read.
    """
    evaluated = []
    for step in _existing(run):
        folder = checkpoints(run) / str(step)
        metrics, wrong = try_to_read(read_evaluation, folder)
        if wrong:
            raise ValueError(
                f"cannot read {folder}: {wrong}; the command that trains sets it aside, and "
                "--checkpoint=FOLDER evaluates another one"
            )
        if metrics:
            evaluated.append((first(metrics), step))
    if not evaluated:
        raise FileNotFoundError(f"no checkpoint in {run} has been evaluated yet")
    return checkpoints(run) / str(max(evaluated)[1])


def last(run: Path) -> Path:
    """Return the newest checkpoint of a run.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    return checkpoints(run) / str(_existing(run)[-1])


CHOICES = {"best": best, "last": last}  # of a run's checkpoints


def checkpoints(run: Path) -> Path:
    """Return the folder in which each checkpoint of a run has a folder named by its step."""
    return Path(run) / "checkpoints"


def steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints that are whole, rising; others have longer names until they are."""
    folder = checkpoints(run)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _existing(run: Path) -> list[int]:
    found = steps(run)
    if found:
        return found
    below = sorted(
        str(path.parent) for depth in ("*", "*/*") for path in Path(run).glob(f"{depth}/checkpoints")
    )
    if below:
        raise FileNotFoundError(f"{run} holds several runs; name one of them: {', '.join(below)}")
    raise FileNotFoundError(f"no checkpoint in {run}: train one with main.py --workdir {run}")


def first(metrics: dict[str, float]) -> float:
    """Return the first of an evaluation's measures, by which a checkpoint is the best."""
    return next(iter(metrics.values()))


def read_evaluation(folder: Path) -> dict[str, float] | None:
    """Return the metrics of a checkpoint, if it has been evaluated.

    Raises:
        ValueError: they are not those that were written.
    """
    metrics = read_sealed(folder / "data")["metrics"]
    path = folder / "metrics" / "metrics"  # by which Orbax finds the best
    written = json.loads(path.read_text()) if path.exists() else None
    if json.dumps(written) != json.dumps(metrics):  # as text, for the order counts, and NaN is no NaN
        raise ValueError("its metrics are not those that were written")
    return metrics
