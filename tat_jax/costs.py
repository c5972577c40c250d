"""What a run costs, beside its folder's log: the parameters that are trained, and the memory of a step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from tat_jax import paths
from tat_jax.distill import TrainState

_NAME = "costs.json"


def parameters(state: TrainState) -> dict[str, int]:
    """Return how many parameters are trained: the student's, and what the losses have besides."""
    return {
        f"{part}_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params.get(of, {})))
        for part, of in (("student", "student"), ("loss", "losses"))
    }


def note(folder: Path, **known: int | None) -> None:
    """Write what is known of the costs of the run in `folder`, and keep what was known before."""
    told = {name: value for name, value in known.items() if value is not None}
    with paths.replacing(folder / _NAME) as partial:
        partial.write_text(f"{json.dumps({**read(folder), **told}, indent=2)}\n")


def read(folder: Path) -> Mapping[str, Any]:
    """Return the `parameters` of a run and the `step_memory` in bytes of a device, as far as known."""
    path = folder / _NAME
    return json.loads(path.read_text()) if path.exists() else {}
