"""Features: no label is learned, and k-NN and a linear probe say what they are worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from tat_jax.batch import Batch
from tat_jax.data.images import WithoutLabels
from tat_jax.data.source import Source
from tat_jax.networks.view import Outputs
from tat_jax.tasks.classification import Classification
from tat_jax.tasks.task import Task


@dataclass(frozen=True)
class Features(Classification):
    """Images are transformed as for classification, and have no labels; `probe.py` measures, not counts."""

    titles: ClassVar[Mapping[str, str]] = {"knn": "k-NN", "probe": "linear probe"}
    columns: ClassVar[Sequence[tuple[str, str]]] = (
        ("knn", "first"),
        ("knn", "last"),
        ("probe", "first"),
        ("probe", "last"),
    )
    needs_head: ClassVar[bool] = False
    evaluates_first: ClassVar[bool] = True  # what random features are worth, or pretrained ones

    @classmethod
    def of(cls, config: ConfigDict) -> Task:
        """Return the task of a config: without labelled images it measures otherwise."""
        return _Unprobed() if config.probe.source is None else cls()

    def check(self, data: ConfigDict) -> None:
        """Raise a ValueError where images are held out to be measured by logits, too."""
        super().check(data)
        if data.get("held_out_of_training") is not None:
            raise ValueError(
                "data.held_out_of_training holds out images for a head to classify, and task=features has "
                "none: set it to None, and measure by labelled images of config.probe"
            )

    def take(self, source: Source) -> Source:
        """Return the images without their labels, if they have any."""
        return WithoutLabels(source) if source.num_classes else source

    def blank_label(self, data: ConfigDict, source: Source, *, train: bool) -> None:
        """Return None: there are no labels."""

    def measure(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Float[Array, ""]]:
        """Return nothing: the losses are all that a batch tells."""
        return {}

    def count(self, outputs: Outputs, batch: Batch) -> dict[str, Int[Array, ""]]:
        """Count the images."""
        return {"count": jnp.sum(batch.where)}

    def measures(
        self, counts: Mapping[str, Int[np.ndarray, "..."]], classes: Sequence[str] | None
    ) -> dict[str, float]:
        """Return nothing: counts of batches say nothing of features."""
        return {}

    def chance(self, num_classes: int) -> float:
        """Return 0: features of random weights tell classes apart better than a guess does."""
        return 0.0

    def table(self, evaluations: Mapping[str, Mapping[str, float]]) -> str:
        """Return what the teacher's features are worth, by the same images."""
        measures: Mapping[str, Any] = next(iter(evaluations.values()), {})
        found = [
            f"{title} {measures[f'teacher_{name}']:.2%}"
            for name, title in self.titles.items()
            if f"teacher_{name}" in measures
        ]
        return f"teacher's features: {'  '.join(found)}" if found else ""


@dataclass(frozen=True)
class _Unprobed(Features):
    """Without labelled images: the losses of the images held out, and the effective rank of the features.

    The best is the least loss, which is measured as its negative: the higher, the better, as of all measures.
    """

    titles: ClassVar[Mapping[str, str]] = {
        "minus_loss": "−held-out loss",
        "effective_rank": "effective rank",
    }
    columns: ClassVar[Sequence[tuple[str, str]]] = (
        ("minus_loss", "first"),
        ("minus_loss", "last"),
        ("effective_rank", "first"),
        ("effective_rank", "last"),
    )
    unit: ClassVar[str] = ""

    def table(self, evaluations: Mapping[str, Mapping[str, float]]) -> str:
        """Return nothing more."""
        return ""
