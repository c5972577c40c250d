"""Images that a text file lists by their ids, as PASCAL VOC, SBD and COCO-Stuff do."""

import os
from collections.abc import Sequence
from pathlib import Path

from tat_jax.data.source import some


def read_ids(file: Path, layout: str) -> list[str]:
    """Return the ids in a file, a line each.

    Args:
        file: the list.
        layout: where what belongs, which an error says.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is empty or no text.
    """
    try:
        ids = file.read_text("utf-8").split()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no file {file}; {layout}") from None
    except OSError as error:
        raise type(error)(f"{file} cannot be read ({error.strerror}); let this user read it") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no list of ids: no text in UTF-8") from None
    if not ids:
        raise ValueError(f"{file} is empty, and lists no image")
    return ids


def files_of(folder: Path, ids: Sequence[str], ending: str, layout: str) -> list[str]:
    """Return the paths of the files in a folder whose names are ids and an ending.

    Args:
        folder: holds them.
        ids: of images.
        ending: as in ".jpg".
        layout: as in `read_ids`.

    Raises:
        FileNotFoundError: there is no such folder, or some files are missing.
        OSError: the folder cannot be read.
    """
    try:
        there = set(os.listdir(folder))  # once, where asking for each would take minutes on a disk far away
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no folder {folder}; {layout}") from None
    except OSError as error:
        raise type(error)(f"{folder} cannot be read ({error.strerror}); let this user read it") from None
    if missing := [f"{one}{ending}" for one in ids if f"{one}{ending}" not in there]:
        raise FileNotFoundError(f"{folder} lacks {len(missing):,} of {len(ids):,} files: {some(missing)}")
    return [os.path.join(folder, f"{one}{ending}") for one in ids]
