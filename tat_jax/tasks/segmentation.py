"""A class for each pixel: mean intersection over union, at the images' own sizes and as published."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from tat_jax.batch import Batch, MixedLabels
from tat_jax.data.label_maps import IGNORED, OUTSIDE
from tat_jax.data.segments import segment
from tat_jax.data.source import Source, check_label_maps, largest_image, printable
from tat_jax.networks.view import Outputs
from tat_jax.tasks import confusion as matrices
from tat_jax.tasks import original_size
from tat_jax.tasks.task import Task

_MOST_PIXELS = 2**31 - 1  # of a batch, which counts of 32 bits hold
_IOU = "iou/"  # before the name of a class
_MEANS = {
    "miou": "mIoU",
    "miou_squashed": "mIoU squashed",
    "pixel_accuracy": "pixel accuracy",
    "class_accuracy": "class accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
}


@dataclass(frozen=True)
class Segmentation(Task):
    """A label is a map of classes.

    Evaluation measures twice. `miou` is the official protocol: the network's logits, which have the size of
    its squashed input (it has upsampled them itself), are interpolated once more to the image's own height
    and width and compared with the untouched label. `miou_squashed` is that of the published code: the label
    is squashed like the image, to its nearest pixels, and compared with the logits as they are.
    """

    titles: ClassVar[Mapping[str, str]] = dict(list(_MEANS.items())[:3])
    columns: ClassVar[Sequence[tuple[str, str]]] = (
        ("miou", "last"),
        ("miou", "best"),
        ("miou_squashed", "last"),
        ("miou_squashed", "best"),
    )
    # Of teachers that are right, on hard data: COCO-Stuff's has a mIoU of a third.
    poor: ClassVar[float] = 1 / 10
    transform = staticmethod(segment)

    def blank_label(
        self, data: ConfigDict, source: Source, *, train: bool
    ) -> UInt8[np.ndarray, "rows columns"]:
        """Return a map of IGNORED as large as a crop; to evaluate, one of OUTSIDE as large as any image."""
        check_label_maps(source)
        if train:
            return np.full((data.image_size, data.image_size), IGNORED, np.uint8)
        return np.full(largest_image(source), OUTSIDE, np.uint8)

    def preparation(self, data: ConfigDict) -> str:
        """Say to what images are squashed, and at which sizes predictions are scored."""
        size = super().preparation(data)
        return f"{size}, to which whole images are squashed, scored at their own sizes and at this one"

    def measure(self, outputs: Outputs, batch: Batch, teacher: Outputs | None) -> dict[str, Float[Array, ""]]:
        """Return of pixels with a class the share where the student is right, and that where both agree.

        Pixels of mixed images have two classes: of those all count, and none is right.
        """
        if outputs.logits is None:
            return {}
        prediction = original_size.best_class(outputs.logits)
        counts = jnp.broadcast_to(batch.where[:, None, None], prediction.shape)
        measured = {}
        if batch.label is not None and not isinstance(batch.label, MixedLabels):
            counts &= batch.label < outputs.logits.shape[-1]
            measured["train_pixel_accuracy"] = _share(prediction == batch.label, counts)
        theirs = teacher and teacher.logits
        if theirs is not None and theirs.shape == outputs.logits.shape:
            measured["teacher_agreement"] = _share(prediction == original_size.best_class(theirs), counts)
        return measured

    def count(self, outputs: Outputs, batch: Batch) -> dict[str, Int[Array, "..."]]:
        """Count the images, and their pixels in both confusion matrices [truth, prediction].

        `confusion` is at the images' own sizes, by one program for all, see `original_size.fold_tiles`, and
        `confusion_squashed` at the size of the logits. Of equal logits the lower class comes first; a pixel
        with a logit that is no number counts as wrong; labels that are no class do not count.

        Raises:
            ValueError: the network gives no logits, or none for each pixel; or the batch has more pixels than
                32 bits count.
        """
        logits, labels = outputs.logits, batch.label
        if logits is None or labels is None or isinstance(labels, MixedLabels):
            raise ValueError(f"nothing to segment: no {'logits' if logits is None else 'labels'}")
        if logits.ndim != 4:
            shape = " × ".join(map(str, logits.shape[1:]))
            raise ValueError(
                f"the network gives logits of {shape} for an image, and segmentation takes height × width × "
                "classes: take one that segments, as deeplab_resnet18"
            )
        classes = logits.shape[-1]
        if (pixels := max(labels.size, logits.size // classes)) > _MOST_PIXELS:
            raise ValueError(f"{pixels:,} pixels a batch are more than 32 bits count: lower batch_size")
        canvas = jnp.where(batch.where[:, None, None], labels, jnp.uint8(OUTSIDE))
        sizes = original_size.image_sizes(canvas)
        squashed = original_size.nearest(canvas, sizes, *logits.shape[1:3])
        of_squashed = matrices.confusion(squashed, original_size.best_class(logits), classes)
        return {
            "count": jnp.sum(batch.where),
            "confusion": _confusion(logits, canvas, sizes).sum(0),
            "confusion_squashed": of_squashed.sum(0),
        }

    def measures(
        self, counts: Mapping[str, Int[np.ndarray, "..."]], classes: Sequence[str] | None
    ) -> dict[str, float]:
        """Return those of `confusion.measures`, the squashed mIoU, and the IoU of each class by its name.

        Classes that are neither in a label nor predicted are left out.
        """
        found = matrices.measures(counts["confusion"])
        squashed = matrices.measures(counts["confusion_squashed"])["miou"]
        of_classes = {
            f"{_IOU}{_name(c, classes)}": iou for c, iou in matrices.ious(counts["confusion"]).items()
        }
        return {**found, "miou_squashed": squashed, **of_classes}

    def class_maps(
        self, outputs: Outputs, label: UInt8[Array, "batch rows columns"]
    ) -> UInt8[Array, "batch rows columns"] | None:
        """Return the class of each pixel of images at their own sizes, on the canvases of their labels.

        None of a network that gives no logits, or not of each pixel.
        """
        if outputs.logits is None or outputs.logits.ndim != 4:
            return None
        _, rows, columns = label.shape
        return original_size.class_maps(outputs.logits, original_size.image_sizes(label), (rows, columns))

    def chance(self, num_classes: int) -> float:
        """Return the IoU of a guess among C classes of one size: 1/C² of a picture over 2/C − 1/C² of it."""
        return 1 / (2 * num_classes - 1)

    def table(self, evaluations: Mapping[str, Mapping[str, float]]) -> str:
        """Return the IoU of each class in percent, in the order of the classes, and below it the means."""
        classes = _merged([[name for name in of if name.startswith(_IOU)] for of in evaluations.values()])
        rows = [(name.removeprefix(_IOU), name) for name in classes]
        rows += [(title, name) for name, title in _MEANS.items()]
        width = max(len(title) for title, _ in rows)
        lines = [f"{'IoU, %':{width}}" + "".join(f"{which:>8}" for which in evaluations)]
        for title, name in rows:
            cells = (f"{100 * of[name]:8.2f}" if name in of else f"{'–':>8}" for of in evaluations.values())
            lines.append(f"{title:{width}}{''.join(cells)}")
        return "\n".join(line.rstrip() for line in lines)


def _share(agree: Bool[Array, "*pixels"], counts: Bool[Array, "*pixels"]) -> Float[Array, ""]:
    """Return the share of the pixels that count where something holds; 0 of none."""
    return jnp.sum(agree & counts) / jnp.maximum(jnp.sum(counts), 1)


def _confusion(
    logits: original_size.Logits, canvas: UInt8[Array, "batch rows columns"], sizes: original_size.Sizes
) -> Int[Array, "batch classes classes"]:
    """Count the pixels of each image at its own size."""
    rows, columns = (-side % original_size.TILE for side in canvas.shape[1:])
    whole_tiles = jnp.pad(canvas, ((0, 0), (0, rows), (0, columns)), constant_values=OUTSIDE)
    classes = logits.shape[-1]

    def add(counts: Array, prediction: Array, top: Array, left: Array) -> Array:
        truth = lax.dynamic_slice(whole_tiles, (jnp.int32(0), top, left), prediction.shape)
        return counts + matrices.confusion(truth, prediction, classes)

    none = jnp.zeros((len(logits), classes, classes), jnp.int32)
    return original_size.fold_tiles(logits, sizes, add, none)


def _name(label: int, classes: Sequence[str] | None) -> str:
    """Return what a class is called; of several of one name, with its number."""
    if classes is None or label >= len(classes):
        return str(label)
    name = printable(classes[label])
    return name if list(classes).count(classes[label]) == 1 else f"{name} {label}"


def _merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """Return names that stand in several lists in one order, each once."""
    merged: list[str] = []
    for order in orders:
        place = 0
        for name in order:
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name) + 1
    return merged
