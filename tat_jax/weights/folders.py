"""Where networks lie: in folders of converted weights, and in the checkpoints of runs."""

import json
from collections.abc import Callable
from pathlib import Path

from tat_jax.weights.orbax_quiet import try_to_read
from tat_jax.weights.store import EMA, read_sealed

OF_EMA = "ema_"  # before the names of the measures of a moving average


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
    """Return whether a folder holds a network itself: converted weights, a checkpoint, a moving average."""
    return (folder / "student").is_dir() or (folder.name == EMA and (folder.parent / "student").is_dir())


def best(run: Path) -> Path:
    """Return the checkpoint of a run whose evaluation was best, that is whose first measure is highest.

    Raises:
        FileNotFoundError: the run has no evaluated checkpoint.
        ValueError: one of its checkpoints cannot be read.
    """
    return _best(run, first)


def best_ema(run: Path) -> Path:
    """Return the moving average whose evaluation was best; as `best` of the student.

    Raises:
        FileNotFoundError: the run has no evaluated checkpoint, or keeps no average.
        ValueError: one of its checkpoints cannot be read.
    """
    return _ema_of(_best(run, first_of_ema))


def last_ema(run: Path) -> Path:
    """Return the moving average of the newest checkpoint of a run.

    Raises:
        FileNotFoundError: the run has no checkpoint, or keeps no average.
    """
    return _ema_of(last(run))


def _ema_of(checkpoint: Path) -> Path:
    if not (checkpoint / EMA).is_dir():
        run = checkpoint.parents[1]
        raise FileNotFoundError(f"{run} keeps no moving average: it was trained without ema_decay")
    return checkpoint / EMA


def _best(run: Path, measure: Callable[[dict[str, float]], float]) -> Path:
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
            evaluated.append((measure(metrics), step))
    if not evaluated:
        raise FileNotFoundError(f"no checkpoint in {run} has been evaluated yet")
    return checkpoints(run) / str(max(evaluated)[1])


def last(run: Path) -> Path:
    """Return the newest checkpoint of a run.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    return checkpoints(run) / str(_existing(run)[-1])


# Of a run's checkpoints: its student, or the moving average beside it.
CHOICES = {"best": best, "last": last, "best_ema": best_ema, "last_ema": last_ema}


def checkpoints(run: Path) -> Path:
    """Return the folder in which each checkpoint of a run has a folder named by its step."""
    return Path(run) / "checkpoints"


def run_of(network: Path) -> Path:
    """Return the run in whose checkpoints a network lies, student or average; any other as it is."""
    checkpoint = network.absolute().parent if network.name == EMA else network.absolute()
    return checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else network


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


def first_of_ema(metrics: dict[str, float]) -> float:
    """Return likewise that of the moving average; the student's own where none was evaluated."""
    return metrics.get(f"{OF_EMA}{next(iter(metrics))}", first(metrics))


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
