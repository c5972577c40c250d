"""What the devices tell each other in a step, read from the compiled program."""

import math
import re
from collections import Counter
from collections.abc import Iterable

import jax
import numpy as np

from configs import r18_r34
from fidelity.claim import Claim
from tat_jax import distill, sharding
from tat_jax.data.pipeline import Batch
from tat_jax.distill import TrainState
from tat_jax.task import prepare
from tat_jax.train import jit_train_step

_COLLECTIVE = re.compile(
    r"= (.+?) (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")

Arrays = Counter[tuple[int, ...]]  # how many there are of each shape


def sent(program: str) -> tuple[int, Arrays]:
    """Return how many collective operations a program's text has, and the arrays that they carry."""
    operations, arrays = 0, Counter[tuple[int, ...]]()
    for line in program.splitlines():
        if match := _COLLECTIVE.search(line):
            operations += 1
            arrays.update(_key(map(int, filter(None, s.split(",")))) for s in _SHAPE.findall(match[1]))
    return operations, arrays


def claims(*, devices: int = 8) -> list[Claim]:
    """Count what a step sends with BatchNorm's statistics over each device's images, and over all."""
    program, state = compiled_step(bn_group=2, devices=devices)
    operations, arrays = sent(program)
    known = Counter(_key(leaf.shape) for leaf in jax.tree.leaves((state.params, state.batch_stats)))
    beyond = arrays - known
    del beyond[()]
    program, _ = compiled_step(bn_group=None, devices=devices)
    whole_batch, _ = sent(program)
    return [
        Claim(
            "bytes sent by a step beyond gradients, one group's running statistics and scalars",
            f"compiled program, {devices} devices, a group on each",
            sum(4 * math.prod(shape) * count for shape, count in beyond.items()),
            0,
        ),
        Claim("collective operations of a step", f"{devices} devices, a group on each", operations, None),
        Claim("  with statistics over the whole batch", f"{devices} devices", whole_batch, None),
    ]


def _key(shape: Iterable[int]) -> tuple[int, ...]:
    """Return a shape without its ones, in an order of its own: the compiler transposes and reshapes."""
    return tuple(sorted(size for size in shape if size > 1))


def compiled_step(bn_group: int | None, *, devices: int) -> tuple[str, TrainState]:
    """Compile the step of the miniature of `configs/r18_r34.py`; return the program and the state."""
    config = r18_r34.get_config("smoke")
    config.batch_size, config.bn_group = 2 * devices, bn_group
    mesh = sharding.make_mesh(jax.devices()[:devices])
    prepared = prepare(config, mesh, num_classes=10, steps_per_epoch=1)
    size = config.data.image_size
    batch = Batch(
        image=np.zeros((config.batch_size, size, size, 3), np.uint8),
        label=np.zeros(config.batch_size, np.int32),
        where=np.ones(config.batch_size, bool),
    )
    (batch,) = sharding.put_batches([batch], mesh)
    step = jit_train_step(prepared.task, mesh)
    compiled = step.lower(prepared.state, prepared.teacher, distill.Batch(**batch)).compile()
    return str(compiled.as_text()), prepared.state
