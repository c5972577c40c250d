"""Images held out of a training set: neither trained on nor lost, measured at each evaluation, chosen by."""

import pickle

import numpy as np
import pytest

from tat_jax import experiment, train
from tat_jax.configs import digits
from tat_jax.data.pipeline import open_pipeline, source_of
from tat_jax.data.source import all_labels, class_names, notes
from tat_jax.metrics import read_rows


def config_of(share=0.25):
    config = digits.get_config("smoke")
    del config.study
    config.student.width = 2
    config.data.update(
        {"image_size": 8, "eval_resize": 8, "labels_per_class": 4, "held_out_of_training": share}
    )
    return config


def test_both_parts_are_the_training_set_and_of_each_class():
    config = config_of()
    held, rest = (source_of(config, split) for split in ("held_out", "train"))
    config.data.held_out_of_training = None
    whole = source_of(config, "train")
    names = sorted(part[i].name for part in (held, rest) for i in range(len(part)))
    assert names == sorted(whole[i].name for i in range(len(whole)))
    assert (len(held), len(rest)) == (10, 30)
    assert class_names(held) == class_names(rest) == class_names(whole)
    assert [all_labels(rest)[i] for i in range(30)] == [rest[i].label for i in range(30)]
    (said,) = set(notes(rest)) - set(notes(whole))
    assert said == "10 of 40 training images, evenly spaced, are held out (data.held_out_of_training=0.25)"


def test_a_part_goes_to_other_processes():
    held = source_of(config_of(), "held_out")
    assert pickle.loads(pickle.dumps(held))[3].name == held[3].name


def test_what_is_held_out_is_read_as_it_is_evaluated():
    pipeline = open_pipeline(config_of(), "held_out")
    (batch,) = list(pipeline.epoch(0))
    (again,) = list(pipeline.epoch(1))
    np.testing.assert_array_equal(batch.image, again.image)
    assert batch.where.sum() == 10


@pytest.mark.parametrize(("share", "lacks"), [(0.001, "hold out"), (0.999, "train on")])
def test_a_share_that_leaves_one_part_empty_is_refused(share, lacks):
    with pytest.raises(
        ValueError, match=f"held_out_of_training={share} of 40 images leaves nothing to {lacks}"
    ):
        source_of(config_of(share), "train")


@pytest.mark.parametrize("share", [0.0, 1.0, "half"])
def test_what_is_no_share_is_refused(share):
    config = config_of()
    with config.data.ignore_type():
        config.data.held_out_of_training = share
    with pytest.raises(ValueError, match="held_out_of_training"):
        experiment.check(config)


def test_features_are_measured_by_a_probe_instead():
    config = config_of()
    config.task = "features"
    with pytest.raises(ValueError, match=r"task=features has .*none: set it to None, and measure by .*probe"):
        open_pipeline(config, "train")


def test_a_run_measures_it_at_each_evaluation(tmp_path, capsys):
    config = config_of()
    train.run(config, tmp_path)
    rows = [row for row in read_rows(tmp_path) if "eval/top1" in row]
    shares = [row["eval/held_out_top1"] * 10 for row in rows]
    assert len(rows) == config.epochs
    assert shares == [round(share) for share in shares]
    assert "held out top-1" in capsys.readouterr().out
