"""A study of CIFAR-100: methods × pairs × seeds by the common protocol, the published figures beside them.

    main.py --config compare_cifar100                                          # every method, one pair
    main.py --config compare_cifar100:vgg13-vgg8,resnet56-resnet20,kd,dkd,tat  # some methods, two pairs
    main.py --config compare_cifar100:short --config.data.source=imagefolder --config.data.root=ROOT

Each teacher is trained once; the student alone, over the same seeds, is the control. A tenth of the training
images is held out, so that a best epoch is chosen by images that are no test.

`short` is for two cores and images in a folder: ResNet-20 → ResNet-8, 8 epochs with decays in proportion, 24
for the teacher, thirteen methods with the weights that are published for ResNets of this family. None is
for TaT: of four weights it has the one that did best on held-out images (`tat_weight_cifar100`).
It says how methods compare under it, and nothing of the published table (docs/results.md).

Published figures are RepDistiller's (of the last epoch) for methods up to CRD; those of ICKD's README without
KL, whose epoch is not told and counts as the last; DKD's own and, for all others, those
of logit standardisation's paper, both of the best epoch by the test set.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from tat_jax.configs import base, cifar100
from tat_jax.configs.cifar100 import PAIRS, Pair

ALONE = "alone"
_SHORT = Pair("resnet20", "resnet8", rise=1, dkd=2.0, review=0.6, tat=10.0)
_SHORT_METHODS = (
    "kd",
    "fitnet",
    "at",
    "sp",
    "rkd",
    "pkt",
    "crd",
    "review",
    "dkd",
    "dist",
    "kd_standardized",
    "ickd",
    "tat",
)
# Top-1 by pair, in the order of PAIRS; None where there is none that was read where it was published.
_STUDENTS = (73.26, 71.98, 69.06, 69.06, 71.14, 72.50, 70.36, 64.60, 64.60, 70.36, 70.50, 71.82, 70.50)
_LAST: Mapping[str, tuple[float | None, ...]] = {
    ALONE: _STUDENTS,
    "kd": (74.92, 73.54, 70.66, 70.67, 73.08, 73.33, 72.98, 67.37, 67.35, 73.81, 74.07, 74.45, 74.83),
    "fitnet": (73.58, 72.24, 69.21, 68.99, 71.06, 73.50, 71.02, 64.14, 63.16, 70.69, 73.59, 73.54, 73.73),
    "at": (74.08, 72.77, 70.55, 70.22, 72.31, 73.44, 71.43, 59.40, 58.58, 71.84, 71.73, 72.73, 73.32),
    "sp": (73.83, 72.43, 69.67, 70.04, 72.69, 72.94, 72.68, 66.30, 68.08, 73.34, 73.48, 74.56, 74.52),
    "cc": (73.56, 72.21, 69.63, 69.48, 71.48, 72.97, 70.71, 64.86, 65.43, 70.25, 71.14, 71.29, 71.38),
    "vid": (74.11, 73.30, 70.38, 70.16, 72.61, 73.09, 71.23, 65.56, 67.57, 70.30, 73.38, 73.40, 73.61),
    "rkd": (73.35, 72.22, 69.61, 69.25, 71.82, 71.90, 71.48, 64.52, 64.43, 71.50, 72.28, 73.21, 72.21),
    "pkt": (74.54, 73.45, 70.34, 70.25, 72.61, 73.64, 72.88, 67.13, 66.52, 73.01, 74.10, 74.69, 73.89),
    "crd": (75.48, 74.14, 71.16, 71.46, 73.48, 75.51, 73.94, 69.73, 69.11, 74.30, 75.11, 75.65, 76.05),
    "ickd": (75.64, 74.33, 71.76, 71.68, 73.89, 75.25, 73.42, *[None] * 6),
}
_BEST: Mapping[str, tuple[float | None, ...]] = {
    "review": (76.12, 75.09, 71.89, 71.34, 73.89, 75.63, 74.84, 70.37, 69.89, None, None, 77.78, None),
    "dkd": (76.24, 74.81, 71.97, 71.06, 74.11, 76.32, 74.68, 69.71, 70.35, None, 76.45, 77.07, 76.70),
    "simkd": (75.53, 74.53, 71.05, 71.06, 73.92, 78.08, 74.89, 69.44, 69.97, None, None, 78.39, None),
    "catkd": (75.60, 74.82, 71.62, 71.37, 73.62, 76.91, 74.65, 69.13, 71.36, None, None, 78.41, None),
    "kd_standardized": (
        76.11,
        74.37,
        71.43,
        71.48,
        74.17,
        76.62,
        74.36,
        68.61,
        69.02,
        None,
        None,
        75.56,
        None,
    ),
    "dkd_standardized": (
        76.39,
        74.89,
        72.32,
        71.85,
        74.29,
        77.01,
        74.81,
        69.98,
        70.45,
        None,
        None,
        77.37,
        None,
    ),
}


def get_config(argument: str = "") -> ConfigDict:
    """Return the study of the pairs and methods that are named; of none, the usual pair and every method.

    `short` stands for its own pair and methods; with `smoke` it is the miniature.

    Raises:
        ValueError: there is no such pair or method.
    """
    said = [word for word in argument.split(",") if word]
    smoke = "smoke" if "smoke" in said else ""
    is_short = "short" in said
    words = [word for word in said if word not in ("smoke", "short")]
    pairs = [cifar100.find_pair(word) for word in words if "-" in word]
    methods = [word for word in words if "-" not in word]
    for method in methods:
        cifar100.check_method(method)
    pairs = pairs or [_SHORT if is_short else PAIRS[cifar100.DEFAULT]]
    methods = methods or list(_SHORT_METHODS if is_short else cifar100.METHODS)
    pairs = list(map(cifar100.small, pairs)) if smoke else pairs
    config = cifar100.protocol(pairs[0].student, smoke)
    config.data.held_out_of_training = 0.1
    of_teachers: dict[str, Any] = {}
    if is_short and not smoke:
        config.update({"epochs": 8, "eval_every": 1, "keep": "networks"})
        config.optimizer.milestones = (5, 6, 7)
        of_teachers = {"epochs": 24, "optimizer": {"milestones": (15, 18, 21)}}
    config.study = base.study(
        seeds=(0,) if smoke else (0, 1, 2),
        teachers={pair.teacher: _training(pair.teacher, of_teachers) for pair in pairs},
        students=_students(pairs, methods),
        published={} if smoke else _published(pairs, methods),
    )
    return config


def _training(architecture: str, further: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return what differs of a training that has this network as its student."""
    rate = {"learning_rate": cifar100.learning_rate(architecture)}
    return {
        **further,
        "student": {"architecture": architecture},
        "optimizer": {**further.get("optimizer", {}), **rate},
    }


def _students(pairs: list[Pair], methods: list[str]) -> dict[str, Any]:
    students = {}
    for pair in pairs:
        students[_name(pairs, pair, ALONE)] = _training(pair.student)
        for method in methods:
            students[_name(pairs, pair, method)] = {
                **_training(pair.student),
                "teacher": {"architecture": pair.teacher, "weights": pair.teacher},
                "losses": cifar100.METHODS[method](pair),
            }
    return students


def _name(pairs: list[Pair], pair: Pair, method: str) -> str:
    """Return what the table calls a method, with its pair where there are several."""
    if len(pairs) == 1:
        return method
    return f"{pair.student if method == ALONE else pair.name}, {method}"


def _published(pairs: list[Pair], methods: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        if pair.name not in PAIRS:
            continue
        column = list(PAIRS).index(pair.name)
        for method in (ALONE, *methods):
            for epoch, table in (("last", _LAST), ("best", _BEST)):
                if method in table and table[method][column] is not None:
                    found[_name(pairs, pair, method)] = {"value": table[method][column], "epoch": epoch}
    return found
