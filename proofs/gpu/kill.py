"""SIGKILL to a training on a GPU, and what continues it, bit by bit."""

from proofs.torture import kill
from proofs.torture.fault import Fault

# A GPU adds in the order in which its threads arrive, and XLA chooses algorithms by their time, unless told.
EXACT = "--xla_gpu_deterministic_ops=true"
_PHASES = ("a step", "a save")


def faults() -> list[Fault]:
    """Kill a run in a step and in a save, finish it, and compare it with one that nothing interrupted."""
    environment = {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": EXACT}
    return kill.faults(_PHASES, epochs=12, environment=environment)
