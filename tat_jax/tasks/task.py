"""What a task is: labels, the joint transform of image and label, what is counted, which measure is best."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float, Int, Integer, UInt8
from ml_collections import ConfigDict

from tat_jax.batch import Batch
from tat_jax.data.source import Label, Source
from tat_jax.networks.view import Outputs


@dataclass(frozen=True)
class Task(ABC):
    """All that is said of labels and measures; equal ones share a compiled step, so that a field is static.

    Attributes:
        titles: the measures that lines, tables and pictures show, each with what it is called there. By the
            first one a checkpoint is the best: the higher, the better.
        columns: what the table of a study shows, measures of the "first" evaluation, of the "best" one, or of
            that after the "last" epoch; none is the best measure after the last epoch.
        poor: the share of the way from chance to 1 that a trained teacher's best measure hardly misses.
        needs_head: whether it is logits that are measured.
        evaluates_first: whether a student is evaluated before its first step, too.
        unit: of the measures of `titles`: "%" of fractions, which are shown in percent; "" of other numbers.
    """

    titles: ClassVar[Mapping[str, str]]
    columns: ClassVar[Sequence[tuple[str, str]]] = ()
    poor: ClassVar[float] = 1 / 5
    needs_head: ClassVar[bool] = True
    evaluates_first: ClassVar[bool] = False
    unit: ClassVar[str] = "%"

    @classmethod
    def of(cls, config: ConfigDict) -> "Task":
        """Return the task of a config that names it."""
        return cls()

    def take(self, source: Source) -> Source:
        """Return what the task takes of a source: all, but of a task without labels the images alone."""
        return source

    @abstractmethod
    def blank_label(
        self, data: ConfigDict, source: Source, *, train: bool
    ) -> Integer[np.ndarray, "..."] | None:
        """Return what stands for the label of a row without image; all labels have its shape and type.

        An integer array without axes, or a map of integers [rows, columns]; None where there are no labels. A
        map that evaluation leaves smaller lies at its top left.

        Args:
            data: the config's.
            source: of the labels.
            train: for training; else for evaluation.
        """

    def check(self, data: ConfigDict) -> None:
        """Raise a ValueError if `data` asks for what `transform` cannot do."""
        return

    def preparation(self, data: ConfigDict) -> str:
        """Say in a few words how images are transformed to be evaluated."""
        return f"{data.image_size} × {data.image_size} pixels"

    @abstractmethod
    def transform(
        self,
        image: UInt8[np.ndarray, "height width 3"],
        label: Label,
        rng: np.random.Generator | None,
        data: ConfigDict,
    ) -> tuple[UInt8[np.ndarray, "size size 3"], Label]:
        """Transform an image and its label together, by the same box and the same flip where it is a map.

        A function of a module without JAX, made a static method, spares the processes that read half a second
        and 150 MB each, in which they would import it.

        Args:
            image: RGB. Its memory is used again for the next image.
            label: as the source has it.
            rng: is advanced, and all that is random comes from it; None is the transform of evaluation.
            data: the config's, with the `image_size` of the result.

        Raises:
            ValueError: they cannot be transformed. Whoever calls adds the name of the image.
        """

    def sizes(self, data: ConfigDict) -> dict[str, Any]:
        """Return, as JSON has it, the sizes to which evaluation brings an image, by name."""
        return {"size": data.image_size}

    def measure(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Float[Array, ""]]:
        """Return what a training step reports of its batch besides the losses.

        Args:
            outputs: the student's.
            batch: what they are of.
            teacher: the teacher's, without logits where those mean nothing; None where there is no teacher.
        """
        return {}

    @abstractmethod
    def count(self, outputs: Outputs, batch: Batch) -> dict[str, Int[Array, "..."]]:
        """Count a batch, in integers or arrays of them, which add up exactly; rows outside `where` are none.

        `count` is the number of images; `confusion` [truth, prediction], where there is one, is drawn.
        """

    @abstractmethod
    def measures(
        self, counts: Mapping[str, Int[np.ndarray, "..."]], classes: Sequence[str] | None
    ) -> dict[str, float]:
        """Return the measures of a whole split from the sums of its counts, those of `titles` at least.

        Args:
            counts: as `count` has them.
            classes: the names of the classes by their labels; None where the data has none.
        """

    def class_maps(
        self, outputs: Outputs, label: UInt8[Array, "batch rows columns"]
    ) -> UInt8[Array, "batch rows columns"] | None:
        """Return what `outputs` are as label maps like those of an evaluation, to be drawn beside them.

        Called where labels are maps; None where outputs are none.
        """
        return None

    def chance(self, num_classes: int) -> float:
        """Return the best one's measure for a network that guesses."""
        return 0.0

    @property
    def best(self) -> str:
        """Return the measure by which a checkpoint is the best."""
        return next(iter(self.titles))

    def describe(self, measures: Mapping[str, Any]) -> str:
        """Return the measures of a line, as in `top-1 83.20%  top-5 97.10%`."""
        there = {title: measures[name] for name, title in self.titles.items() if name in measures}
        return "  ".join(f"{title} {self.shown(value):.2f}{self.unit}" for title, value in there.items())

    def shown(self, measure: Any) -> Any:
        """Return measures, a number or an array of them, in the task's unit."""
        return 100 * measure if self.unit else measure

    def table(self, evaluations: Mapping[str, Mapping[str, float]]) -> str:
        """Return, as lines, the measures of evaluations, by their names, that a line has no room for."""
        return ""
