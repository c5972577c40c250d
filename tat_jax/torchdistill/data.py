"""`datasets` and the loaders: where images lie, and how they are cropped and normalised."""

import os.path
from pathlib import PurePosixPath
from typing import Any

from tat_jax.torchdistill.section import Section

_FLIP = "RandomHorizontalFlip"
_TRAIN = ("RandomResizedCrop", _FLIP, "ToTensor", "Normalize")
_EVAL = ("Resize", "CenterCrop", "ToTensor", "Normalize")
# Each image counts once, whatever these say.
_OF_EVALUATION = ("batch_size", "num_workers", "random_sample")


def data(file: Section) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the data, and the mean and standard deviation that both networks want.

    Raises:
        ValueError: images are read or transformed as they cannot be here.
    """
    splits = _splits(file.section("datasets"))
    loaders = file.section("train")
    loader, evaluation = loaders.section("train_data_loader"), loaders.section("val_data_loader")
    train, val = _split(loader, *splits), _split(evaluation, *splits)
    loader.one_of("random_sample", True)
    evaluation.ignore(*_OF_EVALUATION)
    if "test_data_loader" in (tests := file.section("test")):
        _split(tests.section("test_data_loader"), val)
        tests.section("test_data_loader").ignore(*_OF_EVALUATION)
    crops, normalisation = _train_transform(splits[train])
    fields = {
        "source": "imagefolder",
        "root": _root(splits[train], "train"),
        "threads": loader.whole("num_workers", least=0),
        **crops,
        "eval_resize": _eval_transform(splits[val], crops["image_size"], normalisation),
    }
    if _root(splits[val], "val") != fields["root"]:
        raise splits[val].wrong("root", f"is not beside the training images in {fields['root']}")
    return fields, normalisation


def _splits(datasets: Section) -> dict[str, Section]:
    """Return the parameters of each split by its name for the loaders."""
    splits = {}
    for dataset in datasets.sections().values():
        dataset.ignore("name", "root")
        dataset.one_of("type", "ImageFolder")
        for split in dataset.section("splits").sections().values():
            name = split.text("dataset_id")
            if name in splits:
                raise split.wrong("dataset_id", "is another split's, too")
            splits[name] = split.section("params")
    return splits


def _split(loader: Section, *names: str) -> str:
    """Return the name of a loader's split, one of `names`, and see that the loader does nothing else."""
    loader.ignore("pin_memory")
    loader.allow("drop_last", None, False)
    for wrapped in ("cache_output", "dataset_wrapper", "batch_sampler", "collate_fn"):
        loader.allow(wrapped, None)
    return loader.one_of("dataset_id", *names)


def _root(params: Section, split: str) -> str:
    root = PurePosixPath(os.path.expanduser(params.text("root")))
    if root.name != split:
        raise params.wrong("root", f"does not end in /{split}, as a split of data.root does")
    return str(root.parent)


def _train_transform(params: Section) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of the training images' crops, and of their normalisation."""
    steps = _steps(params, _TRAIN)
    crop, flip = steps["RandomResizedCrop"], steps.get(_FLIP)
    crop.allow("interpolation", 2, "bilinear")
    crop.allow("antialias", True)
    fields = {
        "image_size": _size(crop),
        "crop_scale": tuple(crop.several("scale", float, [0.08, 1.0])),
        "crop_ratio": tuple(crop.several("ratio", float, [3 / 4, 4 / 3])),
        "flip": flip is not None,
    }
    if flip is not None and flip.number("p", 0.5) != 0.5:
        raise flip.wrong("p", "is not 0.5")
    return fields, _normalisation(steps["Normalize"])


def _eval_transform(params: Section, image_size: int, normalisation: dict[str, Any]) -> int:
    """Return the shorter side to which images are resized before their centre is cut out."""
    steps = _steps(params, _EVAL)
    steps["Resize"].allow("interpolation", 2, "bilinear")
    steps["Resize"].allow("antialias", True)
    steps["Resize"].allow("max_size", None)
    if _size(steps["CenterCrop"]) != image_size:
        raise steps["CenterCrop"].wrong("size", f"is not that of training, {image_size}")
    if _normalisation(steps["Normalize"]) != normalisation:
        raise steps["Normalize"].wrong("mean", "or std is not that of training")
    return steps["Resize"].whole("size")


def _steps(params: Section, wanted: tuple[str, ...]) -> dict[str, Section]:
    """Return the parameters of each step of a transform, which has the `wanted` ones in their order."""
    steps = params.steps("transform_params")
    names = [step.text("type") for step in steps]
    if names != [name for name in wanted if name != _FLIP or name in names]:
        raise params.wrong("transform_params", f"is not {', '.join(wanted)} but {', '.join(names)}")
    return {name: step.section("params") for name, step in zip(names, steps, strict=True)}


def _size(params: Section) -> int:
    """Return the side of a square."""
    sides = params.take("size") if isinstance(params.take("size"), list) else [params.whole("size")]
    if len(sides) not in (1, 2) or len({*map(str, sides)}) != 1 or type(sides[0]) is not int or sides[0] < 1:
        raise params.wrong("size", "is no square")
    return sides[0]


def _normalisation(params: Section) -> dict[str, Any]:
    params.ignore("inplace")
    return {name: tuple(params.several(name, float)) for name in ("mean", "std")}
