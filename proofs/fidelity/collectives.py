"""What the devices tell each other in a step, read from the compiled program."""

from collections import Counter

import jax

from proofs.compiled_step import blank_rows, compile_step, float32_bytes, key
from proofs.fidelity.claim import Claim
from tat_jax.configs import r18_r34


def claims(*, devices: int = 8) -> list[Claim]:
    """Count what a step sends with BatchNorm's statistics over each device's images, and over all."""
    config = r18_r34.get_config("smoke")
    config.batch_size, config.bn_group = 2 * devices, 2
    step = compile_step(config, blank_rows(config), devices=devices)
    operations, arrays = step.sent()
    state = step.state
    known = Counter(key(leaf.shape) for leaf in jax.tree.leaves((state.params, state.variables)))
    beyond = arrays - known
    del beyond[()]
    config.bn_group = None
    whole_batch, _ = compile_step(config, blank_rows(config), devices=devices).sent()
    return [
        Claim(
            "bytes sent by a step beyond gradients, one group's running statistics and scalars",
            f"compiled program, {devices} devices, a group on each",
            float32_bytes(beyond),
            0,
        ),
        Claim("collective operations of a step", f"{devices} devices, a group on each", operations, None),
        Claim("  with statistics over the whole batch", f"{devices} devices", whole_batch, None),
    ]
