"""A network of two layers, which compiles in a moment: the student of many processes on one machine."""

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from tat_jax.batch import Where

SIDE, WIDTH = 16, 1024


class Layers(nnx.Module):
    """Two layers.

    Args:
        num_classes: logits.
        rngs: of the initial weights.
    """

    def __init__(self, *, num_classes: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(SIDE * SIDE * 3, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, num_classes, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width 3"], *, train: bool = False, where: Where | None = None
    ) -> Float[Array, "batch classes"]:
        """Return the logits."""
        return self.head(jax.nn.relu(self.first(rearrange(images, "b h w c -> b (h w c)"))))
