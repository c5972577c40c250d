"""What is counted of a segmentation at the images' own sizes, beside PyTorch doing the same.

`python -m proofs.bench.evaluation [--json FILE]`. Of a batch of logits and labels of mixed sizes, both
confusion matrices, ours by one program; PyTorch's interpolates, compares and counts image by image, each at
its own size.
Memory is what the compiled program needs besides arguments and results, the rival's is that of the logits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from proofs.bench.sidebyside import Row, compare_bytes, compare_times, main
from proofs.report import announce
from tat_jax.batch import Batch
from tat_jax.data.label_maps import IGNORED, OUTSIDE, nearest
from tat_jax.networks.view import Outputs
from tat_jax.tasks.segmentation import Segmentation


class Kind(NamedTuple):
    """A data set's classes, the size of the network's input, and sizes of images, their batch."""

    name: str
    classes: int
    side: int
    sizes: tuple[tuple[int, int], ...]


KINDS = (
    Kind("CamVid", 11, 257, ((360, 480),) * 8),
    Kind("VOC", 21, 513, ((375, 500), (500, 375), (333, 500), (366, 500))),
    Kind("COCO-Stuff", 182, 513, ((480, 640), (640, 427))),
)


def measure(kinds: tuple[Kind, ...] = KINDS) -> list[Row]:
    """Compare time and memory of every kind.

    Raises:
        AssertionError: the counts are not the same.
    """
    return [row for kind in kinds for row in measure_one(kind)]


def measure_one(kind: Kind) -> list[Row]:
    """Compare one kind; the time is that of a batch."""
    what = f"{kind.name}, {len(kind.sizes)} images, {kind.classes} classes, input {kind.side}²"
    announce(what)
    logits, batch = draw(kind)
    count = jax.jit(lambda logits, batch: Segmentation().count(Outputs(logits, {}), batch))
    ours, theirs = count.lower(logits, batch).compile(), torch_count(kind, logits, batch)
    found, expected = ours(logits, batch), theirs()
    # Logits that are equal but for the last bits may be ordered otherwise.
    wrong = sum(np.abs(np.asarray(found[name]) - of).sum() for name, of in expected.items())
    assert wrong <= 1e-5 * logits.size, f"{what}: {wrong} pixels are counted otherwise"
    sizes: Any = ours.memory_analysis()
    memory = sizes.temp_size_in_bytes
    return [
        compare_times(f"time, {what}", lambda: jax.block_until_ready(ours(logits, batch)), theirs, bound=1.0),
        compare_bytes(f"memory beside the logits, {what}", memory, logits.nbytes, bound=None),
    ]


def draw(kind: Kind) -> tuple[jax.Array, Batch]:
    """Draw smooth logits, as a network has upsampled them, and labels on their canvas."""
    rng, rows = np.random.default_rng(0), len(kind.sizes)
    coarse = torch.from_numpy(rng.normal(size=(rows, kind.classes, 33, 33)).astype(np.float32))
    logits = functional.interpolate(coarse, (kind.side, kind.side), mode="bilinear", align_corners=True)
    canvas = np.full((rows, *np.max(kind.sizes, axis=0)), OUTSIDE, np.uint8)
    for place, (height, width) in zip(canvas, kind.sizes, strict=True):
        place[:height, :width] = rng.choice([*range(kind.classes), IGNORED], (height, width))
    image = jnp.zeros((rows, kind.side, kind.side, 3), jnp.uint8)
    batch = Batch(image, jnp.asarray(canvas), jnp.ones(rows, bool))
    return jnp.asarray(logits.permute(0, 2, 3, 1).numpy()), batch


def torch_count(kind: Kind, logits: jax.Array, batch: Batch) -> Callable[[], dict[str, np.ndarray]]:
    """Return a function that counts the same in PyTorch, image by image."""
    planes = torch.from_numpy(np.array(logits)).permute(0, 3, 1, 2).contiguous()
    maps = [
        torch.from_numpy(label[:height, :width].astype(np.int64))
        for label, (height, width) in zip(np.asarray(batch.label), kind.sizes, strict=True)
    ]
    places = [[torch.from_numpy(nearest(side, kind.side)) for side in size] for size in kind.sizes]

    def tally(truth: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        valid = truth < kind.classes
        cells = truth[valid] * kind.classes + prediction[valid]
        return torch.bincount(cells, minlength=kind.classes**2).reshape(kind.classes, kind.classes)

    def count() -> dict[str, np.ndarray]:
        none = torch.zeros(kind.classes, kind.classes, dtype=torch.int64)
        totals = {"confusion": none, "confusion_squashed": none.clone()}
        for of_image, label, (rows, columns) in zip(planes, maps, places, strict=True):
            own = functional.interpolate(
                of_image[None], tuple(label.shape), mode="bilinear", align_corners=True
            )
            totals["confusion"] += tally(label, own[0].argmax(0))
            totals["confusion_squashed"] += tally(label[rows][:, columns], of_image.argmax(0))
        return {name: total.numpy() for name, total in totals.items()}

    return count


if __name__ == "__main__":
    main(__doc__, measure)
