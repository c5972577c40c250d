"""Each pixel's class at its image's own size, from logits of another size, in tiles of bounded memory."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from tat_jax.data import label_maps
from tat_jax.data.label_maps import IGNORED, OUTSIDE
from tat_jax.networks.interpolation import aligned_places

_Carry = TypeVar("_Carry")
TILE = 64  # rows and columns
_MOST = 16  # classes compared at a time: of 32 and more, XLA's argmax on CPUs takes many times as long

Logits = Float[Array, "batch height width classes"]
Sizes = tuple[Int[Array, " batch"], Int[Array, " batch"]]


def image_sizes(canvas: UInt8[Array, "batch rows columns"]) -> Sizes:
    """Return the heights and the widths of images whose labels lie at the top left, OUTSIDE around them."""
    inside = canvas != OUTSIDE
    return inside.any(2).sum(1, dtype=jnp.int32), inside.any(1).sum(1, dtype=jnp.int32)


def best_class(logits: Float[Array, "*batch classes"]) -> Int[Array, "*batch"]:
    """Return the class of the highest logit, of equal ones the lower; −1 where one of them is no number."""
    *shape, classes = logits.shape

    def some(first: Array, count: int) -> Array:
        return lax.dynamic_slice_in_dim(logits, first, count, axis=-1)

    return _best(some, tuple(shape), classes, logits.dtype)


def _best(
    some: Callable[[Array, int], Array], shape: tuple[int, ...], classes: int, dtype: jnp.dtype
) -> Int[Array, "..."]:
    """Return likewise the best class by what `some` returns: logits of so many classes, from the first."""
    steps = -(-classes // _MOST)
    count = -(-classes // steps)

    def step(index: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        # The last ones overlap those before, and a class that comes again is no better than itself.
        first = jnp.minimum(index * count, classes - count)
        logits = some(first, count)
        highest, which = logits.max(-1), first + logits.argmax(-1).astype(jnp.int32)
        best, found = so_far
        better = (highest > best) | jnp.isnan(highest)
        return jnp.where(better, highest, best), jnp.where(better, which, found)

    none = jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, jnp.int32)
    best, found = lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, none)
    return jnp.where(jnp.isnan(best), -1, found)


def class_maps(logits: Logits, sizes: Sizes, canvas: tuple[int, int]) -> UInt8[Array, "batch rows columns"]:
    """Return the best class of each pixel of images at their own sizes, at the top left of a canvas.

    Args:
        logits: of the images.
        sizes: their heights and widths.
        canvas: rows and columns of the result, none of the images larger.

    Returns:
        OUTSIDE where a canvas has no image, and IGNORED where logits are no numbers.
    """
    rows, columns = canvas
    blank = jnp.full((len(logits), rows + -rows % TILE, columns + -columns % TILE), OUTSIDE, jnp.uint8)

    def write(maps: Array, classes: Array, top: Array, left: Array) -> Array:
        labels = jnp.where(classes < 0, IGNORED, classes).astype(jnp.uint8)
        return lax.dynamic_update_slice(maps, labels, (jnp.int32(0), top, left))

    maps = fold_tiles(logits, sizes, write, blank)[:, :rows, :columns]
    heights, widths = (size[:, None, None] for size in sizes)
    inside = (jnp.arange(rows)[None, :, None] < heights) & (jnp.arange(columns)[None, None] < widths)
    return jnp.where(inside, maps, jnp.uint8(OUTSIDE))


def fold_tiles(
    logits: Logits, sizes: Sizes, visit: Callable[[_Carry, Array, Array, Array], _Carry], carry: _Carry
) -> _Carry:
    """Visit the best classes of images at their own sizes H × W, a square tile of all of them at a time.

    Pixel (i, j) of an image is at (i·(h − 1)/(H − 1), j·(w − 1)/(W − 1)) of its h × w logits, between four of
    which it is interpolated: bilinear with aligned corners, as `torch.nn.functional.interpolate(…,
    mode="bilinear", align_corners=True)` has it. What an interpolation matrix would multiply by zero is never
    read, so that a pixel costs 4 · classes products whatever the sizes.

    One program does for images of any sizes: the number of tiles follows, while it runs, from the largest
    height and width of the batch. Its memory is that of a tile, of 64² pixels and 16 classes an image.

    Args:
        logits: of the images.
        sizes: their heights and widths; 0 of rows without an image.
        visit: takes what the tiles before gave, the classes [batch, 64, 64], −1 of no numbers, and the first
            row and column of the tile. Beyond the border of an image its last row and column go on.
        carry: what the first tile takes.
    """
    heights, widths = sizes
    columns = -(-widths.max() // TILE)
    tiles = -(-heights.max() // TILE) * columns

    def step(tile: Array, carry: _Carry) -> _Carry:
        top, left = tile // columns * TILE, tile % columns * TILE
        classes = jax.vmap(_best_of_tile, (0, 0, 0, None, None))(logits, *sizes, top, left)
        return visit(carry, classes, top, left)

    return lax.fori_loop(0, tiles, step, carry)


def _best_of_tile(
    logits: Float[Array, "h w classes"],
    height: Int[Array, ""],
    width: Int[Array, ""],
    top: Int[Array, ""],
    left: Int[Array, ""],
) -> Int[Array, "rows columns"]:
    """Return the best class of each pixel of an image's tile at its own size."""
    h, w, classes = logits.shape
    above, below, down = _neighbours(h, height, top, logits.dtype)
    before, after, along = _neighbours(w, width, left, logits.dtype)
    down, along = down[:, None, None], along[None, :, None]

    def some(first: Array, count: int) -> Array:
        def of(row: Array, column: Array) -> Array:
            return lax.dynamic_slice(logits, (row, column, first), (1, 1, count))[0, 0]

        at = jax.vmap(jax.vmap(of, (None, 0)), (0, None))
        upper = (1 - along) * at(above, before) + along * at(above, after)
        lower = (1 - along) * at(below, before) + along * at(below, after)
        return (1 - down) * upper + down * lower

    return _best(some, (TILE, TILE), classes, logits.dtype)


def _neighbours(
    has: int, wants: Int[Array, ""], first: Int[Array, ""], dtype: jnp.dtype
) -> tuple[Array, Array, Array]:
    """Return between which two of `has` places each one of a tile lies, and its way from one to the other."""
    places = jnp.minimum(first + jnp.arange(TILE, dtype=jnp.int32), jnp.maximum(wants - 1, 0))
    low, way = aligned_places(has, wants, places, dtype=dtype)
    return low, jnp.minimum(low + 1, has - 1), way


def nearest(
    canvas: UInt8[Array, "batch rows columns"], sizes: Sizes, height: int, width: int
) -> UInt8[Array, "batch {height} {width}"]:
    """Return labels of images at one size, the pixels that Pillow's `resize((width, height), NEAREST)` takes.

    Args:
        canvas: the labels at their images' sizes, at the top left.
        sizes: heights and widths of the images; what a row without an image gives is OUTSIDE.
        height: of the result.
        width: likewise.
    """
    # Tables of float64 sums, which decide between neighbours and which a device has not.
    of_rows, of_columns = (
        jnp.asarray(np.stack([label_maps.nearest(n, size) for n in range(most + 1)]).astype(np.int32))
        for most, size in zip(canvas.shape[1:], (height, width), strict=True)
    )

    def resize(label: Array, height: Array, width: Array) -> Array:
        return label[of_rows[height]][:, of_columns[width]]

    return jax.vmap(resize)(canvas, *sizes)
