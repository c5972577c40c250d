"""The published code's experiments: what a YAML of torchdistill says, as fields of a config.

The schema is torchdistill's of 2022, with what the authors of TaT added (https://github.com/sihaoevery/TaT):
the module `AttnEmbed` embeds taps, the loss `MaskedFM` compares them. Every value of a file is translated, or
changes nothing, or is refused with its name and line.
"""

from pathlib import Path
from typing import Any

from tat_jax.torchdistill import data, losses, networks, optim, yaml_file

__all__ = ["read"]


def read(path: str | Path) -> dict[str, Any]:
    """Return the fields of a config that a file sets; `batch_size` is that of one GPU.

    Raises:
        ValueError: the file cannot be read, or says what has no counterpart here.
    """
    file = yaml_file.read(path)
    models, train = file.section("models"), file.section("train")
    student = networks.student(models.section("student_model"), train.section("student"))
    teacher = networks.teacher(models.section("teacher_model"), train.section("teacher"))
    images, normalisation = data.data(file)
    precision = train.section("apex")
    precision.ignore("opt_level")
    precision.allow("requires", False)
    batch_size = train.section("train_data_loader").whole("batch_size")
    fields = {
        "epochs": train.whole("num_epochs"),
        "batch_size": batch_size,
        "bn_group": batch_size,
        "log_every": train.whole("log_freq"),
        "student": {"architecture": student.architecture, "weights": student.weights, **normalisation},
        "teacher": {"architecture": teacher.architecture, "weights": teacher.weights, **normalisation},
        "losses": losses.losses(train.section("criterion"), student, teacher),
        "optimizer": optim.optimizer(train.section("optimizer")) | optim.schedule(train.section("scheduler")),
        "data": images,
    }
    file.refuse_the_rest()
    return fields
