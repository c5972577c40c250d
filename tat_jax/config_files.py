"""Files of experiments: found by name, by path or through a YAML, and run for their config."""

import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from tat_jax import paths

_CONFIGS = Path(__file__).parent / "configs"
DEMO = str(_CONFIGS / "digits.py")


def parts(config: str) -> tuple[str, str]:
    """Return the file of a config and what follows its colon."""
    file, _, argument = config.partition(":")
    return file, argument


def name(config: str) -> str:
    """Return what a run of a config is called that is not called otherwise."""
    return Path(parts(config)[0]).stem


def find(config: str) -> str:
    """Return the file of a config that may be named, or be a YAML of the published code, with its argument.

    Raises:
        ValueError: there is no config of that name.
    """
    if "://" in config:
        paths.local(config)
    file, argument = parts(config)
    if file.startswith("~") or "$" in file:
        file = str(paths.local(file))
    said = f"{file}:{argument}" if ":" in config else file
    if file.endswith((".yaml", ".yml")):
        return f"{_CONFIGS / 'torchdistill.py'}:{said}"
    if file.endswith(".py") or "/" in file:
        return said
    names = {path.stem for path in _CONFIGS.glob("[!_]*.py")} - {"base", "torchdistill"}
    if file not in names:
        raise ValueError(
            f"no config {file!r}; there are {', '.join(sorted(names))}, and your own, as mine.py"
        )
    return f"{_CONFIGS / file}.py{f':{argument}' if argument else ''}"


def load(config: str) -> ConfigDict:
    """Return the config that the `get_config` of a file returns, to which no field can be added.

    Args:
        config: a file, a name or a YAML; what follows a colon is passed to `get_config`.

    Raises:
        ValueError: there is no such file, or it does not return a config; with its line where it raises.
    """
    found = find(config)
    file = Path(parts(found)[0])
    get_config = getattr(_run(file), "get_config", None)
    if not callable(get_config):
        raise ValueError(f"{file} has no function get_config")
    arguments = [parts(found)[1]] if ":" in found else []
    signature = inspect.signature(get_config)
    try:
        signature.bind(*arguments)
    except TypeError:
        passed = f"the argument {arguments[0]!r}" if arguments else f"no argument, as {file}:ARGUMENT has one"
        raise ValueError(f"{file}: get_config{signature} does not take {passed}") from None
    try:
        made = get_config(*arguments)
    except Exception as error:  # whatever the user's file raises
        raise _raised_in(file, error) from error
    if not isinstance(made, ConfigDict):
        what = "nothing" if made is None else f"a {type(made).__name__}"
        raise ValueError(
            f"{file}: get_config() returns {what}, and must return a ConfigDict, as base.base() is one"
        )
    return made.lock()


def load_builder(named: str) -> Callable[..., Any]:
    """Return the function or the class of a file that builds a network, as `mine.py:build` names it.

    Raises:
        ValueError: there is no such file or function; or, when it is called, what it raises and where.
    """
    name_of_file, _, name = named.rpartition(":")
    if not name_of_file or not name:
        raise ValueError(f"{named!r} names no function: mine.py:build does, of the file mine.py")
    file = paths.local(name_of_file)
    build = getattr(_run(file), name, None)
    if not callable(build):
        raise ValueError(f"{file} has no function {name}")

    def build_or_say(**arguments: Any) -> Any:
        try:
            return build(**arguments)
        except Exception as error:  # whatever the user's function raises
            raise _raised_in(file, error) from error

    return build_or_say


def expand_paths(config: ConfigDict) -> None:
    """Write out the home folder and the variables in every path of a config.

    Raises:
        ValueError: there is no such home folder, or a variable is not set.
    """
    for field, value in config.items():
        if isinstance(value, ConfigDict):
            expand_paths(value)
        elif isinstance(value, str):
            config[field] = paths.expand(value)


def _run(file: Path) -> ModuleType:
    if file.is_dir():
        raise ValueError(f"{file} is a folder; --config takes a file, and --workdir the folder of a run")
    if not file.exists():
        raise ValueError(f"no file {file}")
    if file.suffix == ".json":
        raise ValueError(
            f"{file} is no file of Python; what a run was trained with is taken up without --config, by "
            f"--workdir {file.parent}"
        )
    loader = SourceFileLoader("config_file", str(file))
    spec = spec_from_loader(loader.name, loader)
    assert spec
    module = module_from_spec(spec)
    sys.modules[loader.name] = module  # where dataclasses look for their module
    try:
        loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise _raised_in(file, error) from error
    return module


def _raised_in(file: Path, error: Exception) -> ValueError:
    """Return an error that says what a file raised, and where within it."""
    said = " ".join(str(error).split()) or "raised"
    if isinstance(error, SyntaxError):
        return ValueError(f"{error.filename or file}, line {error.lineno}: {error.msg}")
    if file.parent == _CONFIGS and isinstance(error, ValueError):
        return ValueError(str(error))  # it says by itself what it is about
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return ValueError(f"{file}{f', line {lines[-1]}' if lines else ''}: {kind}{said}")
