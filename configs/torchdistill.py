"""An experiment of the published code, from its YAML: `tat-jax --config FILE.yaml`.

The batch size is that of one GPU times `gpus`, and BatchNorm takes its statistics over one GPU's.
"""

from ml_collections import ConfigDict

from tat_jax import torchdistill
from tat_jax.configs import base


def get_config(argument: str) -> ConfigDict:
    """Return the experiment of the YAML file `argument`; with `:smoke` after it, its miniature.

    Raises:
        ValueError: the file cannot be read, or says what has no counterpart here.
    """
    file = argument.removesuffix(":smoke")
    config = base.base()
    config.update(torchdistill.read(file))
    config.gpus = 8
    config.batch_size = config.batch_size * config.get_ref("gpus")
    return base.finish(config, "smoke" if file != argument else "")
