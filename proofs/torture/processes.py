"""Several processes, started in each way there is; and what the others do when one of them dies."""

import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from proofs import rounding
from proofs.program import ROOT, by_address, free_port, logged
from proofs.torture.fault import Fault, judge
from proofs.torture.small_run import Run, differences, finish, small_config
from tat_jax.data.pipeline import open_pipeline
from tat_jax.weights import folders

Environments = list[dict[str, str]]
_EPOCHS, _KILLED_EPOCHS = "--config.epochs=2", "--config.epochs=6"
# Holds a sitecustomize.py, which Python runs before all else.
_TPU_MACHINE = Path(__file__).parent / "tpu_machine"


def as_slurm(count: int) -> Environments:
    """Return the environment of each process, as `srun` sets it."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(count)}
    return [job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]


def as_tpu_pod(count: int) -> Environments:
    """Return the environment of each process, as the hosts of a TPU pod have it."""
    pod = {
        "TPU_WORKER_HOSTNAMES": ",".join(["127.0.0.1"] * count),
        "TPU_SKIP_MDS_QUERY": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    path = f"{_TPU_MACHINE}:{ROOT}"
    return [pod | {"TPU_WORKER_ID": str(i), "PYTHONPATH": path} for i in range(count)]


STARTS: Mapping[str, tuple[Callable[[int], Environments], int]] = {
    "2 processes by address": (by_address, 2),
    "4 processes by address": (by_address, 4),
    "2 processes as on SLURM": (as_slurm, 2),
    "2 processes as on a TPU pod": (as_tpu_pod, 2),
}


def faults() -> list[Fault]:
    """Start processes in every way, let a step of two fail, and kill either of two."""
    return [*start_faults(tuple(STARTS)), share_fault(), *kill_faults((0, 1))]


def start_faults(starts: tuple[str, ...]) -> list[Fault]:
    """Start processes in each of the ways, and compare what they do with one process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        finish(folder / "one", _EPOCHS, rounding.RATE)
        return [_started(folder, start) for start in starts]


def kill_faults(victims: tuple[int, ...]) -> list[Fault]:
    """Kill each of `victims`, numbers of processes of two, and compare what continues with two untouched."""
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        for run in _start(whole, by_address(2), _KILLED_EPOCHS):
            run.wait()
        return [_killed(Path(temporary) / f"killed_{victim}", whole, victim) for victim in victims]


def _start(folder: Path, environments: Environments, *options: str) -> list[Run]:
    return [Run(folder, *options, environment=environment) for environment in environments]


def _started(folder: Path, start: str) -> Fault:
    environments, count = STARTS[start]
    together = folder / start.replace(" ", "_")
    runs = _start(together, environments(count), _EPOCHS, rounding.RATE)
    codes = [run.wait() for run in runs]
    wrong = [f"process {i}: {code}: {runs[i].output[-300:]}" for i, code in enumerate(codes) if code]
    talkative = [i for i, run in enumerate(runs) if "images/s" in run.output or "top-1" in run.output]
    if talkative != [0]:
        wrong.append(f"bars and lines of processes {talkative}")
    error = rounding.largest_relative_error(logged(together), logged(folder / "one"))
    differ = f"losses differ from one process's by {error:.1e}"
    if error > rounding.SINGLE:
        wrong.append(differ)
    return judge(start, 1, wrong, f"nothing; {differ}")


def share_fault() -> Fault:
    """Let a step of two processes fail, upon which each writes down what it read."""
    rate = ("--config.optimizer.name=sgd", "--config.optimizer.learning_rate=1e30")
    with tempfile.TemporaryDirectory() as temporary:
        runs = _start(Path(temporary) / "shares", by_address(2), *rate)
        codes = [run.wait() for run in runs]
        written = sorted((Path(temporary) / "shares").glob("step*_images.txt"))
        shares = [path.read_text().split("\n")[:-1] for path in written]
    step = int(written[0].name.removeprefix("step").split("_")[0])
    names = open_pipeline(small_config(), "train").names(0, step)
    held = codes == [1, 1] and shares == [names[: len(names) // 2], names[len(names) // 2 :]]
    wrong = [] if held else [f"codes {codes}, shares {shares}"]
    lost = "nothing; each names its own half of the batch"
    return judge("a loss that is no number, in 2 processes", 1, wrong, lost)


def _killed(killed: Path, whole: Path, victim: int) -> Fault:
    """Kill one of two processes when a checkpoint has been saved, and run both again."""
    runs = _start(killed, by_address(2), _KILLED_EPOCHS)
    runs[0].wait_until(lambda: folders.steps(killed), "a checkpoint")
    runs[victim].process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    survivor = runs[1 - victim]
    code = survivor.wait()
    seconds = time.monotonic() - began
    runs[victim].wait()
    wrong = [] if code and seconds < 60 else [f"code {code} after {seconds:.0f} s"]
    if "Traceback" in survivor.output:
        wrong.append("a stack trace")
    for run in (again := _start(killed, by_address(2), _KILLED_EPOCHS)):
        run.wait()
    if "continues from step" not in again[0].output:
        wrong.append("started anew")
    wrong += differences(killed, whole)
    lost = f"nothing; the other ended after {seconds:.0f} s"
    return judge(f"SIGKILL to process {victim} of 2, run again", 1, wrong, lost)
