"""PyTorch's weights in, and a student's weights out: `python -m tat_jax.convert --help`."""

import argparse
import os
import sys
from pathlib import Path

# And nothing heavy, so that --help answers at once.
from tat_jax import buckets, failures, outputs, paths, signals


def main(arguments: list[str] | None = None) -> None:
    """Convert what the command line names."""
    parser = _parser()
    options = parser.parse_args(arguments)
    of_conversion = ("to", "file", "head", "ema", "prefix")
    unused = of_conversion if options.export else ("checkpoint", "student")
    given = ["--from" if name == "file" else f"--{name}" for name in unused if getattr(options, name)]
    if given:
        parser.error(f"no meaning {'with' if options.export else 'without'} --export: {', '.join(given)}")
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # Orbax reports every step of every save, and prints what it raises
    try:
        if options.export:
            _export(buckets.place(paths.expand(options.what)), options)
        else:
            _convert(parser, options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {failures.explain(error)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tat_jax.convert",
        description="Convert PyTorch's weights of a network, or export those of a run.",
    )
    parser.add_argument(
        "what",
        metavar="ARCHITECTURE|RUN",
        help="a network, as resnet18 (a wrong one is answered with all); with --export, a run or weights",
    )
    parser.add_argument("--to", type=_path, help="the folder for the converted weights")
    parser.add_argument(
        "--from",
        dest="file",
        metavar="FILE",
        type=_path,
        help="a checkpoint of PyTorch or safetensors with torchvision's or timm's names, for a ViT or "
        "ConvNeXt also Hugging Face's, for a deeplab those of jfzhang95/pytorch-deeplab-xception; or an "
        "index of several, or their folder, instead of a download",
    )
    parser.add_argument(
        "--head",
        choices=["fresh", "none"],
        help="convert the backbone, and start a head afresh, or have none",
    )
    parser.add_argument("--ema", action="store_true", help="take the moving average beside the weights")
    parser.add_argument("--prefix", help="take the network whose names begin so, where the file has several")
    parser.add_argument("--export", type=_path, metavar="FILE", help="write RUN's student to this file")
    parser.add_argument(
        "--student", metavar="FILE.py:FUNCTION", help="builds RUN's student, if it is your own"
    )
    parser.add_argument(
        "--checkpoint",
        choices=["best", "last", "best_ema", "last_ema"],
        help="of RUN, to export, its student or the moving average of it; the best if not said",
    )
    return parser


def _path(text: str) -> Path:
    try:
        return paths.local(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _export(run: buckets.Place, options: argparse.Namespace) -> None:
    from tat_jax.config_files import load_builder
    from tat_jax.export import export

    student = load_builder(options.student) if options.student else None
    exported = export(run, options.export, options.checkpoint, student=student)
    names = "the names of its attributes" if student else "its names in PyTorch"
    print(f"{options.export}: {exported.entries} entries under {names}, from {exported.folder}")
    if exported.usage:
        print(f"{exported.usage}: its classes, and the size, mean and standard deviation of its images")
    if exported.head == "none":
        print("it has no head, and gives no logits")
    elif exported.head != "trained":
        print(f"its head is {exported.head}: its logits mean nothing")


def _convert(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    import math

    import numpy as np

    from tat_jax.networks import ARCHITECTURES
    from tat_jax.usage import usage_of_imagenet
    from tat_jax.weights import store
    from tat_jax.weights.files import read_entries
    from tat_jax.weights.names import convert_entries
    from tat_jax.weights.published import fetch_weights

    if options.what not in ARCHITECTURES:
        parser.error(f"no architecture {options.what!r}; there are {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[options.what]
    if options.file is None and architecture.published is None:
        fetch_weights(options.what, None, architecture.found_at)  # says where they are
    if options.to is None:
        parser.error("--to says where the converted weights go")
    if options.to.exists():
        raise FileExistsError(f"{options.to} exists already; remove it or name another folder")
    file = options.file or fetch_weights(options.what, architecture.published)
    network = convert_entries(
        read_entries(file),
        options.what,
        head=options.head,
        prefix=options.prefix,
        ema=options.ema,
        source=str(file),
    )
    if options.file is None and options.head is None:
        network = network._replace(usage=usage_of_imagenet(architecture.resize))
    store.save_network(options.to, network)
    parameters = sum(math.prod(np.shape(array)) for array in network.weights.values())
    print(
        f"{options.to}: {options.what}, {len(network.weights)} entries, {parameters:,} numbers, from {file}"
    )
    if "taken" in network.origin:
        print(network.origin["taken"])
    if network.origin["head"] != "trained":
        said = {"fresh": "its head is fresh", "none": "it has no head"}[network.origin["head"]]
        print(f"{said}: terms on logits refuse it as a teacher, TaT does not need it")


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # which does it all, wherever the training is to be
    outputs.keep()
    signals.act_at_once()
    main()
