"""Distil a network: `tat-jax --config r18_r34`, which is `python main.py --config configs/r18_r34.py`."""

import difflib
import faulthandler
import os
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict

from tat_jax import buckets, config_files, failures, outputs, overrides, paths, signals
from tat_jax.buckets import Bucket, Place

_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "The experiment: a name as r18_r34, a file as configs/r18_r34.py, or a YAML of the published code; "
    ":smoke after it is its miniature. By default that of the run in --workdir, else a demonstration.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run, on a disk or in a bucket, gs:// or s3://; runs/<name of the config> if not given.",
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "check", "predict"],
    "Train, evaluate a network, check all that a training needs, or predict the images of a folder.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "best",
    "What --mode eval and predict take: best or last of the run, best_ema or last_ema of its moving average, "
    "or a folder of weights.",
)
_IMAGES = flags.DEFINE_string("images", None, "The folder of images that --mode predict predicts.")
_OUT = flags.DEFINE_string("out", None, "The folder where --mode predict writes: a table, or label maps.")
_OWN = {
    which: flags.DEFINE_string(
        which,
        None,
        f"A {which} of your own: FILE.py:FUNCTION, called with num_classes and rngs, or a class.",
    )
    for which in ("student", "teacher")
}
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "With --mode check: a pod of TPUs, as v5e:8x8, for which the steps are compiled; it need not be there.",
)
_PRICE = flags.DEFINE_float("price", None, "With --topology: US$ an hour for a chip.", lower_bound=0.0)
_OF_NETWORKS = ("eval", "predict")  # the modes that take a network as it is
_OVERRIDES: list[overrides.Override] = []


class Experiment(NamedTuple):
    """What a command is about.

    Attributes:
        config: of the experiment.
        folder: of its run.
        origin: a line that says whose config it is, where the command line does not.
    """

    config: ConfigDict
    folder: Place
    origin: str


def start() -> None:
    """Run the command line of this process."""
    outputs.keep()
    signals.act_at_once()
    logging.set_verbosity(logging.FATAL)  # Orbax reports every step of every save, and prints what it raises
    app.run(main, flags_parser=parse_flags)


def main(_: list[str]) -> None:
    """Run the experiment that the flags name."""
    processes = 1
    try:
        experiment = read_experiment()

        import jax  # this and all below after the flags, so that mistakes in them are answered at once

        from tat_jax import program_cache, sharding

        if _TOPOLOGY.value is None:
            sharding.start_processes()
        else:
            jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is touched
        sharding.find_devices()
        processes = jax.process_count()
        if processes > 1:
            faulthandler.disable()  # JAX aborts the processes that outlive one, and says so
        if jax.process_index() == 0:
            for line in (*filter(None, [experiment.origin]), *_unread()):
                print(line, file=sys.stderr)
        if _TOPOLOGY.value is None:  # of devices that are not here JAX cannot read what it has kept
            program_cache.open_cache()
        _run(experiment)
    except signals.Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except FloatingPointError as error:  # the same in every process
        sys.exit(f"error: {error}")
    except Exception as error:
        logging.debug("in full:", exc_info=error)  # shown with --verbosity=1
        said = failures.explain(error, processes=processes)
        if said is None:
            raise
        _leave(f"error: {said}")


def parse_flags(arguments: list[str]) -> list[str]:
    """Parse the flags, or say in a line which one is wrong and what may have been meant."""
    try:
        from tat_jax import variants

        if {"--help", "-help", "-h", "-?"} & set(arguments[1:]):
            print(_help())
            sys.exit(0)
        expanded = flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
        others, _OVERRIDES[:] = overrides.split(expanded, variants.OVERRIDES)
        left = flags.FLAGS(others)[1:]
        if left:
            raise ValueError(f"unknown argument {left[0]!r}; flags begin with --")
        if _MODE.value in _OF_NETWORKS:
            _checkpoint()
            if _OWN["teacher"].value is not None:
                raise ValueError(
                    f"--teacher is for a training; --mode {_MODE.value} takes one network, --student"
                )
        elif flags.FLAGS["checkpoint"].present:
            raise ValueError(
                "--checkpoint is for --mode eval and predict; a training starts from "
                "--config.student.weights=FOLDER"
            )
        _check_topology()
        _prediction()
    except flags.UnrecognizedFlagError as error:
        sys.exit(f"error: {_unknown_flag(error)}")
    except (flags.Error, ValueError, ImportError) as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
    return arguments[:1]


