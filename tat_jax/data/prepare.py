"""Pack ImageNet's two tars once into ArrayRecord files: `python -m tat_jax.data.prepare --tars … --to …`.

TensorFlow Datasets does it, and needs TensorFlow for it: the extra `prepare`. Training needs neither the tars
nor TensorFlow.
"""

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tat_jax import failures, outputs, paths, signals

TARS = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")


def prepare(tars: Path, to: Path) -> dict[str, int]:
    """Write `to/imagenet2012/<version>/` and return the number of images of each split.

    Raises:
        FileNotFoundError: a tar is missing.
        ModuleNotFoundError: the extra `prepare` is not installed.
    """
    for tar in TARS:
        if not (tars / tar).is_file():
            raise FileNotFoundError(f"no file {tars / tar}; https://image-net.org/download-images has it")
    for package in ("tensorflow", "importlib_resources"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is missing; `pip install -e '.[prepare]'` installs it")
    # TensorFlow's remarks about the processor.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow_datasets as tfds

    builder = tfds.builder("imagenet2012", data_dir=to, file_format="array_record")
    with tempfile.TemporaryDirectory() as downloads:
        builder.download_and_prepare(
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(manual_dir=tars, try_download_gcs=False),
        )
    return {name: split.num_examples for name, split in builder.info.splits.items()}


def main() -> None:
    """Prepare what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tat_jax.data.prepare", description=prepare.__doc__)
    parser.add_argument("--tars", required=True, help=f"the folder of {' and '.join(TARS)}")
    parser.add_argument("--to", required=True, help="the data_dir: a run's data.root")
    arguments = parser.parse_args()
    try:
        to = paths.local(arguments.to)
        counts = prepare(paths.local(arguments.tars), to)
    except Exception as error:  # TensorFlow Datasets raises whatever its storage layers raise
        sys.exit(f"error: {failures.explain(error) or f'{type(error).__name__}: {error}'}")
    images = ", ".join(f"{count:,} images to {name}" for name, count in counts.items())
    print(f"{to}: {images}")


if __name__ == "__main__":
    outputs.keep()
    signals.act_at_once()
    main()
