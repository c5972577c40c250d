"""As r18_r34, but the student starts from random weights: a variant the published code does not have."""

from ml_collections import ConfigDict

from tat_jax.configs import base, r18_r34


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = r18_r34.get_config()
    config.student.weights = "random"
    return base.finish(config, argument)
