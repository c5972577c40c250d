"""The package: its wheel holds what a run needs and nothing else, and a config is found from any folder."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tat_jax import config_files

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted({file.stem for file in CONFIGS.glob("[!_]*.py")} - {"base", "torchdistill"})


def build(kind: str, source: Path, to: Path) -> Path:
    """Build a `wheel` or an `sdist` with the back end itself, which needs no network, and return its file."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", to],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return next(to.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    """Return what each file of a wheel holds; those about it without their folder's name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name.partition(".dist-info/")[2] or name: archive.read(name) for name in archive.namelist()}


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]


def test_the_wheel_holds_the_package_with_its_configs_and_word_lists_and_nothing_else(wheel):
    package = {*(ROOT / "tat_jax").rglob("*.py"), *(ROOT / "tat_jax" / "data").glob("*.txt")}
    ours = {str(file.relative_to(ROOT)) for file in package}
    ours |= {f"tat_jax/configs/{file.name}" for file in CONFIGS.glob("*.py")}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    assert set(contents(wheel)) == ours | about


def test_the_sdist_gives_the_same_wheel(wheel, tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("tat_jax-*")
    assert not (unpacked / "tests").exists()
    assert contents(build("wheel", unpacked, tmp_path / "wheel")) == contents(wheel)


def test_the_wheel_gives_the_command(wheel):
    assert "tat-jax = tat_jax.cli:start" in contents(wheel)["entry_points.txt"].decode()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_dependency_has_a_lower_bound_and_one_version_within_it(wheel, python):
    pins = [Requirement(line) for line in lines(ROOT / "constraints.txt")]
    environment = {"python_version": python, "extra": ""}
    for line in message_from_bytes(contents(wheel)["METADATA"]).get_all("Requires-Dist"):
        dependency = Requirement(line)
        (pin,) = (
            pin
            for pin in pins
            if canonicalize_name(pin.name) == canonicalize_name(dependency.name)
            and (pin.marker is None or pin.marker.evaluate(environment))
        )
        (version,) = pin.specifier
        assert dependency.specifier.contains(version.version), f"{line}, but {pin}"
        if dependency.marker is None:
            assert [bound.operator for bound in dependency.specifier] == [">="], line


def test_from_an_unpacked_wheel_ones_own_config_is_found_by_path(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.py").write_text(
        "from tat_jax.configs import base, r18_r34\n"
        "def get_config(argument=''):\n"
        "    config = r18_r34.get_config()\n"
        "    config.epochs = 7\n"
        "    return base.finish(config, argument)\n"
    )
    asked = (
        "import json, sys; from tat_jax import cli\n"
        "cli.parse_flags(sys.argv)\n"
        "config, folder, _ = cli.read_experiment()\n"
        "print(json.dumps([cli.__file__, str(folder), config.epochs, config.bn_group, config.seed]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", asked, "--config=experiments/mine.py", "--config.seed=3"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert json.loads(answer) == [str(tmp_path / "site/tat_jax/cli.py"), "runs/mine", 7, 256, 3]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_config_is_found_by_its_name_from_any_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Path(config_files.find(name)).samefile(CONFIGS / f"{name}.py")


def test_a_name_may_ask_for_the_miniature():
    assert config_files.find("r18_r34:smoke") == f"{config_files.find('r18_r34')}:smoke"


@pytest.mark.parametrize("path", ["mine.py", "mine.py:smoke", "/tmp/mine.py", "configs/r18_r34.py:smoke"])
def test_a_path_stays_as_it_is(path):
    assert config_files.find(path) == path


@pytest.mark.parametrize("yaml", ["tat.yaml", "published/tat.yml", "tat.yaml:smoke"])
def test_a_yaml_goes_to_the_config_that_reads_it(yaml):
    assert (
        config_files.find(yaml) == f"{Path(config_files.find('digits')).with_name('torchdistill.py')}:{yaml}"
    )


@pytest.mark.parametrize("name", ["r18_r35", "r18_r35:smoke", "base", "torchdistill", "__init__", ""])
def test_what_is_no_experiment_is_answered_with_those_there_are(name):
    there_are = f"no config '{name.removesuffix(':smoke')}'; there are {', '.join(EXPERIMENTS)}, .*mine.py"
    with pytest.raises(ValueError, match=there_are):
        config_files.find(name)
