"""What every experiment starts from, and the miniature of any of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tat_jax import fields, losses
from tat_jax.experiment import FIELDS
from tat_jax.losses import LOSSES
from tat_jax.networks import find
from tat_jax.schedules import is_zero

TAPS = ("layer1", "layer2", "layer3", "layer4")
# What makes networks small that have such options.
_SMALL = ({"width": 8}, {"depth": 2, "embed_dim": 128}, {"stage_depth": 1, "stem_width": 8})
DECODER = "decoder"  # the tap of DeepLabV3+ that is distilled


def base() -> ConfigDict:
    """Return ImageNet at 224 pixels, a ResNet-18 as the student, cross-entropy alone.

    Every field, with what it means and may be, is listed by `python main.py --help`.
    """
    config = fields.defaults(FIELDS)
    # weights: a folder of converted weights, a run of main.py, or "random".
    config.student = network("resnet18", "random")
    config.teacher = network("resnet34", "weights/resnet34")
    # Σ weight · loss; weight 0 costs nothing. A loss of taps has a term for each pair of them, by name: those
    # that are listed, and any that the command line names.
    config.losses = {
        **{name: loss(name) for name, kind in LOSSES.items() if not kind.compares_taps},
        "cross_entropy": loss("cross_entropy", weight=1.0),
        "tat": {tap: loss("tat") for tap in (*TAPS, DECODER)},
        "fitnet": {tap: loss("fitnet") for tap in TAPS},
        "resized": {TAPS[-1]: loss("resized")},
        "self_similarity": {TAPS[-1]: loss("self_similarity")},
        "patch_anchor": {DECODER: loss("patch_anchor")},
    }
    return config


def network(architecture: str, weights: str, **options: Any) -> ConfigDict:
    """Return the fields of a network, with the defaults of those that are not said."""
    entry = fields.defaults(FIELDS["student"])
    entry.update({"architecture": architecture, "weights": weights, **options})
    return entry


def loss(name: str, **options: Any) -> ConfigDict:
    """Return the fields of a loss, as published unless said otherwise; its weight is the experiment's."""
    said = {option: fields.default(field) for option, field in losses.fields_of(LOSSES[name]).items()}
    return ConfigDict(said | options)


def update_losses(config: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Set losses of a config, or pairs of taps that they compare; what is not said is as published."""
    with config.unlocked():
        for name, said in changes.items():
            if LOSSES[name].compares_taps:
                for tap, options in said.items():
                    config.losses[name][tap] = loss(name, **options)
            else:
                config.losses[name] = loss(name, **said)


def study(
    seeds: Sequence[int],
    students: Mapping[str, Any],
    teacher: Mapping[str, Any] | None = None,
    **further: Any,
) -> ConfigDict:
    """Return what a config says of a study: what differs for each of its students, and for its teacher.

    Args:
        seeds: of each student.
        students: the variants, in the order of the table.
        teacher: trained first; without one the config's `teacher.weights` teach.
        further: of its other fields, as `teachers`.
    """
    said = ConfigDict({"seeds": tuple(seeds)} | ({"teacher": dict(teacher)} if teacher is not None else {}))
    for name, value in {"students": students, **further}.items():
        # A plain dictionary would be sorted.
        said[name] = ConfigDict(dict(value), sort_keys=False) if isinstance(value, Mapping) else value
    return said


def finish(config: ConfigDict, argument: str) -> ConfigDict:
    """Return `config` or, for the argument `smoke`, its miniature: a minute on two cores, without files.

    Depths, loss and optimiser stay; the networks are narrow and random, the data embedded digits.

    Raises:
        ValueError: another argument.
    """
    if argument not in ("", "smoke"):
        raise ValueError(f"the config takes the argument 'smoke' or none, not {argument!r}")
    if argument == "smoke":
        config.epochs = 1
        config.log_every = 1
        config.eval_every = 1
        for which in (config.student, config.teacher):
            which.weights = "random"
            for small in _SMALL:
                if small.keys() <= find(which.architecture).options.keys():
                    which.update(small)
        if config.task == "segmentation":
            _make_small_segmentation(config)
        else:
            config.batch_size = 16
            config.data.update(
                {"source": "digits", "labels_per_class": 3, "image_size": 64, "eval_resize": 64, "threads": 2}
            )
        if config.task == "features":  # which takes digits without their labels, but for the probe
            config.probe.update({"source": "digits", "labels_per_class": 3})
    return config


def _make_small_segmentation(config: ConfigDict) -> None:
    config.batch_size = 8
    config.data.update({"source": "digit_masks", "image_size": 65, "sbd_root": None, "threads": 2})
    if not is_zero(config.losses.patch_anchor.decoder.weight):  # of a tap of 17 × 17
        config.losses.patch_anchor.decoder.update({"patches": (4, 4), "groups": 4, "anchors": (4, 4)})
