"""DeepLabV3+ over a pretrained ResNet-18 learns a folder of your own images and label maps.

From labels alone, if nothing else is said; under a teacher with `teacher.weights` and the weight of a loss
that compares the two. Cross-entropy is the plain mean over the pixels with a label.
"""

from ml_collections import ConfigDict

from tat_jax.configs import base, seg_teacher


def get_config(argument: str = "") -> ConfigDict:
    """Return the experiment; `smoke` is its miniature."""
    config = seg_teacher.get_config()
    config.epochs = 40
    config.batch_size = 8
    config.log_every = 10
    config.optimizer.update({"learning_rate": 5e-3, "schedule": "cosine"})
    config.student.update({"architecture": "deeplab_resnet18", "weights": "weights/resnet18"})
    config.teacher.update({"architecture": "deeplab_resnet34", "weights": "runs/teacher"})
    config.losses.pixel_cross_entropy.divide_by_batch = False
    config.data.update({"source": "label_folder", "root": "data/segments", "image_size": 257})
    return base.finish(config, argument)
