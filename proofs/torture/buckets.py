"""Runs in a bucket, whose processes are killed and whose requests fail.

The store is moto's server on this machine, see `tests.emulator`; each process has a folder of its own, as on
a machine of its own.
"""

import functools
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from proofs.program import Environment, by_address
from proofs.torture.fault import Fault, judge
from proofs.torture.small_run import Run, differences, finish
from tests.emulator import Emulator, Faults

_UNAVAILABLE = ("503 Service Unavailable", "SlowDown")
_GONE = ("404 Not Found", "NoSuchBucket")


class _Place:
    """A bucket, the runs in it, and the uninterrupted run that they are compared with."""

    def __init__(self, folder: Path, epochs: int):
        self.emulator = Emulator()
        self.folder = folder
        self.epochs = f"--config.epochs={epochs}"
        finish(folder / "whole", self.epochs)

    def run(
        self, name: str, *, scheme: str = "s3", environment: Environment | None = None, host: int = 0
    ) -> Run:
        """Start a process of a run on one of several hosts."""
        return Run(
            self.folder / name,
            self.epochs,
            environment={
                **(self.emulator.environment if environment is None else environment),
                "XDG_CACHE_HOME": str(self.folder / f"cache{host}"),
            },
            workdir=f"{scheme}://bucket/{name}",
        )

    def steps(self, name: str) -> set[int]:
        """Return the steps of a run's checkpoints that are whole."""
        parts = [key.split("/") for key in self.emulator.names(f"{name}/checkpoints/")]
        return {int(part[2]) for part in parts if part[3:] == ["_CHECKPOINT_METADATA"]}

    def differences(self, name: str) -> list[str]:
        """Return in what a run differs from the uninterrupted one."""
        return differences(self.fetched(name), self.folder / "whole")

    def fetched(self, name: str) -> Path:
        """Copy a run out of the bucket."""
        for key in self.emulator.names(f"{name}/"):
            file = self.folder / "fetched" / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.emulator.read(key))
        return self.folder / "fetched" / name


@contextmanager
def _place(epochs: int = 20) -> Iterator[_Place]:
    with tempfile.TemporaryDirectory() as temporary:
        place = _Place(Path(temporary), epochs)
        try:
            yield place
        finally:
            place.emulator.close()


def faults(kills: int = 10) -> list[Fault]:
    """Kill and stop runs, let requests fail, be slow and find no bucket, and run in two processes."""
    with _place() as place:
        return [
            *(_killed(place, scheme, kills) for scheme in ("s3", "gs")),
            _stopped(place),
            _disturbed(place, "every third request fails", Faults(lambda *_: _each(3, place))),
            _disturbed(place, "each request takes half a second longer", Faults(delay=0.5)),
            _away(place, "no answer for 40 s", _UNAVAILABLE),
            _away(place, "the bucket is gone for 40 s", _GONE),
            _refused(place),
            _without_credentials(place),
            _in_two_processes(place),
        ]


def faults_in_short() -> list[Fault]:
    """Stop a run, start one without credentials, and kill one of two processes."""
    with _place(epochs=8) as place:
        return [_stopped(place), _without_credentials(place), _in_two_processes(place, victims=(1,))]


def _each(every: int, place: _Place) -> bool:
    return len(place.emulator.faults.requests) % every == 0


def _is_built(run: Run) -> bool:
    return " devices " in run.output


def _killed(place: _Place, scheme: str, kills: int) -> Fault:
    """Kill a run at random moments soon after it is built, and start it again."""
    rng, name = np.random.default_rng(0), f"killed_{scheme}"
    wrong = []
    for _ in range(kills):
        saved = place.steps(name)
        run = place.run(name, scheme=scheme)
        run.wait_until(functools.partial(_is_built, run), "its first step")
        time.sleep(rng.uniform(0, 4))
        run.process.send_signal(signal.SIGKILL)
        run.wait()
        if saved and f"{name}: starts" in run.output:
            wrong.append("started anew")
    place.run(name, scheme=scheme).finish()
    return judge(f"SIGKILL, {scheme}://, run again", kills, wrong + place.differences(name))


