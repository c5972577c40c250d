"""Compute the losses of patch groups and anchors that the authors' segmentation code was recorded giving.

A recorded case names its inputs, which are drawn from their names, and holds both losses and norms of their
gradients. `python -m proofs.fidelity.segmentation FILE` checks the cases in another file of this kind.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from proofs.fidelity.claim import Claim, check_files
from proofs.fidelity.recorded_inputs import draw
from proofs.fidelity.trajectories import GOLDEN
from proofs.rounding import relative_error
from tat_jax.losses import anchor_loss, patch_group_loss
from tat_jax.losses.patches import Form

# The published names of the forms of the loss within patches.
FORMS: dict[str | None, Form] = {"stack_attn": "stack", "batch_attn": "batch", None: "sum"}


def recorded(file: Path = GOLDEN) -> list[dict[str, Any]]:
    """Return the cases recorded in `file`."""
    return json.loads(file.read_text())["segmentation"]


def claims(file: Path = GOLDEN) -> list[Claim]:
    """Compare every case recorded in `file`, in float64."""
    with jax.enable_x64(True):
        return [claim for case in recorded(file) for claim in _claims_of(case)]


def _claims_of(case: dict[str, Any]) -> list[Claim]:
    """Compare every figure of one case: of either loss, alone, its value and the norms of its gradients."""
    query, key, value, target = (
        jnp.asarray(rearrange(draw(f"{case['id']}/{name}", case["shape_nchw"], scale), "b c h w -> b h w c"))
        for name, scale in (("q", 0.3), ("k", 0.3), ("v", 1.0), ("t", 1.0))
    )
    patches, groups, form = (case["n"], case["m"]), case["heads"], FORMS[case["attn_type"]]

    def of_groups(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return patch_group_loss(q, k, v, target, patches=patches, groups=groups, form=form).mean()

    def of_anchors(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return anchor_loss(q, k, v, target, anchors=tuple(case["anchor"])).mean()

    losses: dict[str, Callable[..., jax.Array]] = {"patchgroup": of_groups, "anchor": of_anchors}
    measured = {}
    for name, loss in losses.items():
        measured[f"{name}_loss"], gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(query, key, value)
        for which, gradient in zip("qkv", gradients, strict=True):
            measured[f"{name}_grad_{which}_norm"] = np.linalg.norm(gradient)
    figures = {
        name: figure for name, figure in case.items() if name.startswith(tuple(f"{n}_" for n in losses))
    }
    if unknown := figures.keys() - measured.keys():
        raise ValueError(f"{case['id']} records what is not measured here: {', '.join(sorted(unknown))}")
    return [
        Claim(
            name.replace("_", " ").replace("patchgroup", "patch-group"),
            f"published code, {case['id']}",
            relative_error(measured[name], figure),
            1e-10,
        )
        for name, figure in figures.items()
    ]


if __name__ == "__main__":
    check_files(claims, sys.argv[1:] or [GOLDEN])
