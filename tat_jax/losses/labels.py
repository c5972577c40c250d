"""The loss against labels.

Logits are `[batch, classes]`, labels `[batch]`; computed in float32 at least.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from tat_jax.batch import Batch, Where
from tat_jax.losses.loss import Loss, labels_of, logits_of
from tat_jax.networks.layers import at_least_float32
from tat_jax.networks.view import Outputs


def cross_entropy(
    logits: Float[Array | np.ndarray, "batch classes"],
    labels: Int[Array | np.ndarray, " batch"],
    *,
    where: Where | None = None,
) -> Float[Array, ""]:
    """Return the mean of −log softmax(logits)[label], in nats.

    Raises:
        ValueError: logits and labels do not have one row per image each.
    """
    return jnp.mean(cross_entropies(logits, labels), where=where)


def cross_entropies(
    logits: Float[Array | np.ndarray, "batch classes"], labels: Int[Array | np.ndarray, " batch"]
) -> Float[Array, " batch"]:
    """Return −log softmax(logits)[label] of each image, as in `cross_entropy`."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits [batch, classes] and labels [batch] do not match: {logits.shape} and {labels.shape}"
        )
    log_p = nnx.log_softmax(jnp.asarray(logits).astype(at_least_float32(logits.dtype)))
    return -jnp.take_along_axis(log_p, jnp.asarray(labels)[:, None], axis=1)[:, 0]


class CrossEntropy(Loss):
    """The cross-entropy of the student's logits with the labels."""

    name: ClassVar[str] = "cross_entropy"
    needs_labels: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return −log softmax(logits)[label] of each image."""
        return cross_entropies(logits_of(student), labels_of(batch))
