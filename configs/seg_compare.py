"""A study on a folder of label maps: a ResNet-34 teaches two students in four ways, over two seeds.

The weights of patches and anchors are VOC's with ResNet-18 as published: beside a plain mean of cross-entropy
they are sixteen images times α = 0.1. TaT has the same; none is tuned.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base, seg_folder


def get_config(argument: str = "") -> ConfigDict:
    """Return the study; `smoke` is its miniature."""
    config = seg_folder.get_config(argument)
    smoke = argument == "smoke"
    students = {
        "resnet18": {},
        "mobilenet": {"architecture": "deeplab_mobilenet_v2", "weights": "random", "width": 64},
    }
    # Patches of eight by eight pixels of a tap of 65 × 65, four to a group, and points of four by four.
    patches = {"patches": (8, 8), "groups": 16, "anchors": (16, 16)}
    if smoke:  # of 17 × 17
        patches = {"patches": (4, 4), "groups": 4, "anchors": (4, 4)}
    losses = {
        "cross-entropy": {},
        "kd": {"kd": {"weight": 1.0, "temperature": 4.0}},
        "patches and anchors": {"patch_anchor": {"decoder": {"weight": 1.6, **patches}}},
        "tat": {"tat": {"decoder": {"weight": 1.6, "embedding_kernel": 1}}},
    }
    config.study = base.study(
        seeds=(0,) if smoke else (0, 1),
        teacher={
            "student": {"architecture": "deeplab_resnet34"}
            | ({} if smoke else {"weights": "weights/resnet34"})
        },
        students={
            f"{network}, {way}": {"student": student, "losses": terms}
            for network, student in students.items()
            for way, terms in losses.items()
        },
    )
    return config
