"""Prove that each step is the published code's: `make fidelity`, half an hour on two cores."""

import argparse
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import jax

from proofs.fidelity import beside_pytorch, collectives, counts, ddp, devices, pixels, trajectories, weights
from proofs.fidelity.claim import Claim, table
from proofs.fidelity.photographs import photographs
from proofs.fidelity.report import versions, write_between

DOCUMENT = Path(__file__).parents[2] / "docs" / "fidelity.md"


def main() -> None:
    """Measure every claim, print the tables, write them to docs/fidelity.md; exit with 1 if one is broken."""
    parser = argparse.ArgumentParser(prog="python -m proofs.fidelity", description=__doc__)
    parser.add_argument(
        "--photos", type=Path, help="a folder of JPEG files; else pieces of scikit-learn's two"
    )
    parser.add_argument(
        "--weights", type=Path, help="a folder of resnet18*, resnet34* (.pth, .safetensors); else random ones"
    )
    options = parser.parse_args()
    try:
        photos = photographs(options.photos)
        for architecture in weights.ARCHITECTURES:
            weights.torch_network(architecture, options.weights)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    picture = DOCUMENT.with_suffix(".png")
    parts: dict[str, Callable[[], list[Claim]]] = {
        "Training runs recorded from the published code": trajectories.claims,
        "Beside PyTorch": lambda: beside_pytorch.claims(photos, options.weights, picture),
        "Devices and processes": devices.claims,
        "Beside DistributedDataParallel": ddp.claims,
        "Communication": collectives.claims,
        "Pixels": lambda: pixels.claims(photos),
        "Weights": lambda: weights.claims(photos, options.weights),
        "Evaluation counts": counts.claims,
    }
    text, broken, began = [], [], time.monotonic()
    for title, measure in parts.items():
        print(f"{time.monotonic() - began:6.0f} s  {title}", file=sys.stderr, flush=True)
        found = measure()
        text.append(f"### {title}\n\n{table(found)}\n")
        print("\n" + text[-1], flush=True)
        broken += [claim for claim in found if not claim.holds]
        jax.clear_caches()
    minutes = (time.monotonic() - began) / 60
    text.append(f"Measured on {datetime.now(UTC):%Y-%m-%d} in {minutes:.0f} minutes with {versions()}.\n")
    print(text[-1])
    write_between(DOCUMENT, "written by make fidelity", "\n".join(text).strip())
    print(f"written to {DOCUMENT}")
    if broken:
        sys.exit(f"{len(broken)} broken:\n{table(broken)}")


if __name__ == "__main__":
    # Before anything asks for a device: as many as the claims simulate.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
