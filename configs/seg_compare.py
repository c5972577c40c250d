"""A study on a folder of label maps: a ResNet-34 teaches two students in four ways, over two seeds.

Patches and anchors are as published for VOC's ResNet-18, with the teacher in training mode and without the
dropout of ASPP; beside a plain mean of cross-entropy their weight is α = 0.1 times sixteen images. TaT has
the same weight; none is tuned.
"""

from typing import Any

from ml_collections import ConfigDict

from tat_jax.configs import base, seg_folder


def get_config(argument: str = "") -> ConfigDict:
    """Return the study; `smoke` is its miniature."""
    config = seg_folder.get_config(argument)
    smoke = argument == "smoke"
    students: dict[str, dict[str, Any]] = {
        "resnet18": {},
        # The default of what is a ResNet's, which the miniature changes.
        "mobilenet": {"architecture": "deeplab_mobilenet_v2", "weights": "random", "width": 64},
    }
    # Patches of eight by eight pixels of a tap of 65 × 65, four to a group, and points of four by four.
    patches = {"patches": (8, 8), "groups": 16, "anchors": (16, 16)}
    if smoke:  # of 17 × 17
        patches = {"patches": (4, 4), "groups": 4, "anchors": (4, 4)}
    without_dropout = {"aspp_dropout": False}
    ways: dict[str, dict[str, Any]] = {
        "cross-entropy": {},
        "kd": {"losses": {"kd": {"weight": 1.0, "temperature": 4.0}}},
        "patches and anchors": {
            "losses": {"patch_anchor": {"decoder": {"weight": 1.6, **patches}}},
            "teacher_mode": "train",
            "teacher": without_dropout,
            "student": without_dropout,
        },
        "tat": {"losses": {"tat": {"decoder": {"weight": 1.6, "embedding_kernel": 1}}}},
    }
    config.study = base.study(
        seeds=(0,) if smoke else (0, 1),
        teacher={
            "student": {"architecture": "deeplab_resnet34"}
            | ({} if smoke else {"weights": "weights/resnet34"})
        },
        students={
            f"{network}, {way}": changes | {"student": student | changes.get("student", {})}
            for network, student in students.items()
            for way, changes in ways.items()
        },
    )
    return config
