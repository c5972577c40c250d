"""The command line: `tat-jax --config r18_r34`, which is `python main.py --config configs/r18_r34.py`."""

import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tat_jax" / "xla"
_CONFIGS = Path(__file__).parent / "configs"
_DEMO = _CONFIGS / "digits.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment: a name as r18_r34, a file as configs/r18_r34.py, or a YAML of the published code; "
    ":smoke after it is its miniature. By default a demonstration.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<name of the config> if not given.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "check"],
    "Train, evaluate a network, or check all that a training needs.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "What --mode eval evaluates: best or last of the run, or a folder of weights."
)


def start() -> None:
    """Run the command line of this process."""
    logging.set_verbosity(logging.FATAL)  # Orbax reports every step of every save, and prints what it raises
    app.run(main, flags_parser=_parse_flags)


def main(arguments: list[str]) -> None:
    """Run the experiment that the flags name."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}; flags begin with --")

    import jax  # this and all below after the flags, so that --help answers at once

    from tat_jax import check, evaluate, sharding, signals, study, train

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # leave at once; a training catches the first
    jax.config.update("jax_compilation_cache_dir", str(_CACHE))
    workdir = _workdir()
    try:
        sharding.start_processes()
        if jax.process_count() > 1:
            faulthandler.disable()  # JAX aborts the processes that outlive one, and says so
        if _MODE.value == "eval":
            print(evaluate.run(_run_config(workdir), workdir, _CHECKPOINT.value))
            return
        if _MODE.value == "check":
            sys.exit(0 if check.run(_CONFIG.value, workdir) else 1)
        if "study" in _CONFIG.value:
            report = study.run(_CONFIG.value, workdir)
        else:
            report = train.report(_CONFIG.value, train.run(_CONFIG.value, workdir))
        if jax.process_index() == 0:
            print(report)
            print(f"run folder {workdir}, picture {workdir / 'curves.png'}")
    except signals.Interrupted as stopped:
        print(f"{stopped}; the same command continues from there", file=sys.stderr)
        sys.exit(128 + stopped.signal)
    except FloatingPointError as error:  # the same in every process
        sys.exit(f"error: {error}")
    except (ValueError, OSError) as error:
        logging.debug("in full:", exc_info=error)  # shown with --verbosity=1
        print(f"error: {error}", file=sys.stderr)
        sharding.leave(1)
    except jax.errors.JaxRuntimeError as error:
        logging.debug("in full:", exc_info=error)
        print(f"error: {_of_devices(str(error), jax.process_count())}", file=sys.stderr)
        sharding.leave(1)


def _of_devices(message: str, processes: int) -> str:
    """Say what an error that JAX met on the devices may come of."""
    said = message.split("\n")[0]
    if "RESOURCE_EXHAUSTED" in message:
        return f"the devices' memory is full: lower --config.batch_size, or use more devices; {said}"
    if processes > 1:
        return (
            f"lost one of the {processes} processes; see what it says, and run the same command again; {said}"
        )
    return said


def _workdir() -> Path:
    """Return the run's folder: that of the flag, or one of the config's name."""
    file, argument = _parts(config_flags.get_config_filename(flags.FLAGS["config"]))
    named_by = _parts(argument)[0] if file.endswith("torchdistill.py") else file
    return Path(_WORKDIR.value or Path("runs") / Path(named_by).stem)


def _run_config(workdir: Path) -> ConfigDict:
    """Return the config of the run in `workdir`, unless --config names another."""
    from tat_jax import experiment, run_folder

    if config_flags.get_config_filename(flags.FLAGS["config"]) == str(_DEMO):
        return run_folder.read_config(workdir, experiment.FIELDS) or _CONFIG.value
    return _CONFIG.value


def _parts(config: str) -> tuple[str, str]:
    """Return the file of a config and what follows its colon."""
    file, _, argument = config.partition(":")
    return file, argument


def _find(config: str) -> str:
    """Return the file of a config that may be named, or be a YAML of the published code, with its argument.

    Raises:
        ValueError: there is no config of that name.
    """
    file, argument = _parts(config)
    if file.endswith((".yaml", ".yml")):
        return f"{_CONFIGS / 'torchdistill.py'}:{config}"
    if file.endswith(".py") or "/" in file:
        return config
    names = {path.stem for path in _CONFIGS.glob("[!_]*.py")} - {"base", "torchdistill"}
    if file not in names:
        raise ValueError(
            f"no config {file!r}; there are {', '.join(sorted(names))}, and your own, as mine.py"
        )
    return f"{_CONFIGS / file}.py{f':{argument}' if argument else ''}"


def _with_config_found(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the config's file in the place of its name."""
    found, given = [arguments[0]], False
    rest = iter(arguments[1:])
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "config" and name.startswith("-"):
            given = True
            argument = f"--config={_find(value if equals else next(rest, ''))}"
        found.append(argument)
    return found if given else [found[0], f"--config={_DEMO}", *found[1:]]


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parse the flags, or say in a line or two which one is wrong and what may have been meant."""
    if "--help" in arguments[1:]:
        print(_help())
        sys.exit(0)
    try:
        return flags.FLAGS(_with_config_found(arguments))
    except flags.Error as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # config_flags wraps the ConfigDict's own message in other exceptions.
        message: object = error
        while isinstance(message, Exception) and message.args:
            message = message.args[0]
        sys.exit(f"error: {message}")


def _help() -> str:
    """Return what the flags are, and every field of a config."""
    from tat_jax import experiment, fields

    of_config = "\n".join(f"  --config.{line}" for line in fields.lines(experiment.FIELDS))
    of_flags = flags.FLAGS.module_help(__name__)
    return f"{__doc__}\n{of_flags}\n\nFields of a config, with their defaults:\n{of_config}"
