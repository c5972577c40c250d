"""What a training is made of, in the lines that it begins with."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax.build import Built
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.source import notes


def summarize(config: ConfigDict, built: Built, data: Pipeline, eval_data: Pipeline, mesh: Mesh) -> list[str]:
    """Return a line for each part of a training, and one for each thing to note about its images."""
    student = built.student
    return [
        f"  student  {student.name} from {student.origin['source']}, head {student.origin['head']}",
        f"  loss     {' + '.join(map(str, built.terms))}",
        f"  data     {len(data.source):,} training images, {len(eval_data.source):,} to validate, "
        f"{data.source.num_classes} classes, {data.steps_per_epoch:,} steps an epoch",
        f"  images   {built.recipe.task.preparation(config.data)}, to validate",
        *(f"  note     {line}" for of in (data, eval_data) for line in notes(of.source)),
        f"  devices  {mesh.size} × {mesh.devices.flat[0].device_kind}",
    ]
