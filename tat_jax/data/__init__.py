"""From files to batches: `sources` finds images, `transforms` crops them, `pipeline` batches them."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tat_jax.data.image_folder import FOLDERS
from tat_jax.data.sources import SOURCES
from tat_jax.fields import (
    FOLDER,
    TEXT,
    YES_OR_NO,
    Field,
    Fields,
    Rule,
    is_number,
    numbers,
    one_of,
    or_none,
    whole,
)


def eval_resize(data: ConfigDict | Mapping[str, Any]) -> int:
    """Return the shorter side from which evaluation cuts the centre.

    Unsaid it is torchvision's share; the image itself where training has `crop_padding`.
    """
    if (said := data["eval_resize"]) is not None:
        return said
    as_they_are = data.get("crop_padding") is not None
    return data["image_size"] if as_they_are else round(data["image_size"] * 256 / 224)


# Whose labels are numbers.
_WITH_CLASSES = ("imagefolder", "webdataset", "tfds", "digits", "cifar10", "cifar100")
_CROPPED = ("source", one_of(*_WITH_CLASSES, "images"))  # whose crops show a part of the image
_MAPPED = ("source", one_of("voc", "cocostuff", "label_folder", "digit_masks"))  # whose labels are maps
# Whose images are files.
_ENCODED = (
    "source",
    one_of("imagefolder", "images", "webdataset", "tfds", "voc", "cocostuff", "label_folder"),
)
_PART = Rule("a number between 0 and 1, neither of them", lambda value: is_number(value) and 0 < value < 1)
_RANGE = numbers(2, "two numbers greater than 0, the second not less", lambda low, high: 0 < low <= high)

FIELDS = {
    "source": Field("imagefolder", one_of(*SOURCES), "where the images come from"),
    "root": Field(
        "data/imagenet",
        FOLDER,
        "holds train/ and val/; for tfds its data_dir; for images any folder or list of them; for cifar "
        "the official .tar.gz, too",
        may_change=True,
    ),
    "held_out": Field(
        0.05,
        _PART,
        "the share of the images, evenly spaced, that evaluation has where root has no train/ and val/",
        only_with=("source", one_of("images")),
    ),
    "held_out_of_training": Field(
        float,
        or_none(_PART),
        "the share of the training images, evenly spaced, that is measured at each evaluation, to choose by, "
        "and not trained on; None: all are trained on",
        only_with=("source", one_of(*_WITH_CLASSES)),
        optional=True,
    ),
    "tfds_name": Field("imagenet2012", TEXT, "the data set", only_with=("source", one_of("tfds"))),
    "labels_per_class": Field(
        int,
        or_none(whole(1)),
        "train on the first so many of each class; None: all",
        only_with=("source", one_of("digits")),
    ),
    "classes": Field(
        str,
        or_none(one_of(FOLDERS)),
        "'folders' numbers the folders; None: so, but ImageNet's 1,000 if all are its ids",
        only_with=("source", one_of("imagefolder")),
    ),
    "sbd_root": Field(
        str,
        or_none(FOLDER),
        "SBD's folder benchmark_RELEASE, whose images train beside VOC's; None: VOC's alone",
        may_change=True,
        only_with=("source", one_of("voc")),
    ),
    "ignore_label": Field(
        255,
        whole(0),
        "the index of pixels of no class",
        only_with=("source", one_of("label_folder")),
    ),
    "image_size": Field(224, whole(1), "height and width of what networks see"),
    "eval_resize": Field(
        int,
        or_none(whole(1)),
        "the shorter side from which evaluation cuts the centre; None: image_size · 256 / 224, or "
        "image_size with crop_padding",
        none_is=eval_resize,
        only_with=_CROPPED,
    ),
    "crop_scale": Field(
        (0.08, 1.0),
        numbers(
            2,
            "two numbers greater than 0 and up to 1, the second not less",
            lambda low, high: 0 < low <= high <= 1,
        ),
        "range of a training crop's share of the image's area",
        may_change=True,
        only_with=_CROPPED,
    ),
    "crop_ratio": Field(
        (3 / 4, 4 / 3),
        _RANGE,
        "range of its width / height",
        may_change=True,
        only_with=_CROPPED,
    ),
    "crop_padding": Field(
        int,
        or_none(whole(1)),
        "zeros around training images, of which crops as large as these are cut; None: crops of any size",
        may_change=lambda before, after: None not in (before, after),
        optional=True,
        only_with=_CROPPED,
    ),
    "flip": Field(True, YES_OR_NO, "mirror half of the training images", may_change=True),
    "scale_range": Field(
        (0.5, 2.0),
        _RANGE,
        "times image_size, range of the shorter side from which a training crop is cut",
        may_change=True,
        only_with=_MAPPED,
    ),
    "pad_label": Field(
        "background",
        one_of("background", "ignored"),
        "what a training crop is labelled beyond its image",
        may_change=True,
        only_with=_MAPPED,
    ),
    "blur": Field(True, YES_OR_NO, "blur half of the training crops", may_change=True, only_with=_MAPPED),
    "exif_orientation": Field(
        False,
        YES_OR_NO,
        "turn and mirror images as their EXIF says; label maps stay as they are",
        only_with=_ENCODED,
    ),
    "grey_range": Field(
        tuple,
        or_none(numbers(2, "two numbers, the second greater", lambda black, white: black < white)),
        "of grey of more than 8 bits: the levels that are black and white; None: least and most of the type",
        only_with=_ENCODED,
    ),
    "processes": Field(
        int,
        or_none(whole(0)),
        "that read, with `threads` each; 0: the training itself; None: as the devices and cores ask for",
        may_change=True,
    ),
    "threads": Field(16, whole(0), "that read ahead; 0 reads between the steps", may_change=True),
    "skip_broken": Field(False, YES_OR_NO, "go on without images that do not decode", may_change=True),
}

_PROBED = ("source", Rule("a source", lambda value: value is not None))
# Labelled images by which task=features measures what features are good for.
PROBE: Fields = {
    "source": Field(
        str, or_none(one_of(*_WITH_CLASSES)), "labelled images to measure features by; None: there are none"
    ),
    "root": FIELDS["root"]._replace(
        meaning="holds their train/ and, if there is one, val/", only_with=_PROBED
    ),
    **{name: FIELDS[name] for name in ("tfds_name", "labels_per_class", "classes")},
    "student_tap": Field(
        "pooled", TEXT, "the student's features, of maps and tokens their mean over positions"
    ),
    "teacher_tap": Field("pooled", TEXT, "the teacher's likewise"),
}
