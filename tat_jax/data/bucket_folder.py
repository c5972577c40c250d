"""Images in folders of their classes, in a bucket."""

import os
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from tat_jax.buckets import Bucket
from tat_jax.data.listing import PassedOver, is_image

_AT_ONCE = 32  # classes that are listed; a page has a thousand names, and takes a tenth of a second


def class_folders(root: Bucket, split: str, passed: PassedOver) -> dict[str, str]:
    """Return the folders of a split as they are called, by their names in Unicode's composed form, sorted.

    Raises:
        FileNotFoundError: there are none.
        OSError: the bucket cannot be reached.
        ValueError: two names are the same to the eye.
    """
    folders: dict[str, str] = {}
    for folder in root.folders(split):
        name = unicodedata.normalize("NFC", folder)
        if folder[0] == ".":
            passed.hidden.append(f"{root}/{split}/{folder}")
        elif name in folders:
            raise ValueError(
                f"{root / split} has two folders of one name in two Unicode forms, {folders[name]!a} and "
                f"{folder!a}: put their images into one"
            )
        else:
            folders[name] = folder
    return folders


def check_is_there(root: Bucket, split: str) -> None:
    """Raise a FileNotFoundError unless a split has folders."""
    if not root.folders(split):
        raise FileNotFoundError(
            f"no folders in {root / split}; images belong in {root}/train/<class>/ and {root}/val/<class>/"
        )


def list_images(root: Bucket, split: str, folders: Iterable[str], passed: PassedOver) -> list[list[str]]:
    """Return the paths of the images in each folder and in all within it, in torchvision's order.

    Args:
        root: holds the splits.
        split: one of them.
        folders: of its classes.
        passed: is told of what is passed over.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        listed = pool.map(lambda folder: list(root.objects(f"{split}/{folder}")), folders)
        return [sorted(_images(root, names, passed), key=os.path.split) for names in listed]


def _images(root: Bucket, names: list[str], passed: PassedOver) -> list[str]:
    images = []
    for name in names:
        parts = name.split("/")[1:]  # without the split
        if any(part[0] == "." for part in parts if part):
            passed.hidden.append(f"{root}/{name}")
        elif is_image(name):
            images.append(name)
        else:
            passed.endings[os.path.splitext(name)[1].lower() or "without ending"] += 1
    return images
