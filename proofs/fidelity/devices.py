"""One training on any number of devices and processes: `main.py` itself, started as a user starts it."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from proofs import rounding
from proofs.fidelity.claim import Claim
from proofs.program import Layout, logged, main_command, run_everywhere
from proofs.rounding import largest_relative_error
from proofs.torture import small_run


class Case(NamedTuple):
    """A training of seven steps: one of `configs/`, and options that make it one."""

    config: str
    options: tuple[str, ...]


LAYOUTS = (Layout(1, 1), Layout(1, 2), Layout(1, 4), Layout(1, 8), Layout(2, 4))
# The last of each is of fewer images.
CLASSIFICATION = Case("r18_r34.py:smoke", ("--config.data.labels_per_class=10",))
SEGMENTATION = Case(
    small_run.SEGMENTATION.config,
    (*small_run.SEGMENTATION.options, "--config.checkpoint_minutes=15", "--config.batch_size=24"),
)


# All losses at once that compare images with each other.
PAIRS = Case(
    "cifar100.py:resnet56-resnet20,crd,smoke",
    (
        "--config.data.labels_per_class=10",
        "--config.student.architecture=resnet8",
        "--config.teacher.architecture=resnet14",
        "--config.losses.dist.weight=2",
        "--config.losses.pkt.weight=30000",
        "--config.losses.rkd.weight=1",
        "--config.losses.sp.weight=3000",
        "--config.losses.cc.weight=0.02",
    ),
)


def claims() -> list[Claim]:
    """Compare the losses of seven steps on every layout with those on one device."""
    return [*claims_of_pairs(), *claims_of_tat()]


def claims_of_pairs() -> list[Claim]:
    """Compare those where each image is compared with all others, in float64."""
    layouts = Layout(1, 1), Layout(1, 8), Layout(2, 4)
    name, bound = "DIST, PKT, RKD, SP, CC and CRD, float64", rounding.DOUBLE
    return compare(layouts, "--config.dtype=float64", case=PAIRS, name=name, bound=bound)


def claims_of_tat() -> list[Claim]:
    """Compare those of TaT, in float32 and float64."""
    return [
        claim
        for groups, bn in (("the whole batch", ()), ("8 groups", ("--config.bn_group=2",)))
        for dtype, bound in (("float32", rounding.SINGLE), ("float64", rounding.DOUBLE))
        for claim in compare(
            LAYOUTS, *bn, f"--config.dtype={dtype}", name=f"{dtype}, BatchNorm over {groups}", bound=bound
        )
    ]


def compare(
    layouts: tuple[Layout, ...], *options: str, case: Case = CLASSIFICATION, name: str, bound: float
) -> list[Claim]:
    """Compare the losses under `options` on every layout with those on the first."""
    first, *others = (_losses(layout, case, *options) for layout in layouts)
    return [
        Claim(
            f"losses of 7 steps on {layout}, {name}",
            str(layouts[0]),
            largest_relative_error(losses, first),
            bound,
        )
        for layout, losses in zip(layouts[1:], others, strict=True)
    ]


def _losses(layout: Layout, case: Case, *options: str) -> list[float]:
    """Train a case and return the loss of every step."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        command = main_command(case.config, folder, rounding.RATE, *case.options, *options)
        run_everywhere(layout, command, x64="--config.dtype=float64" in options)
        return logged(folder)
