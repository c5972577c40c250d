"""What a step sends, computes and takes on a growing number of devices: for `bench.growth`.

The devices of one process run the program that those of several would. That it is the same one, processes
say themselves: each is this module, `python -m proofs.bench.scaling IMAGES`.
"""

import functools
import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from proofs.bench.full_size import full_size
from proofs.bench.memory import Figures
from proofs.compiled_step import CompiledStep, blank_rows, compile_step
from proofs.program import Layout, run_everywhere
from proofs.report import announce
from tat_jax import sharding
from tat_jax.compiled import describe
from tat_jax.configs import cifar100, r18_r34

DEVICES = (1, 2, 4, 8, 16)
LAYOUTS = (Layout(1, 16), Layout(4, 4), Layout(8, 2))  # sixteen processes would take 15 GB
# KD compares each image with itself.
PAIR_METHODS = ("kd", "dist", "pkt", "rkd", "sp", "cc", "crd")
ON_EACH, TOGETHER = 2, 32  # images, where each device has as many; and where all share as many


def weak() -> list[Figures]:
    """Read what a device takes and sends where each has the same number of images."""
    return [of_devices(devices, ON_EACH) for devices in DEVICES]


def strong() -> list[Figures]:
    """Read it where all of them share a batch."""
    return [of_devices(devices, TOGETHER // devices) for devices in DEVICES]


@functools.cache
def of_devices(devices: int, images: int) -> Figures:
    """Compile the step of `configs/r18_r34.py` for so many devices, with so many images on each."""
    announce(f"{devices} × {images} images")
    config = full_size(on_gpu=False)
    config.batch_size, config.bn_group = devices * images, images
    # What is sent is the same at this size, which compiles sooner.
    config.data.image_size = 128
    step = compile_step(config, blank_rows(config), devices=devices, num_classes=1000)
    return {"devices": devices, "images on each": images, **_figures(step)}


def processes() -> list[Mapping[str, Any]]:
    """Compile the step's miniature for sixteen devices of one process and of several, and compare."""
    rows: list[Mapping[str, Any]] = []
    for layout in LAYOUTS:
        announce(f"{layout} of one job")
        said = run_everywhere(layout, [sys.executable, "-m", "proofs.bench.scaling", str(ON_EACH)])
        found = {text.splitlines()[-1] for text in said}
        rows += [{"miniature on": str(layout), **json.loads(line)} for line in sorted(found)]
    return rows


def pairs() -> list[Mapping[str, Any]]:
    """Read what eight devices send where a loss compares each image with those of all of them."""
    rows: list[Mapping[str, Any]] = []
    for method in PAIR_METHODS:
        announce(f"{method} on 8 devices")
        config = cifar100.get_config(f"resnet56-resnet20,{method}")
        config.teacher.weights = "random"
        blank = blank_rows(config)._replace(indices=np.arange(config.batch_size, dtype=np.int32))
        step = compile_step(config, blank, devices=8, num_classes=100, images=50_000)
        rows.append({"resnet56 → resnet20, batch 64, by": method, **_figures(step)})
    return rows


def _figures(step: CompiledStep) -> Figures:
    """Return of one device what its collectives carry, what it computes, and what it needs."""
    program = describe(step.program)
    return {
        "collective operations": sum(count for count, _ in program.collectives.values()),
        "MiB sent": sum(carried for _, carried in program.collectives.values()) / 2**20,
        "GFLOP": program.operations / 1e9,
        "temporaries, MiB": program.temporaries / 2**20,
    }


def _miniature(images: int) -> ConfigDict:
    config = r18_r34.get_config("smoke")
    config.batch_size, config.bn_group = images * jax.local_device_count(), images
    return config


def main(images: str) -> None:
    """Print the figures of one of several processes, a line of JSON."""
    sharding.start_processes()
    config = _miniature(int(images))
    rows = blank_rows(config)  # those of this process
    print(json.dumps(_figures(compile_step(config, rows, devices=jax.device_count()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
