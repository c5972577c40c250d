"""The control of r18_r34, which the paper lacks: the same pretrained student, fine-tuned by labels alone.

What TaT adds is the difference to this, not the difference to the pretrained student.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base, r18_r34


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = r18_r34.get_config()
    config.losses.cross_entropy.weight = 1.0
    config.losses.tat.layer4.weight = 0.0
    return base.finish(config, argument)
