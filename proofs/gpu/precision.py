"""A run of the authors' on a GPU, and our steps there beside PyTorch's, in float32 and in bfloat16."""

from collections.abc import Iterator

import jax
import torch

from proofs.fidelity import beside_pytorch, trajectories
from proofs.fidelity.beside_pytorch import TERMS, Curves
from proofs.fidelity.claim import Claim
from proofs.photographs import Photograph
from proofs.rounding import relative_error

STEPS = 5
# Of the first step. Eight significant bits are 4e-3; a loss is a mean of many such numbers.
SINGLE, HALF = 1e-5, 1e-2


def claims(photos: list[Photograph], *, steps: int = STEPS, device: str = "cuda") -> list[Claim]:
    """Reproduce the first recorded run in float64, and compare losses of training steps with PyTorch's."""
    found = trajectories.claims_in_float64(trajectories.recorded()[0])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact = beside_pytorch.pytorch(photos, None, steps, torch.float64, device=device)
    with jax.default_matmul_precision("highest"):
        single = beside_pytorch.ours(photos, None, steps)
    of_pytorch = beside_pytorch.pytorch(photos, None, steps, torch.float32, device=device)
    found += _beside(exact, single, of_pytorch, "float32", SINGLE)
    half = beside_pytorch.ours(photos, None, steps, dtype="bfloat16")
    of_pytorch = beside_pytorch.pytorch(photos, None, steps, torch.float32, device=device, mixed=True)
    return [*found, *_beside(exact, half, of_pytorch, "bfloat16", HALF)]


def _beside(exact: Curves, ours: Curves, theirs: Curves, dtype: str, bound: float) -> Iterator[Claim]:
    for i, term in enumerate(TERMS):
        for whose, curves, first in (("ours", ours, bound), ("PyTorch's own", theirs, None)):
            for what, rows, largest in (("first step", slice(1), first), ("whole curve", slice(None), None)):
                name = f"{term}, {dtype}, {whose}: {what}"
                error = relative_error(curves[rows, i], exact[rows, i])
                yield Claim(name, f"PyTorch in float64, {len(exact)} steps at 224²", error, largest)