def _check_topology() -> None:
    """Raise a ValueError where the flags of a pod cannot be meant."""
    if _TOPOLOGY.value is None:
        if _PRICE.value is not None:
            raise ValueError("--price is that of a chip of --topology, which is not given")
        return
    if _MODE.value != "check":
        raise ValueError("--topology is for --mode check; a training on a pod is started on its hosts")
    from tat_jax import topology

    topology.check_name(_TOPOLOGY.value)


def _prediction() -> tuple[Path, Path] | None:
    """Return the folders of the images to predict and of what is predicted; None in another mode.

    Raises:
        ValueError: the flags cannot be meant.
    """
    given = {flag.name: flag.value for flag in (_IMAGES, _OUT)}
    if _MODE.value != "predict":
        if unread := [name for name, value in given.items() if value is not None]:
            raise ValueError(
                f"--{unread[0]} is for --mode predict; the images of others are --config.data.root"
            )
        return None
    for name, what in (("images", "of the images"), ("out", "where predictions go")):
        if not given[name]:
            raise ValueError(f"--mode predict needs --{name}, the folder {what}")
    images, out = (paths.local(value or "") for value in given.values())
    if not images.is_dir():
        raise ValueError(f"--images={images}: there is no such folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out} is a file, and must be the folder where predictions go")
    return images, out


def read_experiment() -> Experiment:
    """Return what the flags name.

    The config is that of --config; without one that of the run in --workdir; where there is none, the
    demonstration. What the command line says of its fields goes before what it says itself.

    Raises:
        ValueError: there is no such config, a field or its value is not allowed, or without --config there
            is something else in the folder than a training may go into or an evaluation needs.
    """
    from tat_jax import experiment, fields, run_folder, variants

    folder, origin = _folder(), ""
    if _CONFIG.value is not None:
        config = config_files.load(_CONFIG.value)
    else:
        run = _run_of(folder)
        config = run_folder.read_config(run, experiment.FIELDS)
        origin = f"without --config: that of the run, {run / 'config.json'}"
        if config is None:
            _check_may_be_demo(run, besides=run_folder.CHECK)
            config = config_files.load(config_files.DEMO)
            origin = f"without --config: the demonstration, {config_files.DEMO}"
    with config.unlocked():
        fields.renew(experiment.FIELDS, config)
    overrides.apply(config, _OVERRIDES, variants.OVERRIDES)
    config_files.expand_paths(config)
    names = [override.name for override in _OVERRIDES]
    trained = variants.names_of_teachers(config) if "study" in config else []
    if "teacher.weights" in names and trained and config.teacher.weights not in trained:
        raise ValueError(
            "--config.teacher.weights does nothing in a study that trains its own, as study.teacher says; "
            "one of your own without that takes the config's, see configs/compare.py"
        )
    return Experiment(config, folder, origin)


def _unread() -> list[str]:
    """Return what of the command line is not read where a network is taken as it is, but may seem to be."""
    names = sorted({override.name for override in _OVERRIDES if override.name.startswith("student.")})
    if _MODE.value not in _OF_NETWORKS or not names:
        return []
    return [f"note: {', '.join(names)}: not read, the network is that of --checkpoint={_checkpoint()}"]


def _folder() -> Place:
    """Return the run's folder: that of the flag, or one of the config's name."""
    if _WORKDIR.value is None:
        return Path("runs") / config_files.name(_CONFIG.value or config_files.DEMO)
    if not _WORKDIR.value:
        raise ValueError("--workdir is empty; it names the folder of the run")
    folder = buckets.place(paths.expand(_WORKDIR.value))
    if isinstance(folder, Path) and folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir={folder} is a file, and must be the folder of the run")
    return folder


