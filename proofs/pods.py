"""What `r18_r34` takes of pods of TPUs, by their compiler: `make pods`. No TPU is needed.

Parts that are named run alone. Each writes its table into docs/pods.md.
"""

import os
import tempfile
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from proofs.command import Part, make_parser, run_parts
from proofs.program import ROOT
from proofs.report import announce
from tat_jax import pods, sharding, topology
from tat_jax.build import Built, build
from tat_jax.compiled import Program
from tat_jax.configs import r18_r34
from tat_jax.pods import IMAGENET
from tat_jax.topology import Pod

DOCUMENT = ROOT / "docs" / "pods.md"
PODS = ("v5e:2x4", "v5e:8x8", "v6e:8x8")
DTYPES = ("float32", "bfloat16")
EFFORTS: Mapping[str, Mapping[str, float]] = {"check's": topology.QUICK, "its own": {}}


class Taken(NamedTuple):
    """What a step takes of a pod.

    Attributes:
        pod: which.
        what: besides the pod, what the line is about.
        images: of a batch.
        program: the step.
        more: further cells.
    """

    pod: Pod
    what: Mapping[str, str]
    images: int
    program: Program
    more: Mapping[str, str]

    @property
    def holds(self) -> bool:
        """Return whether it fits."""
        return self.program.memory <= self.pod.device.memory

    def cells(self) -> dict[str, str]:
        """Return what stands in the line, by heading; figures are those of a device."""
        program, devices = self.program, self.pod.mesh.size
        sent = ", ".join(f"{n} {kind}, {b / 1e6:,.1f}" for kind, (n, b) in program.collectives.items())
        return {
            "pod": self.pod.name,
            **self.what,
            "images": f"{self.images // devices:,}",
            "arguments, GB": f"{program.arguments / 1e9:.2f}",
            "temporaries, GB": f"{program.temporaries / 1e9:.2f}",
            "TFLOP": f"{program.operations / 1e12:.3f}",
            "GB moved": f"{program.moved / 1e9:.2f}",
            "MB sent": sent,
            **self.more,
        }


def taken_of(name: str) -> list[Taken]:
    """Compile the recipe for a pod in every type, find the largest batch, and reckon the time."""
    pod, rows = topology.find(name), []
    for dtype in DTYPES:
        announce(dtype)
        config, built = _training(dtype)
        step = topology.compile_step(built, config, pod, images=config.batch_size)
        evaluation = topology.compile_evaluation(built, config, pod, images=config.batch_size)
        _, largest = pods.find_largest_batch(config, built, pod, IMAGENET, step)
        seconds, binds = pods.seconds_at_peaks(step, pod)
        hours = pods.seconds_in_all(config, pod, IMAGENET, step, evaluation) / 3600
        more = {
            "images/s at peak": f"{config.batch_size / seconds:,.0f}",
            "binds": binds,
            "chip-hours": f"{hours * pod.chips:.1f}",
            "largest": f"{largest // pod.mesh.size:,}",
        }
        rows.append(Taken(pod, {"type": dtype}, config.batch_size, step, more))
    return rows


def by_effort() -> list[Taken]:
    """Compile the step as `--mode check` does and as a training does, with the compiler's own effort."""
    pod, rows = topology.find(PODS[0]), []
    config, built = _training("bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # what is timed is not to be there from before
        for effort, options in EFFORTS.items():
            announce(f"{effort} effort")
            since = time.process_time()
            step = topology.compile_step(built, config, pod, images=config.batch_size, options=options)
            more = {"code, MB": f"{step.code / 1e6:.0f}", "CPU s": f"{time.process_time() - since:.0f}"}
            what = {"type": config.dtype, "effort": effort}
            rows.append(Taken(pod, what, config.batch_size, step, more))
    return rows


def _training(dtype: str) -> tuple[ConfigDict, Built]:
    config = r18_r34.get_config()
    config.student.weights = config.teacher.weights = "random"
    config.dtype = dtype
    mesh = sharding.make_mesh(jax.devices()[:1])
    return config, build(config, mesh, num_classes=IMAGENET.num_classes, steps_per_epoch=626)


def _of(name: str) -> Part:
    return lambda _: taken_of(name)


PARTS: Mapping[str, Part] = {**{name: _of(name) for name in PODS}, "effort": lambda _: by_effort()}


def main() -> None:
    """Compile what the command line names; exit with 1 if a step does not fit."""
    jax.config.update("jax_platforms", "cpu")
    run_parts(make_parser(__doc__, prog="python -m proofs.pods"), PARTS, DOCUMENT)


if __name__ == "__main__":
    main()
