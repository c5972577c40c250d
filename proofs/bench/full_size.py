"""The experiment at full size, as benchmarks run it."""

from ml_collections import ConfigDict

from tat_jax.configs import r18_r34


def full_size(*, on_gpu: bool) -> ConfigDict:
    """Return ResNet-34 → 18 at 224² with random weights: batch 16 in float32, on a GPU 256 in bfloat16."""
    config = r18_r34.get_config()
    config.student.weights = config.teacher.weights = "random"
    config.bn_group = None
    config.batch_size, config.dtype = (256, "bfloat16") if on_gpu else (16, "float32")
    return config
