"""What every experiment starts from, and the miniature of any of them."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def base() -> ConfigDict:
    """Return ImageNet at 224 pixels, a ResNet-18 as the student, cross-entropy alone."""
    config = ConfigDict()
    config.seed = 0
    config.epochs = 100
    config.batch_size = 256  # images a step, over all devices
    config.dtype = "float32"  # of activations: or bfloat16; parameters, statistics and losses stay float32
    config.bn_group = placeholder(int)  # images over which BatchNorm takes its statistics; None: the batch
    config.eval_every = 1  # epochs
    config.log_every = 50  # steps
    config.steps_left_out = 0  # go on without so many steps whose loss or gradient is not finite
    config.checkpoint_minutes = 15.0  # within an epoch; one is always saved after an evaluation

    # weights: a folder of converted weights, a run of main.py, or "random".
    config.student = network("resnet18", "random")
    config.teacher = network("resnet34", "weights/resnet34")

    # alpha · cross-entropy + beta · temperature² · KL(teacher ‖ student); beta None is 1 - alpha.
    config.loss = ConfigDict({"alpha": 1.0, "beta": placeholder(float), "temperature": 1.0})
    # + weight · TaT, for each tap of student and teacher of the same name. Weight 0 costs nothing.
    config.tat = ConfigDict({tap: tat() for tap in ("layer1", "layer2", "layer3", "layer4")})

    config.optimizer = ConfigDict(
        {
            "name": "adamw",  # or sgd
            "learning_rate": 1.6e-3,
            "weight_decay": 5e-4,
            "momentum": 0.9,  # of sgd
            "milestones": (30, 60, 90),  # epochs after which the rate is multiplied by gamma
            "gamma": 0.1,
            "clip_norm": placeholder(float),  # of the whole gradient; None: no clipping
            "accumulate": 1,  # batches an update
        }
    )
    config.data = ConfigDict(
        {
            "source": "imagefolder",  # or tfds, digits
            "root": "data/imagenet",  # holds train/ and val/; for tfds its data_dir
            "tfds_name": "imagenet2012",
            "labels_per_class": placeholder(int),  # of digits: train on the first so many of each class
            "image_size": 224,
            "eval_resize": 256,
            "crop_scale": (0.08, 1.0),
            "crop_ratio": (3 / 4, 4 / 3),
            "flip": True,
            "threads": 16,
            "skip_broken": False,  # go on without images that do not decode
        }
    )
    return config


def network(architecture: str, weights: str, *, small_images: bool = False, width: int = 64) -> ConfigDict:
    """Return the fields that name a network."""
    return ConfigDict(
        {"architecture": architecture, "weights": weights, "small_images": small_images, "width": width}
    )


def tat() -> ConfigDict:
    """Return the fields of the TaT loss on one tap, as published; its weight is the experiment's."""
    return ConfigDict(
        {
            "weight": 0.0,
            "heads": 1,
            "embedding_kernel": 3,  # of query and value; 1; or 0: the student's map itself
            "trainable_key": False,  # embed the key as well
            "per_teacher_position": False,  # the softmax of the paper's text, not that of the published code
        }
    )


def finish(config: ConfigDict, argument: str) -> ConfigDict:
    """Return `config` or, for the argument `smoke`, its miniature: a minute on two cores, without files.

    Depths, loss and optimiser stay; the networks are narrow and random, the data embedded digits.

    Raises:
        ValueError: another argument.
    """
    if argument not in ("", "smoke"):
        raise ValueError(f"the config takes the argument 'smoke' or none, not {argument!r}")
    if argument == "smoke":
        config.epochs = 1
        config.batch_size = 16
        config.log_every = 1
        config.eval_every = 1
        config.student.weights = config.teacher.weights = "random"
        config.student.width = config.teacher.width = 8
        config.data.update(
            {"source": "digits", "labels_per_class": 3, "image_size": 64, "eval_resize": 64, "threads": 2}
        )
    return config
