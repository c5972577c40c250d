"""The command line: a mistake is answered in a line or two that name it, never with a stack trace."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from tat_jax import cli, failures, networks, paths, sharding
from tat_jax.configs import base, r18_r34
from tat_jax.weights import store

MAIN = Path(__file__).parents[1] / "main.py"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Work in an empty folder, and leave no flag set."""
    monkeypatch.chdir(tmp_path)
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        yield tmp_path


def read(*arguments):
    """Return the experiment that a command line names, as the command reads it."""
    cli.parse_flags(["main.py", *arguments])
    return cli.read_experiment()


def refusal(*arguments):
    """Return what a command line is answered that cannot be meant."""
    with pytest.raises((ValueError, SystemExit)) as refused:
        read(*arguments)
    return str(refused.value)


def command(*arguments, **environment):
    process = subprocess.run(
        [sys.executable, MAIN, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return process.returncode, process.stderr + process.stdout


def write_run(folder, **changes):
    """Write what says that a folder holds a run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = r18_r34.get_config("smoke")
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(json.loads(config.to_json())))


# What cannot be meant


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batch_sise=3"], "batch_sise is no field; did you mean batch_size?"),
        (["--config.batch_size=many"], "--config.batch_size=many: allowed is a whole number from 1 on"),
        (["--config=r18_r34:smok"], "takes the argument 'smoke' or none, not 'smok'"),
        (["--config=nothing.py"], "no file nothing.py"),
        (["--config="], "no config ''; there are "),
        (["--config"], "Missing value for flag --config"),
        (["--config", "--workdir", "x"], "'x'"),
        (["--config=base"], "no config 'base'"),
        (["--confg=r18_r34"], "Unknown command line flag 'confg'"),
        (
            ["--topology=v5e:8x8"],
            "--topology is for --mode check; a training on a pod is started on its hosts",
        ),
        (
            ["--mode=check", "--topology=v5e-64"],
            "--topology=v5e-64 is no pod of TPUs: it must be a kind of chip",
        ),
        (["--mode=check", "--price=1.2"], "--price is that of a chip of --topology, which is not given"),
        (["--mode=check", "--topology=v5e:8x8", "--price=-1"], "price"),
        (["--learning_rate=1"], "did you mean --config.optimizer.learning_rate?"),
        (["--batch_sise=1"], "did you mean --config.batch_size?"),
        (["--mode=evl"], "value should be one of <train|eval|check|predict>"),
        (["eval"], "unknown argument 'eval'; flags begin with --"),
        (["--", "--mode=eval"], "unknown argument '--mode=eval'"),
        (["--workdir="], "--workdir is empty"),
        (["--workdir=file"], "--workdir=file is a file, and must be the folder of the run"),
        (["--workdir=az://bucket/run"], "az://bucket/run is not on a disk of this machine, or in a bucket"),
        (["--mode=check", "--workdir=gs:/bucket/run"], "gs:/bucket/run is not on a disk of this"),
        (["--workdir=~nobody-of-this-name"], "there is no such home folder"),
        (["--workdir=$NOT_SET_ANYWHERE/run"], "$NOT_SET_ANYWHERE/run: $NOT_SET_ANYWHERE is not set"),
        (["--checkpoint=last"], "--checkpoint is for --mode eval"),
        (
            ["--mode=eval", "--checkpoint="],
            "there is no such folder; best, last, best_ema, last_ema, weights or a run is taken",
        ),
        (
            ["--mode=eval", "--checkpoint=bset"],
            "--checkpoint=bset: there is no such folder; best, last, best_ema, last_ema, weights or a run",
        ),
        (
            ["--mode=eval", "--checkpoint=hdfs://bucket/run"],
            "hdfs://bucket/run is not on a disk of this machine",
        ),
        (["--mode=eval", "--workdir=runs/none"], "no run in runs/none: name one with --workdir"),
        (["--mode=eval", "--checkpoint=folder"], "no run in folder: name one with --workdir"),
        (["--mode=predict", "--out=out"], "--mode predict needs --images, the folder of the images"),
        (
            ["--mode=predict", "--images=folder"],
            "--mode predict needs --out, the folder where predictions go",
        ),
        (["--mode=predict", "--images=none", "--out=out"], "--images=none: there is no such folder"),
        (["--mode=predict", "--images=file", "--out=out"], "--images=file: there is no such folder"),
        (["--mode=predict", "--images=gs://a/b", "--out=out"], "gs://a/b is not on a disk of this machine"),
        (["--mode=predict", "--images=folder", "--out=file"], "--out=file is a file, and must be the folder"),
        (
            ["--mode=predict", "--images=folder", "--out=out"],
            "no run in runs/digits: name one with --workdir",
        ),
        (
            ["--mode=predict", "--images=folder", "--out=out", "--teacher=mine.py:build"],
            "--teacher is for a training; --mode predict takes one network, --student",
        ),
        (["--images=folder"], "--images is for --mode predict"),
        (["--mode=eval", "--out=out"], "--out is for --mode predict"),
        (["--flagfile=nothing"], "nothing"),
    ],
)
def test_a_mistake_is_named_in_a_line(arguments, message, here):
    (here / "file").touch()
    (here / "folder").mkdir()
    said = refusal(*arguments)
    assert message in said
    assert "\n" not in said
    assert {path.name for path in here.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--config.epochs=ten"], {}, "error: --config.epochs=ten: allowed is"),
        (["--config=r18_r34"], {}, "no folder data/imagenet"),
        (
            ["--config=r18_r34:smoke"],
            {"JAX_PLATFORMS": "nonsense"},
            "JAX_PLATFORMS=nonsense, .*there are cpu",
        ),
        (["--config=r18_r34:smoke"], {"JAX_ENABLE_X64": "maybe"}, "error: .*JAX_ENABLE_X64"),
        (
            ["--config=r18_r34:smoke"],
            {"SLURM_NTASKS": "2"},  # as in a shell of salloc
            "error: SLURM_NTASKS=2: .* or alone by: env -u SLURM_NTASKS ",
        ),
    ],
)
def test_the_command_says_what_is_wrong_without_a_stack_trace_and_leaves_nothing(
    arguments, environment, message, here
):
    code, text = command(*arguments, **environment)
    assert code == 1
    assert re.search(message, text)
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) <= 2
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "processes", "answer"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: a\nb"),
            1,
            "memory is full: lower --config.batch_size",
        ),
        (
            jax.errors.JaxRuntimeError("UNKNOWN: Gloo"),
            2,
            "lost one of the 2 processes; .*run the same command",
        ),
        (jax.errors.JaxRuntimeError("INTERNAL: a\nb"), 1, "^INTERNAL: a$"),
        (MemoryError("Unable to allocate 3 GiB"), 1, "memory is full: lower .*Unable to allocate 3 GiB"),
        (OSError(28, "No space left on device", "runs/x"), 1, "^runs/x: No space left on device; make room"),
        (PermissionError(13, "Permission denied", "runs/x"), 1, "^runs/x: Permission denied$"),
        (OSError("nothing more is saved"), 1, "^nothing more is saved$"),
        (ValueError("a config\n  of two lines"), 1, "^a config\n  of two lines$"),
        (ModuleNotFoundError("No module named 'torch'"), 1, "^No module named 'torch'$"),
    ],
)
def test_what_libraries_and_the_machine_refuse_comes_with_what_it_may_come_of(error, processes, answer):
    assert re.search(answer, failures.explain(error, processes=processes))


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("evaluated 3 of 4"), TypeError("x")])
def test_what_may_be_a_fault_of_this_code_keeps_its_stack_trace(error):
    assert failures.explain(error) is None


def test_devices_that_do_not_start_are_told_with_the_way_out(monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu': in use (you may need to uninstall it)\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(OSError, match=r"'tpu': in use; JAX_PLATFORMS=cpu computes without them$"):
        sharding.find_devices()


def test_devices_that_are_asked_for_and_not_there_are_told_with_those_there_are(monkeypatch):
    def fail():
        raise AssertionError  # as JAX does of cuda where no GPU is to be seen

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(OSError, match=r"JAX_PLATFORMS=cuda, of which this machine has none; there are cpu;"):
        sharding.find_devices()


# Whose config it is


def test_without_a_config_it_is_that_of_the_run_with_what_the_command_line_says(here):
    write_run(here / "run", epochs=7, seed=3)
    for mode in ("train", "eval", "check"):
        config, folder, origin = read(
            "--workdir=run", f"--mode={mode}", "--config.epochs=9", "--config.data.root=/nowhere"
        )
        assert (config.epochs, config.seed, config.data.root) == (9, 3, "/nowhere")
        assert (str(folder), origin) == ("run", "without --config: that of the run, run/config.json")


def test_what_an_evaluation_does_not_read_is_told(here):
    write_run(here / "run")
    read("--workdir=run", "--mode=eval", "--config.student.weights=runs/other", "--config.data.root=/nowhere")
    assert cli._unread() == ["note: student.weights: not read, the network is that of --checkpoint=best"]
    flags.FLAGS.unparse_flags()
    read("--workdir=run", "--config.student.weights=runs/other")
    assert cli._unread() == []


def test_a_teacher_that_a_study_would_not_take_is_refused():
    assert refusal("--config=compare", "--config.teacher.weights=runs/teacher").startswith(
        "--config.teacher.weights does nothing in a study that trains its own"
    )


def test_a_config_that_is_named_goes_before_that_of_the_run(here):
    write_run(here / "run", seed=3)
    config, _, origin = read("--workdir=run", "--config=r18_r34")
    assert (config.seed, origin) == (0, "")


def test_a_config_of_ones_own_may_say_a_field_that_was_replaced(here):
    (here / "mine.py").write_text(
        "from tat_jax.configs import r18_r34\n"
        "def get_config():\n"
        "    config = r18_r34.get_config('smoke')\n"
        "    config.losses.tat.layer4.per_teacher_position = True\n"
        "    return config\n"
    )
    tat = read("--config=mine.py").config.losses.tat.layer4
    assert tat.asks == "teacher"
    assert "per_teacher_position" not in tat


@pytest.mark.parametrize("checkpoint", ["run", "run/checkpoints/3"])
def test_an_evaluation_of_a_checkpoint_alone_has_the_config_of_its_run(checkpoint, here):
    write_run(here / "run", seed=3)
    (here / "run" / "checkpoints" / "3").mkdir(parents=True)
    assert read("--mode=eval", f"--checkpoint={checkpoint}").config.seed == 3


def test_without_a_config_and_a_run_it_is_the_demonstration_and_said(here):
    (here / "empty").mkdir()
    for arguments, folder in (
        ([], "runs/digits"),
        (["--workdir=new"], "new"),
        (["--workdir=empty"], "empty"),
    ):
        demo = read(*arguments, "--config.seed=1")
        assert (demo.config.study.seeds, demo.config.seed, str(demo.folder)) == ((0, 1, 2), 1, folder)
        assert demo.origin.startswith("without --config: the demonstration")
        flags.FLAGS.unparse_flags()


def test_the_demonstration_goes_into_no_folder_of_something_else(here):
    (here / "photographs" / "cat").mkdir(parents=True)
    assert refusal("--workdir=photographs").startswith("photographs holds no run, but cat: name the config")
    (here / "checked").mkdir()
    (here / "checked" / "check.png").touch()  # as --mode check leaves it
    assert read("--workdir=checked").origin.startswith("without --config: the demonstration")


@pytest.mark.parametrize("given", [["--config", "r18_r34"], ["--config=r18_r34"], ["-config=r18_r34"]])
def test_a_flag_takes_its_value_either_way_and_the_run_has_the_name_of_the_config(given):
    config, folder, _ = read(*given, "--config.seed=1")
    assert (config.bn_group, config.seed, str(folder)) == (256, 1, "runs/r18_r34")


def test_of_a_flag_that_is_given_twice_the_later_counts():
    config, folder, _ = read("--config=r18_r34", "--workdir=a", "--config=supervised", "--workdir=b")
    assert (config.student.architecture, str(folder)) == ("resnet34", "b")


def test_the_home_folder_is_found_in_every_path(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write_run(here / "run")
    config, folder, _ = read(
        "--mode=eval", "--workdir=~/run", "--checkpoint=~/run", "--config.data.root=~/images"
    )
    assert (folder, config.data.root) == (here / "run", str(here / "images"))


# Where programs are cached


@pytest.mark.parametrize(
    ("named", "home", "folder"),
    [("/cache", "/home/me", "/cache/tat_jax"), ("cache", "/home/me", "/home/me/.cache/tat_jax")],
)
def test_the_cache_lies_in_an_absolute_folder(named, home, folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", home)
    assert paths.cache() == Path(folder)


def test_a_user_without_a_home_folder_has_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor passwd says one
    with pytest.raises(ValueError, match="no home folder"):
        paths.cache()


# The command as a whole


def test_help_names_the_flags():
    code, text = command("--help", PYTHONIOENCODING="ascii")
    assert code == 0
    assert all(
        flag in text for flag in ("--config", "--workdir", "--mode", "--checkpoint", "--config.epochs")
    )


TRAINING = """
    import sys
    from flax import nnx
    from tat_jax import outputs, summary, train
    from tat_jax.configs import r18_r34_ce
    from tests.tiny import Tiny

    outputs.keep()
    config = r18_r34_ce.get_config("smoke")
    config.epochs = 2
    config.data.update({"image_size": 16, "eval_resize": 16})
    evaluations = train.run(config, sys.argv[1], student=Tiny(2, classes=10, rngs=nnx.Rngs(0)))
    print(summary.report(config, evaluations))
"""


def test_a_run_whose_outputs_are_lost_is_trained_evaluated_and_saved(here):
    with open("/dev/full", "w") as full:
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(TRAINING), here / "run"],
            cwd=MAIN.parent,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
            stdout=full,
            stderr=full,
            timeout=300,
            check=True,
        )
    rows = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["epoch"]: row["step"] for row in rows if "epoch" in row}
    assert list(evaluated) == [1, 2]
    assert (here / "run" / "checkpoints" / str(evaluated[2])).is_dir()


def test_an_evaluation_that_nobody_hears_has_failed(here):
    entry = base.network("resnet18", "random", width=1)
    network = networks.build(entry, num_classes=10, dtype="float32", seed=0, fit_head=False)
    weights = store.network_weights(network.view.network)
    origin = {"head": "trained", "source": "a test"}
    store.save_network(here / "weights", store.StoredNetwork(weights, network.arguments, origin))
    arguments = [
        "--mode=eval",
        "--config=r18_r34:smoke",
        "--checkpoint=weights",
        "--config.data.image_size=32",
    ]
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, MAIN, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=300, check=False
        )
    assert process.returncode == 1
    assert b"stdout cannot be written: No space left on device" in process.stderr
    assert b"Traceback" not in process.stderr
