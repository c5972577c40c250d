"""Distil a network: `python main.py --config configs/r18_r34.py`; without a config, a demonstration."""

import json
import os
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tat_jax" / "xla"
_DEMO = Path(__file__).parent / "configs" / "digits.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config", str(_DEMO), "The experiment, as in configs/r18_r34.py; :smoke after it is its miniature."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<name of the config> if not given.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or evaluate a network.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "What --mode eval evaluates: best or last of the run, or a folder of weights."
)


def main(arguments: list[str]) -> None:
    """Run the experiment that the flags name."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown argument {arguments[1]!r}; flags begin with --")
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = Path(_WORKDIR.value or Path("runs") / name)

    import jax  # these after the flags, so that --help answers at once

    from tat_jax import evaluate, sharding, study, train

    jax.config.update("jax_compilation_cache_dir", str(_CACHE))
    sharding.start_processes()
    if _MODE.value == "eval":
        print(evaluate.run(_run_config(workdir), workdir, _CHECKPOINT.value))
    elif "study" in _CONFIG.value:
        print(
            f"\n{study.run(_CONFIG.value, workdir)}\n\nrun folder: {workdir}   picture: {workdir}/curves.png"
        )
    else:
        result = train.run(_CONFIG.value, workdir)
        for which, row in result.items():
            print(
                f"{which:5} epoch {row['epoch']}: top-1 {row['eval/top1']:.2%}  top-5 {row['eval/top5']:.2%}"
            )
        print(f"run folder: {workdir}")


def _run_config(workdir: Path) -> ConfigDict:
    """Return the config of the run in `workdir`, unless --config names another."""
    kept = workdir / "config.json"
    if flags.FLAGS["config"].using_default_value and kept.exists():
        return ConfigDict(json.loads(kept.read_text()))
    return _CONFIG.value


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # Orbax tells every step of every save
    app.run(main)
