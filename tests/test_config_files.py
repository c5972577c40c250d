"""Files of experiments: what is wrong with one is said in a line, with its place."""

import pytest

from tat_jax import config_files
from tat_jax.configs import r18_r34


@pytest.fixture
def mine(tmp_path):
    """Return a function that writes a config's file, and returns its name with an argument."""

    def write(text, argument=""):
        (tmp_path / "mine.py").write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"{tmp_path / 'mine.py'}{argument}"

    return write


BASE = "from tat_jax.configs import base\n"


@pytest.mark.parametrize(
    ("text", "argument", "answer"),
    [
        (
            "def get_config():\n    pass\n",
            "",
            r"get_config\(\) returns nothing, and must return a ConfigDict",
        ),
        (
            "def get_config():\n    return {'epochs': 1}\n",
            "",
            r"returns a dict, and must return a ConfigDict",
        ),
        ("def get_config():\n    pass\n", ":smoke", r"get_config\(\) does not take the argument 'smoke'"),
        (
            "def get_config(size):\n    pass\n",
            "",
            r"get_config\(size\) does not take no argument, as .*:ARGUMENT",
        ),
        ("def get_confg():\n    pass\n", "", r"mine.py has no function get_config$"),
        ("", "", r"mine.py has no function get_config$"),
        ("import nothing_of_the_kind\n", "", r"mine.py, line 1: ModuleNotFoundError: No module named"),
        ("def get_config(:\n", "", r"mine.py, line 1: invalid syntax$"),
        ("\nx = [\n", "", r"mine.py, line 2: '\[' was never closed"),
        (b"\x00\xff", "", r"mine.py, line .*"),
        (
            f"{BASE}def get_config():\n    return base.base().lr\n",
            "",
            r"mine.py, line 3: AttributeError: .*lr",
        ),
        (f"{BASE}def get_config():\n    return {{}}['lr']\n", "", r"mine.py, line 3: KeyError: 'lr'"),
        (
            f"{BASE}def get_config():\n    return base.finish(base.base(), 'big')\n",
            "",
            r"line 3: the config takes",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(text, argument, answer, mine):
    with pytest.raises(ValueError, match=answer) as error:
        config_files.load(mine(text, argument))
    assert "\n" not in str(error.value)
    assert "mine.py" in str(error.value)


@pytest.mark.parametrize(
    ("config", "answer"),
    [
        ("nothing.py", "no file nothing.py"),
        (".", "no config '.'"),
        ("./", "is a folder; --config takes a file, and --workdir the folder of a run"),
        ("gs://bucket/mine.py", "gs://bucket/mine.py is not on a disk of this machine; mount a bucket first"),
        ("~nobody-of-this-name/mine.py", "no such home folder"),
        ("r18_r34:smok", "the config takes the argument 'smoke' or none, not 'smok'"),
        ("nothing.yaml", "nothing.yaml is missing"),
    ],
)
def test_what_is_no_file_of_an_experiment_is_told(config, answer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=answer):
        config_files.load(config)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\xff", b"a: [1", b"- 1\n", b"just words"])
def test_a_yaml_that_is_damaged_is_told(content, tmp_path):
    (tmp_path / "damaged.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.yaml"):
        config_files.load(str(tmp_path / "damaged.yaml"))


def test_a_file_gives_its_config_to_which_no_field_is_added(mine):
    config = config_files.load(mine("from tat_jax.configs.r18_r34 import get_config\n", ":smoke"))
    assert config.to_dict() == r18_r34.get_config("smoke").to_dict()
    with pytest.raises(AttributeError):
        config.of_no_kind = 1


@pytest.mark.parametrize("named", ["~/mine.py", "$CONFIGS/mine.py"])
def test_home_and_variables_are_found_in_every_path_also_of_a_study(named, monkeypatch, mine, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch")
    mine(
        "from tat_jax.configs import digits\n"
        "def get_config():\n"
        "    config = digits.get_config()\n"
        "    config.data.root = '~/images'\n"
        "    config.teacher.weights = '${SCRATCH}/run'\n"
        "    config.study.teacher.student.weights = '~/run'\n"
        "    return config\n"
    )
    monkeypatch.setenv("CONFIGS", str(tmp_path))
    config = config_files.load(named)
    config_files.expand_paths(config)
    assert config.data.root == str(tmp_path / "images")
    assert config.teacher.weights == "/scratch/run"
    assert config.study.teacher.student.weights == str(tmp_path / "run")


def test_the_config_of_a_run_is_taken_up_by_its_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": false}')
    with pytest.raises(ValueError, match=f"without --config, by --workdir {tmp_path}$"):
        config_files.load(str(tmp_path / "config.json"))
