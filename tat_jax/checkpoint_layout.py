"""The names under which the parameters of a training are saved, and those of before losses were a list."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

NOW = 2  # checkpoints of before have no such number

Route = tuple[Any, ...]


def renamed(training: dict[str, Any], rename: Callable[[Route], Route]) -> dict[str, Any]:
    """Return the item `training` with other paths of what is trained, in its embeddings and its moments."""

    def rename_state(node: Any) -> Any:
        if not isinstance(node, nnx.State):
            return node
        return nnx.from_flat_state([(rename(path), leaf) for path, leaf in nnx.to_flat_state(node)])

    embeddings = {".".join(rename(tuple(k.split(".")))): v for k, v in training["embeddings"].items()}
    moments = jax.tree.map(
        rename_state, training["opt_state"], is_leaf=lambda node: isinstance(node, nnx.State)
    )
    return training | {"embeddings": embeddings, "opt_state": moments}


def as_before(path: Route) -> Route:
    """Return the path of before losses were a list: `tat.layer4.query` for `losses.tat_layer4.query`."""
    match path:
        case ("student", "network", *rest):
            return ("student", *rest)
        case ("losses", str(name), *rest):
            return (*name.split("_", 1), *rest)
    return path


def as_now(path: Route) -> Route:
    """Return the path of a parameter that had this one before."""
    match path:
        case ("student", *rest):
            return ("student", "network", *rest)
        case (loss, tap, *rest):
            return ("losses", f"{loss}_{tap}", *rest)
    return path