def _stopped(place: _Place) -> Fault:
    run = place.run("stopped")
    run.wait_until(lambda: place.steps("stopped"), "a checkpoint")
    since = time.monotonic()
    run.process.send_signal(signal.SIGTERM)
    code, seconds = run.wait(), time.monotonic() - since
    wrong = [] if code == 128 + signal.SIGTERM else [f"code {code}"]
    place.run("stopped", host=1).finish()
    lost = f"nothing; ended within {seconds:.1f} s"
    return judge("SIGTERM, run again on another machine", 1, wrong + place.differences("stopped"), lost)


def _disturbed(place: _Place, what: str, disturbance: Faults) -> Fault:
    name = what.replace(" ", "_")
    place.emulator.faults = disturbance
    code = place.run(name).wait()
    requests = len(place.emulator.faults.requests)
    place.emulator.mend()
    wrong = [f"code {code}"] if code else place.differences(name)
    return judge(what, 1, wrong, f"nothing; {requests} requests")


def _away(place: _Place, what: str, status: tuple[str, str]) -> Fault:
    name = what.replace(" ", "_")
    run = place.run(name)
    run.wait_until(lambda: place.steps(name), "a checkpoint")
    place.emulator.faults = Faults(lambda *_: True, status)
    time.sleep(40)
    place.emulator.mend()
    code = run.wait()
    wrong = [f"code {code}: {run.output[-300:]}"] if code else place.differences(name)
    if "the run goes on, and copies again" not in run.output:
        wrong.append("nothing was said")
    return judge(f"{what}, in the middle", 1, wrong)


def _refused(place: _Place) -> Fault:
    run = place.run("two")
    run.wait_until(lambda: "two/lock.json" in place.emulator.names("two"), "its lock")
    other = place.run("two", host=1)
    code, wrong = other.wait(), []
    if code != 1 or "error: another run is at work in s3://bucket/two" not in other.output:
        wrong.append(f"code {code}: {other.output[-300:]}")
    run.finish()
    return judge("a second run in the same bucket", 1, wrong + place.differences("two"), "nothing; refused")


def _without_credentials(place: _Place) -> Fault:
    of_credentials = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    without = {k: value for k, value in place.emulator.environment.items() if k not in of_credentials}
    run = place.run("none", environment=without)
    code, lines = run.wait(), run.output.strip().split("\n")
    wrong = [] if code == 1 and lines[-1].startswith("error: no credentials for s3://") else lines[-3:]
    return judge("no credentials", 1, wrong, "nothing; told in a line")


def _in_two_processes(place: _Place, victims: Sequence[int] = (0, 1)) -> Fault:
    """Run in two processes, kill one when a checkpoint is saved, and compare with two on one disk."""

    def start(name: str) -> Sequence[Run]:
        together = by_address(2)
        return [
            place.run(name, environment={**place.emulator.environment, **together[i]}, host=i) for i in (0, 1)
        ]

    def on_disk(name: str) -> Sequence[Run]:
        return [Run(place.folder / name, place.epochs, environment=e) for e in by_address(2)]

    _finish(lambda: on_disk("two_whole"))
    wrong = []
    for victim in victims:
        name = f"victim{victim}"
        runs = start(name)
        runs[0].wait_until(functools.partial(place.steps, name), "a checkpoint")
        runs[victim].process.send_signal(signal.SIGKILL)
        for run in runs:
            run.wait()
        again = _finish(functools.partial(start, name))
        if "continues from step" not in again[0].output:
            wrong.append("started anew")
        wrong += differences(place.fetched(name), place.folder / "two_whole")
    return judge("SIGKILL to one of 2 processes without a shared disk, run again", len(victims), wrong)


def _finish(start: Callable[[], Sequence[Run]]) -> Sequence[Run]:
    runs = start()
    for run in runs:
        run.finish()
    return runs
