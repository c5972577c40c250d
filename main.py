"""Distil a network: `python main.py --config configs/r18_r34.py`; without a config, a demonstration."""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tat_jax" / "xla"
_DEMO = Path(__file__).parent / "configs" / "digits.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment, as in configs/r18_r34.py; :smoke after it is its miniature. By default a demonstration.",
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


def main(arguments: list[str]) -> None:
    """Run the experiment that the flags name."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}; flags begin with --")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name)

    import jax  # this and all below after the flags, so that --help answers at once

    from tat_jax import check, evaluate, sharding, study, train

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # leave at once; a training catches the first
    jax.config.update("jax_compilation_cache_dir", str(_CACHE))
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
            print(f"\n{study.run(_CONFIG.value, workdir)}\n")
        else:
            evaluations = train.run(_CONFIG.value, workdir)
            if jax.process_index() == 0:
                for which, row in evaluations.items():
                    accuracy = f"top-1 {row['eval/top1']:.2%}  top-5 {row['eval/top5']:.2%}"
                    print(f"{which:4}  epoch {row['epoch']:3}  {accuracy}")
        if jax.process_index() == 0:
            print(f"run folder {workdir}, picture {workdir / 'curves.png'}")
    except train.Interrupted as stopped:
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


def _run_config(workdir: Path) -> ConfigDict:
    """Return the config of the run in `workdir`, unless --config names another."""
    kept = workdir / "config.json"
    if config_flags.get_config_filename(flags.FLAGS["config"]) == str(_DEMO) and kept.exists():
        return ConfigDict(json.loads(kept.read_text()))
    return _CONFIG.value


def _parse_flags(arguments: list[str]) -> list[str]:
    """Parse the flags, or say in a line or two which one is wrong and what may have been meant."""
    if not any(argument.lstrip("-").split("=")[0] == "config" for argument in arguments[1:]):
        arguments = [arguments[0], f"--config={_DEMO}", *arguments[1:]]
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        sys.exit(f"error: {str(error).strip().splitlines()[-1].strip()}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # config_flags wraps the ConfigDict's own message in other exceptions.
        message: object = error
        while isinstance(message, Exception) and message.args:
            message = message.args[0]
        sys.exit(f"error: {message}")


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)  # Orbax reports every step of every save, and prints what it raises
    app.run(main, flags_parser=_parse_flags)
