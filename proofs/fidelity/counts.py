"""Fifty thousand images are counted as fifty thousand, on any devices and in batches of any size."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from proofs.fidelity.claim import Claim
from proofs.program import Layout, run_everywhere
from tat_jax import sharding
from tat_jax.configs import base
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.sources import Example
from tat_jax.evaluate import evaluate
from tat_jax.networks.view import View
from tat_jax.tasks.classification import Classification

CLASSES, SIDE = 20, 2
# Divisors of 50,000 and others, one image more or less than half, and more than all.
BATCH_SIZES = (7, 256, 1000, 25_001, 60_000)
_LOGITS = 6  # distinct values, so that most labels tie with others


class Pixels:
    """Random pixels with random labels: a `Source`."""

    num_classes = CLASSES

    def __init__(self, images: int):
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (images, SIDE, SIDE, 3), np.uint8)
        self.labels = rng.integers(0, CLASSES, images)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        """Return the image `index`."""
        return Example(self.pixels[index], int(self.labels[index]), f"image {index}")


class Coarse(nnx.Module):
    """A network of whole numbers, which float32 and NumPy compute alike: (pixels · weights) mod 6."""

    def __init__(self) -> None:
        self.weights = nnx.Param(jnp.asarray(_weights(), jnp.float32))

    def __call__(self, images: Float[Array, "batch height width 3"]) -> Float[Array, "batch classes"]:
        """Return the logits."""
        pixels = jnp.round(images * 255)
        return (rearrange(pixels, "b h w c -> b (h w c)") @ self.weights[...]) % _LOGITS


def numpy_counts(source: Pixels) -> tuple[int, int]:
    """Count the labels among the first one and five of a stable sort, by NumPy alone."""
    logits = rearrange(source.pixels.astype(np.int64), "b h w c -> b (h w c)") @ _weights() % _LOGITS
    first = np.argsort(-logits, axis=1, kind="stable")
    right = first == source.labels[:, None]
    return int(right[:, :1].sum()), int(right[:, :5].sum())


def counts(images: int, batch_size: int, devices: int | None = None) -> list[int]:
    """Evaluate, and return the numbers of images, of right ones and of labels among the first five."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    data, task = base.base().data, Classification()
    data.update({"image_size": SIDE, "eval_resize": SIDE})
    pipeline = Pipeline(
        Pixels(images),
        task,
        data,
        batch_size=sharding.round_up(batch_size, mesh),
        train=False,
        seed=0,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=2,
    )
    graph, network = nnx.split(View(Coarse(), mean=(0, 0, 0), std=(1, 1, 1)))
    network = jax.device_put(network, sharding.replicated(mesh))
    found = evaluate(graph, network, task, pipeline, mesh, show=False)
    return [found.images, *(round(found.measures[name] * found.images) for name in ("top1", "top5"))]


def claims(images: int = 50_000, batch_sizes: tuple[int, ...] = BATCH_SIZES) -> list[Claim]:
    """Compare the counts of every layout with NumPy's."""
    expected = np.array([images, *numpy_counts(Pixels(images))])
    measured = {}
    for devices in (1, 3, 8):
        measured[str(Layout(1, devices))] = [counts(images, size, devices) for size in batch_sizes]
    several = Layout(2, 4)
    command = [sys.executable, "-m", "proofs.fidelity.counts", str(images), *map(str, batch_sizes)]
    measured[str(several)] = [
        row for text in run_everywhere(several, command) for row in json.loads(text.splitlines()[-1])
    ]
    sizes = ", ".join(map(str, batch_sizes))
    return [
        Claim(
            f"images, top-1 and top-5 on {layout}: largest difference of {images:,}",
            f"NumPy's stable sort; batches of {sizes}",
            float(np.abs(np.array(rows) - expected).max()),
            0,
        )
        for layout, rows in measured.items()
    ]


def _weights() -> np.ndarray:
    return np.random.default_rng(1).integers(0, _LOGITS, (SIDE * SIDE * 3, CLASSES))


def main(images: str, *batch_sizes: str) -> None:
    """Print the counts of one of several processes, a line of JSON."""
    sharding.start_processes()
    print(json.dumps([counts(int(images), int(size)) for size in batch_sizes]))


if __name__ == "__main__":
    main(*sys.argv[1:])
