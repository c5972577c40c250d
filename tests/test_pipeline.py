"""The input pipeline: every image once, the same whatever reads it, and broken files named."""

import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from tat_jax.configs import base
from tat_jax.data import eval_resize
from tat_jax.data.pipeline import Pipeline, open_pipeline
from tat_jax.data.sources import ImageFolder
from tat_jax.data.transforms import DecodeError, eval_transform
from tat_jax.tasks.classification import Classification
from tests.images import encode, photograph
from tests.interpreter import run_python
from tests.sources import Photographs

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def make(source, *, batch_size=8, train=True, seed=0, threads=0, skip_broken=False, **options) -> Pipeline:
    data = ConfigDict(
        {
            "image_size": 8,
            "eval_resize": 10,
            "crop_scale": SCALE,
            "crop_ratio": RATIO,
            "flip": True,
            "skip_broken": skip_broken,
            "exif_orientation": False,
            "grey_range": None,
        }
    )
    return Pipeline(
        source,
        Classification(),
        data,
        batch_size=batch_size,
        train=train,
        seed=seed,
        threads=threads,
        **options,
    )


def assert_same(got, expected) -> None:
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


counts = st.integers(1, 150)
batch_sizes = st.sampled_from([4, 8, 36, 100])


class TestPipeline:
    @settings(deadline=None, max_examples=15)
    @given(count=counts, batch_size=batch_sizes, train=st.booleans(), threads=st.sampled_from([1, 4]))
    def test_the_number_of_threads_changes_nothing(self, count, batch_size, train, threads):
        source = Photographs(count)
        expected = make(source, batch_size=batch_size, train=train, threads=0).epoch(3)
        assert_same(make(source, batch_size=batch_size, train=train, threads=threads).epoch(3), expected)

    @settings(deadline=None, max_examples=15)
    @given(count=counts, batch_size=batch_sizes, train=st.booleans(), processes=st.sampled_from([2, 4]))
    def test_processes_hold_consecutive_rows_of_the_same_batches(self, count, batch_size, train, processes):
        source = Photographs(count)
        local = [
            make(source, batch_size=batch_size, train=train, process_index=i, process_count=processes).epoch(
                1
            )
            for i in range(processes)
        ]
        joined = [
            jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*local, strict=True)
        ]
        assert_same(joined, make(source, batch_size=batch_size, train=train).epoch(1))

    @settings(deadline=None, max_examples=15)
    @given(st.data(), counts, batch_sizes, st.sampled_from([0, 2]))
    def test_a_resumed_epoch_is_the_uninterrupted_one(self, data, count, batch_size, threads):
        whole = make(Photographs(count), batch_size=batch_size, threads=threads)
        start = data.draw(st.integers(0, whole.steps_per_epoch))
        resumed = make(Photographs(count), batch_size=batch_size, threads=threads)
        assert_same(resumed.epoch(2, start_step=start), list(whole.epoch(2))[start:])

    def test_resuming_reads_nothing_of_what_was_before(self):
        source = Photographs(100)
        list(make(source, batch_size=8).epoch(0, start_step=12))
        assert len(source.read) == 4

    @settings(deadline=None, max_examples=15)
    @given(count=counts, batch_size=batch_sizes, train=st.booleans())
    def test_an_epoch_has_every_image_exactly_once(self, count, batch_size, train):
        source = Photographs(count)
        batches = list(make(source, batch_size=batch_size, train=train, threads=2).epoch(0))
        assert len(batches) == -(-count // batch_size)
        assert sorted(source.read) == list(range(count))
        assert sum(batch.where.sum() for batch in batches) == count
        for batch in batches:
            assert batch.image.shape == (batch_size, 8, 8, 3)
            assert (batch.image.dtype, batch.label.dtype) == (np.uint8, np.int32)
            assert batch.where.dtype == bool
            assert not batch.image[~batch.where].any()
            assert not batch.label[~batch.where].any()

    def test_evaluation_keeps_the_order_and_changes_no_image(self):
        source = Photographs(20)
        rows = [
            (image, label)
            for batch in make(source, train=False).epoch(0)
            for image, label, where in zip(batch.image, batch.label, batch.where, strict=True)
            if where
        ]
        for i, (image, label) in enumerate(rows):
            np.testing.assert_array_equal(image, eval_transform(photograph(10, 12, i), resize=10, size=8))
            assert label == i % 7

    @pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 1}], ids=str)
    def test_another_epoch_or_seed_has_another_order_and_other_crops(self, other):
        def images_by_label(epoch=0, seed=0):
            source = Photographs(7)
            (batch,) = make(source, seed=seed).epoch(epoch)
            return source.read, batch.image[np.argsort(batch.label[:7])]

        order, images = images_by_label()
        other_order, other_images = images_by_label(**other)
        assert order != other_order
        assert all((images[i] != other_images[i]).any() for i in range(7))

    @pytest.mark.parametrize("threads", [0, 1, 4])
    def test_a_broken_file_stops_the_epoch_at_its_batch_with_its_name(self, threads):
        whole = encode(photograph())
        source = Photographs(200, {150: whole[: len(whole) // 2]})
        batches = make(source, train=False, threads=threads).epoch(0)
        start = time.monotonic()
        for _ in range(150 // 8):
            next(batches)
        with pytest.raises(DecodeError, match=r"^photograph 150: .*truncated[^\n]*$"):
            next(batches)
        assert time.monotonic() - start < 10

    @pytest.mark.parametrize("threads", [0, 3])
    def test_broken_files_can_be_skipped_and_are_counted(self, threads):
        broken = {3: b"", 40: b"<html>", 41: encode(photograph())[:300]}
        images = make(Photographs(60, broken), train=False, threads=threads, skip_broken=True)
        for _ in range(2):
            where = np.concatenate([batch.where for batch in images.epoch(0)])
            assert set(np.flatnonzero(~where[:60])) == {3, 40, 41}
        assert images.skipped == {i: f"photograph {i}" for i in broken}

    def test_a_file_that_cannot_be_read_is_no_broken_image(self, folder):
        root = folder("train/ant/1.jpg", "train/ant/2.jpg")
        source = ImageFolder(root, "train")
        (root / "train/ant/2.jpg").unlink()
        gone = r"ant/2\.jpg cannot be read \(No such file or directory\); make it readable, or take it out"
        with pytest.raises(FileNotFoundError, match=gone) as caught:
            list(make(source, threads=2, skip_broken=True).epoch(0))
        assert caught.value.errno is None  # by which a run takes it for an error of its own folder

    def test_an_abandoned_epoch_does_not_keep_the_process(self):
        done = run_python(
            """
            from tests.sources import Slow
            from tests.test_pipeline import make
            closed, kept = (make(Slow(100_000), threads=4).epoch(0) for _ in range(2))
            next(closed), next(kept)
            closed.close()
            print("done")
            """
        )
        assert done.stdout.strip() == "done"

    def test_the_parts_of_a_batch_go_by_name_and_by_number(self):
        batch = next(iter(make(Photographs(4), batch_size=4).epoch(0)))
        assert batch["image"] is batch.image is batch[0]
        assert batch["where"] is batch.where is batch[2]

    def test_files_and_arrays_give_the_same(self):
        arrays = Photographs(5)
        files = Photographs(5, {i: encode(photograph(10, 12, seed=i), "PNG") for i in range(5)})
        assert_same(make(files).epoch(0), make(arrays).epoch(0))

    def test_a_batch_that_processes_cannot_share_is_an_error(self):
        with pytest.raises(ValueError, match="batch_size=10 is not a multiple of the 4 processes"):
            make(Photographs(20), batch_size=10, process_count=4)

    def test_an_evaluation_that_cannot_crop_fails_before_it_starts(self):
        data = ConfigDict({"image_size": 64, "eval_resize": 60})
        with pytest.raises(ValueError, match=r"eval_resize=60 is less than image_size=64"):
            Pipeline(Photographs(1), Classification(), data, batch_size=1, train=True, seed=0, threads=0)

    @pytest.mark.parametrize(("size", "resize"), [(224, 256), (96, 110), (64, 73), (299, 342), (1, 1)])
    def test_evaluation_cuts_its_centre_from_torchvisions_share_unless_another_is_said(self, size, resize):
        data = base.base().data
        data.image_size = size
        assert eval_resize(data) == resize
        image = photograph(40, 60)
        derived = Classification().transform(image, 0, None, data)[0]
        data.eval_resize = resize
        np.testing.assert_array_equal(Classification().transform(image, 0, None, data)[0], derived)
        data.eval_resize = 2 * size + 3
        assert eval_resize(data) == 2 * size + 3
        assert (Classification().transform(image, 0, None, data)[0] != derived).any()
        assert f"{size} × {size} pixels cut from a shorter side of {2 * size + 3} " in (
            Classification().preparation(data)
        )

    def test_files_are_decoded_as_the_config_says(self, folder):
        root = folder("train/ant/1.png", "train/ant/2.jpg", "val/ant/1.png")
        exif = Image.Exif()
        exif[0x0112] = 3
        upright = photograph(40, 60)
        (root / "train/ant/2.jpg").write_bytes(encode(Image.fromarray(upright), exif=exif, quality=100))
        grey = np.linspace(1000, 1255, 64).astype(np.uint16).reshape(8, 8)
        (root / "train/ant/1.png").write_bytes(encode(grey, "PNG"))
        config = base.base()
        config.data.update({"root": str(root), "threads": 0, "image_size": 8, "eval_resize": 8})
        config.data.update({"grey_range": (1000, 1255), "exif_orientation": True})
        source = open_pipeline(config, "train").source
        data = Pipeline(source, Classification(), config.data, batch_size=2, train=False, seed=0, threads=0)
        (batch,) = data.epoch(0)
        np.testing.assert_array_equal(batch.image[0], np.repeat(grey[..., None] - 1000, 3, axis=-1))
        turned = eval_transform(np.ascontiguousarray(upright[::-1, ::-1]), resize=8, size=8)
        assert np.abs(batch.image[1].astype(int) - turned).mean() < 3

    def test_a_look_shows_the_crops_that_come_first_and_images_to_validate_of_all_classes(self):
        source = Photographs(200)
        (first, *_) = make(source, batch_size=16, train=True).epoch(0)
        looked = list(make(source, train=True).look(16))
        np.testing.assert_array_equal(np.stack([image for image, _, _ in looked]), first.image)
        assert [label for _, label, _ in looked] == first.label.tolist()
        names = [name for _, _, name in make(source, train=False).look(3)]
        assert names == ["photograph 0", "photograph 99", "photograph 199"]
        assert len(list(make(Photographs(5), train=False).look(16))) == 5

    def test_a_look_leaves_out_broken_files_where_the_run_does(self):
        broken = make(Photographs(3, {1: b""}), train=False, skip_broken=True)
        assert [name for _, _, name in broken.look(16)] == ["photograph 0", "photograph 2"]
        assert broken.skipped == {}
        with pytest.raises(DecodeError, match="photograph 1: the file is empty"):
            list(make(Photographs(3, {1: b""}), train=False).look(16))

    def test_a_config_opens_both_splits(self):
        from configs import digits

        config = digits.get_config()
        config.data.threads = 1
        train, val = open_pipeline(config, "train"), open_pipeline(config, "val")
        assert (len(train.source), train.steps_per_epoch) == (50, 1)
        assert (len(val.source), val.steps_per_epoch) == (797, 16)
        assert next(val.epoch(0)).image.shape == (50, 16, 16, 3)