def _checkpoint() -> str:
    """Return the network that is to be evaluated, or to predict."""
    from tat_jax.weights import folders

    which = _CHECKPOINT.value
    if which in folders.CHOICES:
        return which
    place = buckets.place(paths.expand(which)) if which else None
    if place is None or (isinstance(place, Path) and not place.exists()):
        raise ValueError(
            f"--checkpoint={which}: there is no such folder; {', '.join(folders.CHOICES)}, weights or a run "
            "is taken"
        )
    return str(place)


def _run_of(folder: Place) -> Place:
    """Return the folder whose config counts: of an evaluation of a checkpoint alone, that of its run."""
    from tat_jax.weights import folders

    if _MODE.value not in _OF_NETWORKS or _WORKDIR.value is not None or _checkpoint() in folders.CHOICES:
        return folder
    place = buckets.place(_checkpoint())
    return place if isinstance(place, Bucket) else folders.run_of(place)


def _check_may_be_demo(folder: Place, *, besides: str) -> None:
    """Raise a ValueError where the demonstration can hardly be meant: there is no run, or something else."""
    if isinstance(folder, Bucket):
        raise ValueError(f"no run in {folder}: name a config with --config")
    there = sorted({path.name for path in folder.iterdir()} - {besides}) if folder.is_dir() else []
    if _MODE.value in _OF_NETWORKS:
        raise ValueError(f"no run in {folder}: name one with --workdir, or a config with --config")
    if _MODE.value == "train" and there and _WORKDIR.value is not None:
        raise ValueError(
            f"{folder} holds no run, but {', '.join(there[:3])}{' …' * (len(there) > 3)}: name the config "
            "with --config, or another --workdir"
        )


def _run(experiment: Experiment) -> None:
    import jax

    from tat_jax import check, evaluate, predict, study, summary, topology, train

    config, folder, _ = experiment
    student, teacher = (
        None if flag.value is None else config_files.load_builder(flag.value) for flag in _OWN.values()
    )
    if (student or teacher) and "study" in config:
        raise ValueError("--student and --teacher are for one training: those of a study are its config's")
    if _MODE.value == "eval":
        print(evaluate.run(config, folder, _checkpoint(), student=student).report())
    elif folders := _prediction():
        predicted = predict.run(config, folder, _checkpoint(), *folders, student=student)
        if jax.process_index() == 0:
            for line in predicted.skipped:
                print(f"skipped: {line}", file=sys.stderr)
            print(predicted)
    elif _MODE.value == "check":
        pod = None if _TOPOLOGY.value is None else topology.find(_TOPOLOGY.value)
        if not check.run(config, folder, student=student, teacher=teacher, pod=pod, price=_PRICE.value):
            sys.exit(1)
    else:
        if "study" in config:
            report = study.run(config, folder)
        else:
            report = summary.report(config, train.run(config, folder, student=student, teacher=teacher))
        if jax.process_index() == 0:
            print(report)
            print(f"run folder {folder}, picture {folder / 'curves.png'}")
    if _MODE.value in ("eval", "check") and outputs.are_lost():
        sys.exit(1)  # to say what it found was all that it was for


def _leave(message: str) -> NoReturn:
    """End this process at once; an ordinary end waits for other processes, which may wait for this one."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _unknown_flag(error: flags.UnrecognizedFlagError) -> str:
    from tat_jax import experiment, fields

    known = [line.split("=")[0] for line in fields.lines(experiment.FIELDS)]
    meant = [name for name in known if name.split(".")[-1] == error.flagname.split(".")[-1]]
    meant = meant or difflib.get_close_matches(error.flagname, known, n=1)
    hint = f"; did you mean {' or '.join(f'--config.{name}' for name in meant)}?" if meant else ""
    return f"{str(error).strip()}{hint}"


def _help() -> str:
    """Return what the flags are, and every field of a config."""
    from tat_jax import experiment, fields, variants

    every = {**experiment.FIELDS, "study": variants.FIELDS}
    of_config = "\n".join(f"  --config.{line}" for line in fields.lines(every))
    of_flags = flags.FLAGS.module_help(__name__)
    return f"{__doc__}\n{of_flags}\n\nFields of a config, with their defaults:\n{of_config}"
