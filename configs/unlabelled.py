"""A student learns what a teacher sees in your own images, which nobody labelled, at 224 pixels.

A pretrained ResNet-34 under a ResNet-18 from random weights, by TaT in which the teacher's positions ask.
Where `probe` names labelled images, k-NN and a linear probe say what features are worth; else the losses of
the images held out and the effective rank. Afterwards `--config finetune` with
`--config.student.weights=runs/unlabelled` gives the student a head. `:smoke` takes the embedded digits, whose
labels only the probe reads.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = base.base()
    config.task = "features"
    config.epochs = 30
    config.data.update({"source": "images", "root": "data/images"})
    config.optimizer.update({"learning_rate": 1e-3, "schedule": "cosine", "warmup_epochs": 1.0})
    config.losses.cross_entropy.weight = 0.0
    config.losses.tat.layer4.update({"weight": 1.0, "asks": "teacher"})
    return base.finish(config, argument)
