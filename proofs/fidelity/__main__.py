"""Prove that each step is the published code's: `make fidelity`, half an hour on two cores.

Parts that are named run alone. Each writes its table into docs/fidelity.md.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import jax

from proofs.command import Part, make_parser, run_parts
from proofs.fidelity import (
    beside_pytorch,
    collectives,
    convnext,
    counts,
    ddp,
    devices,
    pixels,
    rivals,
    segmentation,
    segmentation_steps,
    trajectories,
    vision_transformers,
    weights,
)
from proofs.photographs import add_photos
from proofs.program import ROOT

DOCUMENT = ROOT / "docs" / "fidelity.md"
PARTS: Mapping[str, Part] = {
    "trajectories": lambda _: trajectories.claims(),
    "segmentation": lambda _: segmentation.claims(),
    "pytorch": lambda chosen: beside_pytorch.claims(
        chosen.photos, chosen.weights, DOCUMENT.with_suffix(".png")
    ),
    "segmentation_steps": lambda _: segmentation_steps.claims(),
    "devices": lambda _: devices.claims(),
    "ddp": lambda _: ddp.claims(),
    "collectives": lambda _: collectives.claims(),
    "pixels": lambda chosen: pixels.claims(chosen.photos),
    "weights": lambda chosen: weights.claims(chosen.photos, chosen.weights),
    "convnext": lambda _: convnext.claims() + convnext.parameters() + convnext.published(),
    "counts": lambda _: counts.claims(),
    "vision_transformers": lambda _: vision_transformers.claims(),
    "rivals": lambda _: rivals.claims(),
}


def main() -> None:
    """Measure the parts that the command line names; exit with 1 if a claim is broken."""
    parser = make_parser(__doc__, prog="python -m proofs.fidelity")
    add_photos(parser)
    parser.add_argument(
        "--weights",
        type=_of_both_networks,
        metavar="FOLDER",
        help="resnet18*, resnet34* (.pth, .safetensors); else random ones",
    )
    run_parts(parser, PARTS, DOCUMENT)


def _of_both_networks(folder: str) -> Path:
    try:
        for architecture in weights.ARCHITECTURES:
            weights.torch_network(architecture, Path(folder))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(folder)


if __name__ == "__main__":
    # Before anything asks for a device: as many as the claims simulate.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
