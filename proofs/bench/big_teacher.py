"""What a training takes of each of eight devices by how its teacher lies there, as the compiler says.

`python -m proofs.bench.big_teacher [POD]`. A ResNet-34 teaches a narrow ResNet-18 on 16 images of 32² pixels,
so that the teacher is nearly all there is: on simulated CPUs in float32, by XLA's scheduler that saves time,
which is the default, and by the one that saves memory; or in bfloat16 on a pod of TPUs, as v5e:2x4.
"""

import itertools
import sys
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from proofs.compiled_step import blank_rows, compile_step
from proofs.report import announce, circumstances, markdown_table
from tat_jax import sharding, topology
from tat_jax.build import build
from tat_jax.compiled import Program, describe
from tat_jax.configs import r18_r34

_DEVICES = 8
_PLACES = tuple(itertools.product(("float32", "bfloat16"), ("replicated", "sharded")))
_SCHEDULERS = {"time": "CPU_SCHEDULER_TYPE_DEFAULT", "memory": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_Compile = Callable[[ConfigDict], Program]


def rows(compilers: dict[str, _Compile]) -> Iterator[dict[str, str]]:
    """Yield a line for each way in which the teacher lies, by each compiler."""
    for name, compile_one in compilers.items():
        for dtype, place in _PLACES:
            announce(f"{name}, {dtype}, {place}")
            program = compile_one(config_of(dtype, place))
            gathered = program.collectives.get("all-gather", (0, 0))[1]
            yield {
                "compiler": name,
                "`teacher_dtype`": dtype,
                "`teacher_sharding`": place,
                "arguments, MB": f"{program.arguments / 1e6:.1f}",
                "temporaries, MB": f"{program.temporaries / 1e6:.1f}",
                "gathered a step, MB": f"{gathered / 1e6:.1f}",
            }


def config_of(dtype: str, place: str) -> ConfigDict:
    """Return the training, its teacher in a type and a place."""
    config = r18_r34.get_config("smoke")
    config.batch_size = 16
    config.data.image_size = 32
    config.teacher.width = 64
    config.teacher_dtype, config.teacher_sharding = dtype, place
    return config


def on_cpus(scheduler: str) -> _Compile:
    """Return what compiles the step for simulated CPUs by a scheduler."""

    def compile_one(config: ConfigDict) -> Program:
        options = {"xla_cpu_scheduler_type": scheduler}
        return describe(compile_step(config, blank_rows(config), devices=_DEVICES, options=options).program)

    return compile_one


def on_pod(name: str) -> _Compile:
    """Return what compiles the step in bfloat16 for a pod."""
    pod = topology.find(name)

    def compile_one(config: ConfigDict) -> Program:
        config.dtype = "bfloat16"
        mesh = sharding.make_mesh(jax.devices()[:1])
        built = build(config, mesh, num_classes=10, steps_per_epoch=1)
        return topology.compile_step(built, config, pod, images=config.batch_size)

    return compile_one


def main() -> None:
    """Print the table."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", _DEVICES)
    names = sys.argv[1:]
    compilers = {name: on_pod(name) for name in names} or {
        f"CPU, for {what}": on_cpus(scheduler) for what, scheduler in _SCHEDULERS.items()
    }
    print(markdown_table(list(rows(compilers))))
    print(f"\n{circumstances()}")


if __name__ == "__main__":
    main()
