"""DeepLabV3+ over ResNet-101 learns COCO-Stuff-10k from labels alone, as the authors trained their teacher.

Its run folder serves as `teacher.weights` of another config. Two hundred epochs of SGD whose rate falls as
(1 − t/T)^0.9, ten times as high for all that is above the backbone.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = base.base()
    config.task = "segmentation"
    config.epochs = 200
    config.batch_size = 16
    config.student.update({"architecture": "deeplab_resnet101", "weights": "weights/resnet101"})
    config.teacher.architecture = "deeplab_resnet101"
    config.optimizer.update(
        {
            "name": "sgd",
            "learning_rate": 0.004,
            "nesterov": True,
            "schedule": "polynomial",
            "rates": (("student.network.aspp", 10.0), ("student.network.decoder", 10.0)),
        }
    )
    config.losses.cross_entropy.weight = 0.0
    config.losses.pixel_cross_entropy.weight = 1.0
    config.data.update(
        {"source": "cocostuff", "root": "data/cocostuff", "image_size": 513, "pad_label": "ignored"}
    )
    return base.finish(config, argument)
