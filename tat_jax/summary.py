"""A training in lines: what it is made of, where it begins, and what came of it, where it ends."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import experiment
from tat_jax.build import Built
from tat_jax.checkpoints import Restored
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.source import notes
from tat_jax.evaluate import describe
from tat_jax.quantities import count
from tat_jax.tasks import task_of


def opening(start: str, restored: Restored | None, differences: Sequence[str], *, is_done: bool) -> list[str]:
    """Return how a run starts, and a line for each damaged checkpoint and for each thing that changed."""
    return [
        start,
        *(f"  damaged  {line}" for line in (restored.set_aside if restored else ())),
        *(f"  changed  {line}" for line in differences),
        *(["           and nothing was trained with it"] if differences and is_done else []),
    ]


def summarize(config: ConfigDict, built: Built, data: Pipeline, eval_data: Pipeline, mesh: Mesh) -> list[str]:
    """Return a line for each part of a training, and one for each thing to note about fields and images."""
    student = built.student
    of_images = (*notes(data.source), *notes(eval_data.source))
    to_note = (*experiment.notes(config), *left_over(config, data.steps_per_epoch), *of_images)
    steps = count(data.steps_per_epoch, "step")
    return [
        f"  student  {student.name} from {student.origin['source']}, head {student.origin['head']}",
        f"  loss     {' + '.join(map(str, built.terms))}",
        f"  rate     {_rate(config, built, data.steps_per_epoch)}",
        f"  data     {count(len(data.source), 'training image')}, {len(eval_data.source):,} to validate, "
        f"{count(data.source.num_classes, 'class', 'classes')}, {steps} an epoch",
        f"  images   {built.recipe.task.preparation(config.data)}, to validate",
        *(f"  note     {line}" for line in to_note),
        f"  devices  {mesh.size} × {mesh.devices.flat[0].device_kind}",
    ]


def _rate(config: ConfigDict, built: Built, steps_per_epoch: int) -> str:
    """Say what the schedule comes to, which may be nothing in a run of so many steps."""
    learning_rate, last_step = built.recipe.learning_rate, config.epochs * steps_per_epoch - 1
    rates = learning_rate(0), config.optimizer.learning_rate, learning_rate(last_step)
    first, most, last = (f"{float(rate):.3g}" for rate in rates)
    if first == most == last:
        return f"{most} at every step"
    rises = "" if most in (first, last) else f", {most} at most"
    return f"{first} at the first step{rises}, {last} at the last"


def left_over(config: ConfigDict, steps_per_epoch: int) -> list[str]:
    """Return what to note of the last batches of a training, where they are too few for an update."""
    batches, each = config.epochs * steps_per_epoch, config.optimizer.accumulate
    if not batches % each:
        return []
    return [
        f"the last {batches % each:,} of {batches:,} batches train nothing, as they are fewer than the "
        f"optimizer.accumulate={each} of an update"
    ]


def report(config: ConfigDict, evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line for each of the evaluations that `train.run` returns, and the table of the task's."""
    task, lines = task_of(config), []
    measures = {
        which: {name.removeprefix("eval/"): row[name] for name in row if name.startswith("eval/")}
        for which, row in evaluations.items()
    }
    for which, row in evaluations.items():
        lines.append(f"{which:4}  epoch {row['epoch']:3}  {describe(task, measures[which])}")
    table = task.table(measures)
    return "\n".join([*lines, *([table] if table else [])])
