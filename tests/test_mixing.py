"""Mixup and CutMix: pixels and labels by their formulas, and that padding and devices do not matter."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.mixing import Mixing, cut, mix

SEED, HEIGHT, WIDTH = 5, 12, 16


def batch_of(size, *, valid=None, dtype=np.uint8):
    rng = np.random.default_rng(size)
    image = rng.integers(0, 256, (size, HEIGHT, WIDTH, 3), dtype=np.uint8).astype(dtype)
    return Batch(image, rng.integers(0, 5, size), np.arange(size) < (size if valid is None else valid))


@functools.cache
def compiled(mixup, cutmix, seed=SEED):
    return jax.jit(functools.partial(mix, Mixing(mixup, cutmix, seed)))


def mixed(batch, step=0, *, mixup=0.0, cutmix=0.0, seed=SEED):
    return jax.device_get(compiled(mixup, cutmix, seed)(jnp.int32(step), batch))


def neighbours(rows):
    """Return rows 1, 0, 3, 2 …; the last of an odd number stays."""
    order = [min(i ^ 1, len(rows) - 1) for i in range(len(rows))]
    return rows[order]


def assert_same(batch, expected):
    for ours, theirs in zip(jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("step", range(4))
def test_mixup_is_its_formula_to_the_pixel(step):
    batch = batch_of(8)
    image, (first, second, share), _ = mixed(batch, step, mixup=0.8)[:3]
    assert len(set(share.tolist())) == 1
    (share, *_), pixels = share.astype(np.float64), batch.image.astype(np.float64)
    expected = share * pixels + (1 - share) * neighbours(pixels)
    np.testing.assert_array_equal(image, np.floor(expected + 0.5))
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(first, batch.label)
    np.testing.assert_array_equal(second, neighbours(batch.label))


def test_images_in_floating_point_are_mixed_as_they_are(x64):
    batch = batch_of(8, dtype=np.float64)
    image, (_, _, share), _ = mixed(batch, mixup=0.8)[:3]
    assert image.dtype == np.float64
    expected = share[0] * batch.image + (1 - share[0]) * neighbours(batch.image)
    np.testing.assert_allclose(image, expected, rtol=1e-15)


@pytest.mark.parametrize("step", range(6))
def test_cutmix_exchanges_one_box_whose_area_is_the_share_of_the_other_label(step):
    batch = batch_of(8)
    image, labels, _ = mixed(batch, step, cutmix=1.0)[:3]
    is_other = (image != batch.image).any((0, 3))
    rows, columns = np.flatnonzero(is_other.any(1)), np.flatnonzero(is_other.any(0))
    box = np.zeros((HEIGHT, WIDTH), bool)
    if len(rows):
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    np.testing.assert_array_equal(is_other, box)
    np.testing.assert_array_equal(image, np.where(box[None, ..., None], neighbours(batch.image), batch.image))
    np.testing.assert_allclose(labels.share, 1 - box.mean(), rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4375, 0.75, 1.0])
def test_the_box_is_that_of_the_published_code(share):
    def span(middle, side):
        length = int(side * np.sqrt(1 - share))
        return max(middle - length // 2, 0), min(middle + (length + 1) // 2, side)  # as timm rounds

    for centre in ((0, 0), (5, 9), (HEIGHT - 1, 2), (6, WIDTH - 1)):
        (top, bottom), (left, right) = span(centre[0], HEIGHT), span(centre[1], WIDTH)
        found = cut(jnp.float32(share), tuple(map(jnp.int32, centre)), HEIGHT, WIDTH)
        assert tuple(map(int, found)) == (top, bottom, left, right)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0)])
def test_shares_are_drawn_from_beta(mixup, cutmix):
    batch = batch_of(2)._replace(image=np.zeros((2, 64, 64, 3), np.uint8))
    steps = jnp.arange(2000)
    mixing = Mixing(mixup, cutmix, SEED)
    shares = jax.jit(jax.vmap(lambda step: mix(mixing, step, batch).label.share[0]))(steps)
    if mixup:
        assert shares.mean() == pytest.approx(0.5, abs=0.03)
        assert shares.var() == pytest.approx(1 / (4 * (2 * mixup + 1)), rel=0.1)  # that of Beta(α, α)
    else:  # Of a box cut by the border less is left than Beta's half.
        assert 0.5 < shares.mean() < 0.8


def test_with_both_on_each_batch_has_one_of_the_two():
    batch = batch_of(2)

    def is_cut(step):
        image, _, _ = mixed(batch, step, mixup=1.0, cutmix=1.0)[:3]
        return bool(((image == batch.image) | (image == neighbours(batch.image))).all())

    assert 8 < sum(map(is_cut, range(30))) < 22


def test_seed_and_step_decide_and_nothing_else():
    batch = batch_of(8)
    assert_same(mixed(batch, 3, mixup=1.0), mixed(batch, 3, mixup=1.0))
    share = mixed(batch, 3, mixup=1.0).label.share
    assert (mixed(batch, 4, mixup=1.0).label.share != share).all()
    assert (mixed(batch, 3, mixup=1.0, seed=SEED + 1).label.share != share).all()


@pytest.mark.parametrize("valid", [5, 6])
def test_what_does_not_count_is_mixed_into_nothing_that_does(valid):
    batch = batch_of(8, valid=valid)
    nothing = np.where(batch.where[:, None, None, None], batch.image, 0)
    image, labels, where = mixed(batch._replace(image=nothing), mixup=1.0)[:3]
    alone = mixed(Batch(*(part[:valid] for part in batch[:3])), mixup=1.0)
    assert_same((image[:valid], [part[:valid] for part in labels]), (alone.image, list(alone.label)))
    if valid % 2:  # the last has no neighbour that counts
        np.testing.assert_array_equal(image[valid - 1], batch.image[valid - 1])
        assert labels.share[valid - 1] == 1
    np.testing.assert_array_equal(where, batch.where)


def test_a_file_that_cannot_be_read_leaves_its_neighbour_alone():
    batch = batch_of(8)
    batch = batch._replace(where=np.arange(8) != 2)
    image, labels, _ = mixed(batch, cutmix=1.0, step=1)[:3]
    np.testing.assert_array_equal(image[2:4], batch.image[2:4])
    np.testing.assert_array_equal(labels.share[2:4], 1)
    np.testing.assert_array_equal(labels.second[2:4], batch.label[2:4])
    assert labels.share[0] < 1


def test_without_labels_images_are_mixed_alike():
    batch = batch_of(8)
    image, label, _ = mixed(batch._replace(label=None), mixup=1.0)[:3]
    assert label is None
    np.testing.assert_array_equal(image, mixed(batch, mixup=1.0).image)


@pytest.mark.parametrize("size", [16, 8])
def test_eight_devices_mix_as_one_to_the_bit_and_send_nothing_where_each_has_an_even_number(size):
    batch, sharded = batch_of(size), sharding.batched(sharding.make_mesh())
    step = jax.jit(functools.partial(mix, Mixing(1.0, 1.0, SEED)), out_shardings=sharded)
    spread = jax.device_put(batch, sharded)
    program = step.lower(jnp.int32(0), spread).compile().as_text()
    sent = re.findall(r"all-\w+|collective-permute|reduce-scatter", program)
    assert bool(sent) == (size == 8)
    assert_same(step(jnp.int32(0), spread), mixed(batch, mixup=1.0, cutmix=1.0))
