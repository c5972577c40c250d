"""The losses against labels: of images, and of the pixels of images.

Computed in float32 at least.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from tat_jax.batch import Batch, MixedLabels, Where
from tat_jax.fields import SHARE, YES_OR_NO, Field
from tat_jax.losses.loss import Loss, labels_of, logits_of
from tat_jax.networks.layers import at_least_float32
from tat_jax.networks.view import Outputs


def cross_entropy(
    logits: Float[Array | np.ndarray, "batch classes"],
    labels: Int[Array | np.ndarray, " batch"],
    *,
    label_smoothing: float = 0.0,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean of −log softmax(logits)[label], in nats.

    With `label_smoothing` ε it is (1 − ε) of that and ε of the mean over all classes, as PyTorch's
    CrossEntropyLoss has it.

    Raises:
        ValueError: logits and labels do not have one row per image each.
    """
    return jnp.mean(cross_entropies(logits, labels, label_smoothing=label_smoothing), where=where)


def cross_entropies(
    logits: Float[Array | np.ndarray, "batch classes"],
    labels: Int[Array | np.ndarray, " batch"],
    *,
    label_smoothing: float = 0.0,
) -> Float[Array, " batch"]:
    """Return −log softmax(logits)[label] of each image, as in `cross_entropy`."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits [batch, classes] and labels [batch] do not match: {logits.shape} and {labels.shape}"
            + "; the loss of maps is pixel_cross_entropy" * (logits.ndim == 4)
        )
    log_p = nnx.log_softmax(jnp.asarray(logits).astype(at_least_float32(logits.dtype)))
    of_labels = -jnp.take_along_axis(log_p, jnp.asarray(labels)[:, None], axis=1)[:, 0]
    if label_smoothing == 0:
        return of_labels
    return (1 - label_smoothing) * of_labels - label_smoothing * jnp.mean(log_p, axis=1)


def pixel_cross_entropy(
    logits: Float[Array | np.ndarray, "batch height width classes"],
    labels: Integer[Array | np.ndarray, "batch height width"],
    *,
    divide_by_batch: bool = True,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean of −log softmax(logits)[label] over the batch's labelled pixels, in nats.

    As the published segmentation code has it, the mean is divided by the number of images once more. Pixels
    whose label is no class, as 255 (`label_maps.IGNORED`), do not count; without any other, the loss is 0.

    Args:
        logits: of each pixel.
        labels: its class.
        divide_by_batch: False leaves the mean as it is.
        where: the images that count.

    Raises:
        ValueError: logits and labels are not of the same images and size.
    """
    if logits.ndim != 4 or labels.shape != logits.shape[:3]:
        raise ValueError(
            "logits [batch, height, width, classes] and labels [batch, height, width] do not match: "
            f"{logits.shape} and {labels.shape}"
        )
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    exact = at_least_float32(logits.dtype)
    counts = labels < logits.shape[3]
    images: Array | int = len(logits)
    if where is not None:
        counts &= jnp.asarray(where)[:, None, None]
        images = jnp.maximum(jnp.sum(where), 1).astype(exact)
    # A comparison that XLA computes where it is summed: no one-hot labels, and no scatter for the gradient.
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3)
    is_label = classes == labels[..., None].astype(jnp.int32)
    logits = logits.astype(exact)
    of_pixels = jax.nn.logsumexp(logits, axis=-1) - reduce(
        jnp.where(is_label, logits, 0), "b h w c -> b h w", "sum"
    )
    mean = jnp.sum(of_pixels, where=counts) / jnp.maximum(jnp.sum(counts), 1).astype(exact)
    return mean / images if divide_by_batch else mean


class CrossEntropy(Loss):
    """The cross-entropy of the student's logits with the labels; of mixed images with both, by share."""

    name: ClassVar[str] = "cross_entropy"
    options: ClassVar[Mapping[str, Field]] = {
        "label_smoothing": Field(
            0.0, SHARE, "of a label, spread evenly over all classes", may_change=True, optional=True
        )
    }
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    takes_mixed_labels: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def __init__(self, *, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return −log softmax(logits)[label] of each image, smoothed as in `cross_entropy`."""
        logits = logits_of(student)
        if isinstance(batch.label, MixedLabels):
            share = jnp.asarray(batch.label.share)
            first, second = (self._values(logits, labels) for labels in batch.label[:2])
            return share * first + (1 - share) * second
        return self._values(logits, labels_of(batch))

    def _values(self, logits: Array, labels: Array | np.ndarray) -> Float[Array, " batch"]:
        return cross_entropies(logits, labels, label_smoothing=self.label_smoothing)


class PixelCrossEntropy(Loss):
    """The cross-entropy of the student's logits of each pixel with its label, as `pixel_cross_entropy`."""

    name: ClassVar[str] = "pixel_cross_entropy"
    options: ClassVar[Mapping[str, Field]] = {
        "divide_by_batch": Field(
            True, YES_OR_NO, "divide the mean by the images of a batch, as published", optional=True
        )
    }
    needs_labels: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def __init__(self, *, divide_by_batch: bool = True):
        self.divide_by_batch = divide_by_batch

    def __call__(self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool) -> Float[Array, ""]:
        """Return the loss of the batch: every pixel counts alike, not every image."""
        return pixel_cross_entropy(
            logits_of(student), labels_of(batch), divide_by_batch=self.divide_by_batch, where=batch.where
        )
