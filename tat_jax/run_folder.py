"""A run's folder: one run at a time works in it, and its config says what may continue there."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax
from ml_collections import ConfigDict

from tat_jax import buckets
from tat_jax.buckets import Place
from tat_jax.fields import Field, Fields, defaults, find, renew
from tat_jax.losses import kd_weights

CHECK = "check.png"  # a picture by --mode check, beside which a folder counts as empty
_LOCK = "lock"


class BusyError(ValueError):
    """Another run is at work in the folder."""


@contextmanager
def only_run(folder: Path) -> Iterator[Callable[[], None]]:
    """Make the run's folder, keep other runs out of it, and yield a check that it is still there.

    Raises:
        OSError: it cannot be written, its disk is full, or it was moved or deleted.
        BusyError: another run is at work in it.
    """
    try:
        with _lock(folder) if jax.process_index() == 0 else contextlib.nullcontext(lambda: True) as is_there:

            def check_is_there() -> None:
                if not is_there():
                    raise OSError(
                        f"{folder} was moved or deleted while its run was at work: nothing more is saved"
                    )

            try:
                yield check_is_there
            except OSError:
                check_is_there()
                raise
    except OSError as error:
        # What comes of writing to an open file does not name it.
        is_of_folder = error.filename is None or _concerns(error.filename, folder)
        is_of_writing = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)
        if not (is_of_folder and is_of_writing):
            raise
        raise OSError(
            f"cannot write in {folder}: {error.strerror}; make room there, and run the same command again, "
            "or choose another --workdir"
        ) from error


def _concerns(path: Any, folder: Path) -> bool:
    """Return whether what an OSError names lies in the folder or on the way to it; others may begin alike."""
    if not isinstance(path, str | bytes | os.PathLike):  # the number of an open file
        return False
    named, here = Path(os.path.abspath(os.fsdecode(path))), Path(os.path.abspath(folder))
    return named.is_relative_to(here) or here.is_relative_to(named)


@contextmanager
def _lock(folder: Path) -> Iterator[Callable[[], bool]]:
    """Make and lock a folder, and yield whether its path still leads to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            _take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"another run is at work in {folder}; choose another --workdir") from None
        locked = os.open(folder, os.O_RDONLY)

        def is_there() -> bool:
            try:
                return os.path.samestat(os.fstat(locked), folder.stat())
            except OSError:
                return False

        try:
            yield is_there
        finally:
            if not is_there():
                _remove_remade(folder)
            os.close(locked)


def _take(file: IO[str], operation: int) -> None:
    """Lock a file; the system lets go of it with the process, whatever ends that."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # not every disk has locks
            raise


def is_busy(folder: Path) -> bool:
    """Return whether a run is at work in a folder, which need not exist."""
    try:
        with (folder / _LOCK).open("r+") as file:
            _take(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Make a folder, and wait until no other process is within this, for what takes a moment."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        _take(file, fcntl.LOCK_EX)
        yield


def _remove_remade(folder: Path) -> None:
    """Remove what Orbax made anew of a folder that was moved while it saved; a run would continue from it."""
    for _ in range(10):  # two seconds, in which the writes that it abandoned come to their end
        if folder.is_dir() and [path.name for path in folder.iterdir()] == ["checkpoints"]:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.2)


def changes(config: ConfigDict, folder: Place, fields: Fields) -> list[str]:
    """Return how the config differs from the one that lies in the run's folder, a line each.

    Raises:
        ValueError: the run cannot continue with it; every field that hinders is named.
    """
    kept = read_config(folder, fields)
    if kept is None:
        return []
    old, now = (_flat(json.loads(c.to_json()), fields) for c in (kept, config))
    taken: list[str] = []
    refused: list[str] = []
    for name in sorted(old.keys() | now.keys()):
        field = find(fields, name)
        before, after = (
            values[name] if name in values else _unsaid(name, field, values) for values in (old, now)
        )
        if before != after:
            keep = f"; --config.{name}={before} keeps it" if field and field.none_is else ""
            line = f"{name}: {before} there, {after} now{keep}"
            (taken if _may_change(field, before, after) else refused).append(line)
    if refused:
        head = f"{folder} holds a run of another config; choose another --workdir:"
        raise ValueError("\n  ".join([head, *refused]))
    return taken


def _flat(values: Mapping[str, Any], fields: Fields, prefix: str = "") -> dict[str, Any]:
    """Return the value of each field by its dotted name, or what its None stands for.

    One that holds a mapping stays whole.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        field = find(fields, prefix + name)
        if isinstance(value, Mapping) and field is None:
            flat |= _flat(value, fields, f"{prefix}{name}.")
        else:
            derive = field and value is None and field.none_is
            flat[prefix + name] = derive(values) if derive else value
    return flat


def _unsaid(name: str, field: Field | None, values: Mapping[str, Any]) -> Any:
    """Return, as JSON has it, the value of a field that a config lacks: it came later, or is optional."""
    if field and field.none_is and isinstance(field.default, type):
        above = name.removesuffix(name.rpartition(".")[2])
        beside = {path.removeprefix(above): v for path, v in values.items() if path.startswith(above)}
        return field.none_is(beside)
    if field is None or isinstance(field.default, type):
        return None
    return json.loads(json.dumps(field.default))


def _may_change(field: Field | None, before: Any, after: Any) -> bool:
    may_change = field is not None and field.may_change
    return may_change if isinstance(may_change, bool) else may_change(before, after)


def read_config(folder: Place, fields: Fields) -> ConfigDict | None:
    """Return the config with which the run or study in a folder was trained last; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "config.json"
    try:
        text = buckets.read(folder, "config.json")
    except FileNotFoundError:
        return None
    config = defaults(fields)
    try:
        said = json.loads(text)
        if of_study := said.pop("study", None):
            config.study = ConfigDict(of_study)  # which sorts what it holds
            for name in {"students", "teachers"} & of_study.keys():
                config.study[name] = ConfigDict(of_study[name], sort_keys=False)
        said = said if "losses" in said else _with_losses(said)
        renew(fields, said)
        with config.ignore_type():  # None stands for values of any type
            config.update(said)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged; remove it, and the run continues with the config at hand"
        ) from None
    return config


def _with_losses(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says that was written before losses were a list: under `loss` and `tat`."""
    loss = said["loss"]
    temperature = loss["temperature"]
    # With T = 1: the weight of a loss that has the factor T² in itself, but where α = 0 left it out.
    cross_entropy, kd = kd_weights(loss["alpha"], loss["beta"], 1.0)
    losses = {
        "cross_entropy": {"weight": cross_entropy},
        "kd": {"weight": kd if loss["alpha"] else kd / temperature**2, "temperature": temperature},
        "tat": said["tat"],
    }
    return {name: value for name, value in said.items() if name not in ("loss", "tat")} | {"losses": losses}


def write_config(config: ConfigDict, folder: Path, step: int, *, changed: bool) -> None:
    """Write the config into the run's folder, and keep one with which the run came to `step`."""
    if jax.process_index() != 0:
        return
    path = folder / "config.json"
    if changed:
        (folder / f"config_until_step{step}.json").write_text(path.read_text())
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(json.loads(config.to_json()), indent=2) + "\n")
    temporary.replace(path)  # at once, for other processes may be reading
