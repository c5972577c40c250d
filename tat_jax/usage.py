"""How a network is used once it is trained: what its images must be, and what its classes are called."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tat_jax.data.image_folder import imagenet_classes
from tat_jax.data.source import Source, class_colours, class_names
from tat_jax.networks import Network
from tat_jax.networks.view import MEAN, STD
from tat_jax.tasks import task_of

Usage = dict[str, Any]


def usage_of(config: ConfigDict, network: Network, source: Source) -> Usage:
    """Return, as JSON has it, what whoever calls a network needs to know.

    Args:
        config: of its training, whose evaluation prepares images as the network wants them.
        network: has the mean and the standard deviation of its images, and the size to which they are resized
            for it after that crop.
        source: what it is trained on: how many classes, and what of their names and colours is known.
    """
    task, classes, colours = task_of(config), class_names(source), class_colours(source)
    return {
        "num_classes": source.num_classes,
        "classes": None if classes is None else list(classes),
        **({} if colours is None else {"colours": np.asarray(colours).tolist()}),
        "image": task.sizes(config.data),
        **({} if network.view.image_size is None else {"resized_to": network.view.image_size}),
        "mean": list(network.view.mean),
        "std": list(network.view.std),
    }


def usage_of_imagenet(shorter_side: int) -> Usage:
    """Return how torchvision's published networks of ImageNet are used, by its reference.

    Args:
        shorter_side: to which an image is resized, before its centre is cropped.
    """
    return {
        "num_classes": 1000,
        "classes": imagenet_classes(),
        "image": {"shorter_side": shorter_side, "centre": 224},
        "mean": list(MEAN),
        "std": list(STD),
    }


def as_json(usage: Mapping[str, Any]) -> bytes:
    """Return it as the contents of a file."""
    return f"{json.dumps(dict(usage), indent=2)}\n".encode()


def other_classes(network: Network, num_classes: int, classes: Sequence[str] | None) -> str:
    """Return how the classes of network and data differ; empty where they agree as far as they are known.

    Data without classes has none that could differ.
    """
    if not num_classes:
        return ""
    known = network.arguments.get("num_classes", network.usage.get("num_classes", num_classes))
    if not known:
        return "it has no head"
    if known != num_classes:
        return f"it knows {known:,} classes, the data {num_classes:,}"
    names = network.usage.get("classes")
    for label, (its, the_data) in enumerate(zip(names or (), classes or (), strict=False)):
        if its != the_data:
            return f"its class {label} is {its!r}, and that of the data {the_data!r}"
    return ""
