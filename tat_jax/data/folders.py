"""The folder that holds the splits, on a disk or in a bucket."""

from typing import TypeAlias

from tat_jax.buckets import Bucket, Place, place
from tat_jax.data.bucket_folder import BucketFolder
from tat_jax.data.disk_folder import DiskFolder
from tat_jax.paths import expand

Folder: TypeAlias = DiskFolder | BucketFolder


def open_folder(root: str | Place, layout: str) -> Folder:
    """Return the folder that holds the splits.

    Args:
        root: its path.
        layout: where images belong, which errors say of `{root}`.
    """
    root = place(expand(str(root)))
    return BucketFolder(root, layout) if isinstance(root, Bucket) else DiskFolder(root, layout)
