"""A study on a small folder: a fine-tuned ResNet-34 teaches a ResNet-18 in four ways, over two seeds."""

from ml_collections import ConfigDict

from tat_jax.configs import base, finetune


def get_config(argument: str = "") -> ConfigDict:
    """Return the study; `smoke` is its miniature."""
    config = finetune.get_config(argument)
    teacher = {"architecture": "resnet34", "weights": "weights/resnet34"}
    kd = {"kd": {"weight": 1.0, "temperature": 4.0}}
    tat = {"tat": {"layer4": {"weight": 0.2}}}
    config.study = base.study(
        seeds=(0, 1),
        teacher={"student": teacher},
        students={
            "cross-entropy": {},
            "kd": {"losses": kd},
            "tat": {"losses": tat},
            "kd and tat": {"losses": kd | tat},
        },
    )
    if argument == "smoke":
        config.study.seeds = (0,)
        config.study.teacher.student.weights = "random"
    return config
