"""A ResNet-34 teaches a ResNet-18 on ImageNet, patient and consistent: what a loss on features has to beat.

Knowledge distillation: A good teacher is patient and consistent, Beyer et al., CVPR 2022, as published in
big_vision's `configs/proj/distill/bit_i1k.py`: the KL divergence at temperature 1 alone, no labels; both
networks see the same crop, of 5 % of the image on, mixed by mixup with λ uniform on [0, 1]; Adam with weight
decay, the gradient clipped to norm 1; a cosine after a warm-up; 300 epochs, of the 1,200 that are called a
good middle ground there: `--config.epochs=1200`.

What differs: there a BiT-M R152x2 teaches a BiT-R50x1, both with GroupNorm, in batches of 4,096 at a rate of
0.03, with a decay of 3e-4 at each step, of kernels alone, which that rate does not multiply, after a warm-up
of 5,000 steps (16 epochs). Here networks have BatchNorm and learn at a tenth of the rate in half the batch;
the decay at each step is the same, 0.003 · 0.1, as AdamW multiplies by the rate. Nobody has tuned the two.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = base.base()
    config.epochs = 300
    config.batch_size = 2048
    config.bn_group = 256
    config.mixup = 1.0
    config.losses.cross_entropy.weight = 0.0
    config.losses.kd.update({"weight": 1.0, "temperature": 1.0})
    config.optimizer.update(
        {
            "learning_rate": 3e-3,
            "weight_decay": 0.1,
            "schedule": "cosine",
            "warmup_epochs": 16.0,
            "clip_norm": 1.0,
        }
    )
    config.data.crop_scale = (0.05, 1.0)
    return base.finish(config, argument)
