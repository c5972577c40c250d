"""Confusion matrices [truth, prediction]: counted on devices, exact, and what is measured by them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer, UInt8


def confusion(
    truth: UInt8[Array, "batch height width"], prediction: Int[Array, "batch height width"], classes: int
) -> Int[Array, "batch classes classes"]:
    """Count the pixels of each image by their class and what was predicted.

    Args:
        truth: labels from `classes` on do not count.
        prediction: −1, of logits that are no numbers, counts as the class after the true one: as wrong.
        classes: how many.
    """
    label = truth.astype(jnp.int32)
    prediction = jnp.where(prediction < 0, (label + 1) % classes, prediction)
    cells = jnp.where(label < classes, label * classes + prediction, classes**2).reshape(len(truth), -1)

    # A scatter: on two cores, products of one-hot vectors take twenty times as long.
    def count(cells: Array) -> Array:
        return jnp.zeros(classes**2, jnp.int32).at[cells].add(1, mode="drop")

    return jax.vmap(count)(cells).reshape(-1, classes, classes)


def ious(confusion: Integer[np.ndarray, "classes classes"]) -> dict[int, float]:
    """Return the intersection over union of each class that occurs: n_cc / (Σ n_c· + Σ n_·c − n_cc)."""
    right, union = np.diagonal(confusion), confusion.sum(1) + confusion.sum(0) - np.diagonal(confusion)
    return {c: float(right[c] / union[c]) for c in np.flatnonzero(union).tolist()}


def measures(confusion: Integer[np.ndarray, "classes classes"]) -> Mapping[str, float]:
    """Return what segmentation is measured by, as Long et al. (2015, arXiv:1411.4038) define it.

    n_tp pixels of class t are predicted as p; t_c = Σ_p n_cp.

    - `miou`: mean of the IoU over classes that occur, as truth or as prediction.
    - `pixel_accuracy`: Σ_c n_cc / Σ_c t_c.
    - `class_accuracy`: mean of n_cc / t_c over classes that occur as truth.
    - `frequency_weighted_iou`: Σ_c t_c · IoU_c / Σ_c t_c.

    Raises:
        ValueError: no pixel was counted.
    """
    right, pixels = np.diagonal(confusion), confusion.sum(1)
    total, there = pixels.sum(), pixels > 0
    if not total:
        raise ValueError("no pixel has a class, so that nothing can be measured: are all labels ignored?")
    of_classes = ious(confusion)
    return {
        "miou": float(np.mean(list(of_classes.values()))),
        "pixel_accuracy": float(right.sum() / total),
        "class_accuracy": float(np.mean(right[there] / pixels[there])),
        "frequency_weighted_iou": float(sum(pixels[c] * iou for c, iou in of_classes.items()) / total),
    }
