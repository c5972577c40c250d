"""A ResNet-34 teaches a ResNet-18 on ImageNet by another method than TaT, with its published weights.

    main.py --config imagenet_rivals:dkd

The student starts from random weights and learns for 100 epochs by SGD with momentum 0.9 and weight decay
1e-4 at a rate of 0.1 for 256 images, times 0.1 after epochs 30, 60 and 90, as mdistiller's and DIST's code
has it; DKD with twice the batch and the rate. Of ICKD and AT no weight for ImageNet is known here, and they
have that of CIFAR-100.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tat_jax.configs import base

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_EVERY = {"student_taps": _STAGES, "teacher_taps": _STAGES}
_LAST = {"student_tap": "layer4", "teacher_tap": "layer4"}
_REVIEWED = {"student_taps": (*_STAGES, "pooled"), "teacher_taps": (*_STAGES, "pooled")}
# What differs of the losses from cross-entropy alone.
METHODS: Mapping[str, dict[str, Any]] = {
    "kd": {"cross_entropy": {"weight": 0.5}, "kd": {"weight": 0.5, "temperature": 1.0}},
    "kd_standardized": {
        "cross_entropy": {"weight": 0.1},
        "kd": {"weight": 9.0, "temperature": 2.0, "standardize": True},
    },
    "dkd": {"dkd": {"weight": 1.0, "beta": 0.5, "temperature": 1.0}},
    "dist": {"dist": {"weight": 2.0, "temperature": 1.0}},
    "nkd": {"nkd": {"weight": 1.0, "gamma": 1.5, "temperature": 1.0}},
    "review": {"review": {"weight": 1.0, **_REVIEWED}},
    "catkd": {"catkd": {"weight": 0.5, "resolution": 4}},
    "at": {"at": {"weight": 1000.0, **_EVERY}},
    "ickd": {"ickd": {"weight": 2.5, **_LAST, "divide_by_batch": True}},
}


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment of a METHOD; with `,smoke` behind it, or `smoke` alone, its miniature.

    Raises:
        ValueError: there is no such method.
    """
    method = argument.removesuffix("smoke").rstrip(",") or "kd"
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    config = base.base()
    doubled = method == "dkd"
    config.batch_size = 512 if doubled else 256
    config.optimizer.update({"name": "sgd", "learning_rate": 0.2 if doubled else 0.1, "weight_decay": 1e-4})
    base.update_losses(config, METHODS[method])
    return base.finish(config, "smoke" if argument.endswith("smoke") else "")
