"""One class for each image: top-1 and top-5."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from tat_jax.batch import Batch, MixedLabels
from tat_jax.data import eval_resize
from tat_jax.data.crops import crop
from tat_jax.data.source import Source
from tat_jax.networks.view import Outputs
from tat_jax.tasks.task import Task


@dataclass(frozen=True)
class Classification(Task):
    """A label is an integer; images are transformed as torchvision's ImageNet reference does it."""

    titles: ClassVar[Mapping[str, str]] = {"top1": "top-1", "top5": "top-5"}
    transform = staticmethod(crop)

    def take(self, source: Source) -> Source:
        """Return the source.

        Raises:
            ValueError: its images have no classes.
        """
        if source.num_classes == 0:
            raise ValueError(
                "the images have no classes, which task='classification' counts: take --config.task=features"
            )
        return source

    def blank_label(self, data: ConfigDict, source: Source, *, train: bool) -> Int[np.ndarray, ""] | None:
        """Return the integer 0."""
        return np.zeros((), np.int32)

    def check(self, data: ConfigDict) -> None:
        """Raise a ValueError if the centre is larger than what it is cut from."""
        resize = eval_resize(data)
        if resize < data.image_size:
            raise ValueError(f"data.eval_resize={resize} is less than image_size={data.image_size}")

    def preparation(self, data: ConfigDict) -> str:
        """Say from which shorter side the centre of the images is cut."""
        return (
            f"{super().preparation(data)} cut from a shorter side of {eval_resize(data)} (data.eval_resize)"
        )

    def sizes(self, data: ConfigDict) -> dict[str, Any]:
        """Return the shorter side, to which images are resized, and the centre that is cut from it."""
        return {"shorter_side": eval_resize(data), "centre": data.image_size}

    def measure(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Float[Array, ""]]:
        """Return how often the student's first class is the label, and how often the teacher's first class.

        Without labels there is no first, and without a teacher that knows the same classes no second one. Of
        mixed images each of the two labels counts by its share, as in the published code of mixup.
        """
        if outputs.logits is None:
            return {}
        prediction = outputs.logits.argmax(-1)
        measured = {}
        if isinstance(batch.label, MixedLabels):
            first, second = (prediction == label for label in batch.label[:2])
            hit = batch.label.share * first + (1 - batch.label.share) * second
            measured["train_top1"] = jnp.mean(hit, where=batch.where)
        elif batch.label is not None:
            measured["train_top1"] = jnp.mean(prediction == batch.label, where=batch.where)
        theirs = teacher and teacher.logits
        if theirs is not None and theirs.shape == outputs.logits.shape:
            measured["teacher_agreement"] = jnp.mean(prediction == theirs.argmax(-1), where=batch.where)
        return measured

    def count(self, outputs: Outputs, batch: Batch) -> dict[str, Int[Array, ""]]:
        """Count the images and those whose label is among the first one and five predictions.

        Of equal logits the lower class comes first, as in a stable sort; a logit that is no number counts as
        wrong.

        Raises:
            ValueError: the network gives no logits.
        """
        logits, labels = outputs.logits, batch.label
        if logits is None or labels is None or isinstance(labels, MixedLabels):
            raise ValueError(f"nothing to classify: no {'logits' if logits is None else 'labels'}")
        of_label = jnp.take_along_axis(logits, labels[:, None], axis=1)
        tied_after = (logits == of_label) & (jnp.arange(logits.shape[1])[None] >= labels[:, None])
        rank = jnp.sum(~(logits < of_label) & ~tied_after, axis=1)
        return {
            "count": jnp.sum(batch.where),
            "top1": jnp.sum((rank < 1) & batch.where),
            "top5": jnp.sum((rank < 5) & batch.where),
        }

    def measures(
        self, counts: Mapping[str, Int[np.ndarray, "..."]], classes: Sequence[str] | None
    ) -> dict[str, float]:
        """Return the fractions of images whose label is among the first one and five predictions."""
        return {name: int(counts[name]) / int(counts["count"]) for name in self.titles}

    def chance(self, num_classes: int) -> float:
        """Return one of so many."""
        return 1 / num_classes
