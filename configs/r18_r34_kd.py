"""ResNet-34 teaches ResNet-18 on ImageNet with the KD loss beside TaT, the paper's second recipe.

0.5 · cross-entropy + 0.5 · KL + 0.1 · TaT on layer4; all else as in r18_r34.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base, r18_r34


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = r18_r34.get_config()
    config.losses.cross_entropy.weight = 0.5
    config.losses.kd.update({"weight": 0.5, "temperature": 1.0})
    config.losses.tat.layer4.weight = 0.1
    return base.finish(config, argument)
