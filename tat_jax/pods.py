"""A training on a pod of TPUs that is not here: what it takes of memory and, by the chips' peaks, of time.

Each function returns what it finds in words, and what the next one needs.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from tat_jax import inspection, networks, sharding, topology
from tat_jax.build import Built, build
from tat_jax.compiled import Program
from tat_jax.data.pipeline import source_of
from tat_jax.data.source import SPLITS, class_names
from tat_jax.losses import Own
from tat_jax.networks import Network, OwnNetwork
from tat_jax.quantities import count, duration, size
from tat_jax.topology import Pod

_Found = TypeVar("_Found")
_FULL = 15 / 16  # of its memory that a program takes of a device, or more: no larger batch is looked for
_TWICE = 1.01  # times its operations an image, or more: a program computes activations twice to save memory


class Data(NamedTuple):
    """How many images a training and an evaluation have, of which classes, and the largest of label maps."""

    train: int
    val: int
    num_classes: int
    classes: Sequence[str] | None
    largest: tuple[int, int] | None = None


IMAGENET = Data(1_281_167, 50_000, 1_000, None)
# Of data that is not here, by its source.
_KNOWN = {
    "imagefolder": ("ImageNet", IMAGENET),
    "webdataset": ("ImageNet", IMAGENET),
    "tfds": ("ImageNet", IMAGENET),
    "voc": ("VOC", Data(10_582, 1_449, 21, None, (500, 500))),
    "cocostuff": ("COCO-Stuff", Data(9_000, 1_000, 182, None, (640, 640))),
}


def describe_pod(config: ConfigDict, pod: Pod) -> tuple[str, Pod]:
    """Say what a pod is, and how its devices share a batch.

    Raises:
        ValueError: they cannot share it evenly.
    """
    sharding.check_batch_size(config.batch_size, pod.mesh)
    kind, device = pod.mesh.devices.flat[0].device_kind, pod.device
    chips = "" if pod.chips == pod.mesh.size else f" on {pod.chips} chips"
    return (
        f"{pod.name}: {pod.mesh.size} × {kind}{chips}, {config.batch_size // pod.mesh.size} images a step on "
        f"each\none has {size(device.memory)}, {device.operations / 1e12:,.0f} TFLOP/s in bfloat16 and "
        f"{device.bandwidth / 1e9:,.0f} GB/s"
    ), pod


def find_data(config: ConfigDict) -> tuple[str, Data]:
    """Open the images that a config names, or take the numbers of ImageNet, VOC or COCO-Stuff instead.

    Raises:
        FileNotFoundError: images of one's own with label maps are not there.
        ValueError: the config does not fit them.
    """
    try:
        train, val = (source_of(config, split) for split in SPLITS)
    except FileNotFoundError as error:
        if config.data.source not in _KNOWN:
            raise
        name, found = _KNOWN[config.data.source]
        note = f"\nNOTE: {name}'s numbers are assumed, for {error}"
    else:
        largest = getattr(val, "largest", None)
        found, note = Data(len(train), len(val), train.num_classes, class_names(train), largest), ""
    return (
        f"{count(found.train, 'image')} to train and {found.val:,} to validate, "
        f"{count(found.num_classes, 'class', 'classes')}{note}"
    ), found


def inspect_student(config: ConfigDict, data: Data, own: OwnNetwork | None) -> tuple[str, Network]:
    """Build the student, with random weights where its own are not here, and say what it is.

    Raises:
        ValueError: its weights are another network's, or not finite.
    """
    return _with_weights_or_without(
        config, "student", lambda config: inspection.inspect_student(config, data.num_classes, own)
    )


def inspect_teacher(
    config: ConfigDict, data: Data, own: OwnNetwork | None, losses: Own | None
) -> tuple[str, Network | None]:
    """Build the teacher likewise, where a term of the loss reads it."""
    return _with_weights_or_without(
        config, "teacher", lambda config: inspection.inspect_teacher(config, data.num_classes, own, losses)
    )


def _with_weights_or_without(
    config: ConfigDict, which: str, inspect: Callable[[ConfigDict], tuple[str, _Found]]
) -> tuple[str, _Found]:
    try:
        return inspect(config)
    except FileNotFoundError as error:
        without = config.copy_and_resolve_references()
        without[which].weights = networks.RANDOM
        finding, network = inspect(without)
        return f"{finding}\nNOTE: any weights give the same program: {error}", network


def build_training(
    config: ConfigDict, data: Data, student: Network, teacher: Network | None, losses: Own | None
) -> tuple[str, Built]:
    """Build what is trained, on a device of this machine, and say by which losses.

    Raises:
        ValueError: parts do not fit, and both are named.
    """
    built = build(
        config,
        sharding.make_mesh(jax.devices()[:1]),
        num_classes=data.num_classes,
        steps_per_epoch=_steps(config, data),
        classes=data.classes,
        student=student,
        teacher=teacher,
        losses=losses,
        labels=lambda: np.arange(data.train) % data.num_classes,  # of any order the program is the same
    )
    return inspection.describe_training(config, built), built


def compile_step(config: ConfigDict, data: Data, built: Built, pod: Pod) -> tuple[str, Program]:
    """Compile the training step, and say what it takes.

    Raises:
        MemoryError: more than a device has.
    """
    since = time.monotonic()
    try:
        step = topology.compile_step(built, config, pod, images=config.batch_size, source=data)
    except MemoryError as error:
        raise MemoryError(f"{error} Lower batch_size, set dtype=bfloat16 or take more chips") from error
    finding, images = _describe(step, pod, time.monotonic() - since), config.batch_size // pod.mesh.size
    if not lines_up(images, group=config.bn_group, devices=pod.mesh.size):
        finding += (
            f"\nNOTE: devices send activations, for a group of bn_group={config.bn_group} ends within the "
            f"{images} images of one; let one number be a multiple of the other"
        )
    return finding, step


def compile_evaluation(config: ConfigDict, data: Data, built: Built, pod: Pod) -> tuple[str, Program]:
    """Compile what an evaluation does with a batch likewise."""
    since = time.monotonic()
    program = topology.compile_evaluation(built, config, pod, images=config.batch_size, source=data)
    return _describe(program, pod, time.monotonic() - since), program


def reckon(
    config: ConfigDict, pod: Pod, data: Data, step: Program, evaluation: Program, price: float | None
) -> tuple[str, None]:
    """Reckon images/s, hours and cost of a training if all went by the peaks of its devices.

    Args:
        config: of the training.
        pod: on which.
        data: of which so many are trained on and evaluated.
        step: its program.
        evaluation: likewise.
        price: US dollars an hour for a chip.
    """
    seconds, binds = seconds_at_peaks(step, pod)
    steps = config.epochs * _steps(config, data)
    evaluations = _evaluations(config)
    total = seconds_in_all(config, pod, data, step, evaluation)
    dollars = total / 3600 * pod.chips * (price or 0)
    cost = "" if price is None else f", US$ {dollars:,.2f} at {price:g} a chip-hour"
    return (
        f"{1000 * seconds:,.3g} ms a step, {config.batch_size / seconds:,.0f} images/s at the peak of what "
        f"binds, {binds}\n"
        f"{count(steps, 'step')} and {count(evaluations, 'evaluation')} in {duration(total)} at least{cost}\n"
        "NOTE: no program reaches the peak; reading and sending are assumed to hide behind it"
    ), None


def seconds_in_all(config: ConfigDict, pod: Pod, data: Data, step: Program, evaluation: Program) -> float:
    """Return how long a training with its evaluations takes likewise."""
    batches = _evaluations(config) * -(-data.val // config.batch_size)
    of_training, of_evaluations = (
        calls * seconds_at_peaks(program, pod)[0]
        for calls, program in ((config.epochs * _steps(config, data), step), (batches, evaluation))
    )
    return of_training + of_evaluations


def seconds_at_peaks(program: Program, pod: Pod) -> tuple[float, str]:
    """Return how long a call takes at the peak of what binds, and what that is."""
    limits = {
        "operations": program.operations / pod.device.operations,
        "memory": program.moved / pod.device.bandwidth,
    }
    binds = max(limits, key=lambda name: limits[name])
    return limits[binds], binds


def find_largest_batch(
    config: ConfigDict, built: Built, pod: Pod, data: Data, step: Program
) -> tuple[str, int]:
    """Find the largest batch whose step fits, to a sixteenth or a group of BatchNorm, and compile it.

    No activation is computed twice for it, and it has no more images than the data. It is guessed by a line
    through the memory of the two largest batches that fit, or halfway to one that does not.
    """
    devices, limit = pod.mesh.size, pod.device.memory
    of_device = functools.partial(lines_up, group=config.bn_group, devices=devices)
    most = -(-data.train // devices)
    fits, fails = {config.batch_size // devices: step.memory}, most + 1
    while fits[largest := max(fits)] < _FULL * limit:
        finer = next(n for n in itertools.count(largest + max(1, largest // 16)) if of_device(n))
        if finer >= fails:
            break
        guess = (largest + fails) // 2 if fails <= most else min(_reaching(limit, fits), most)
        images = next((n for n in range(guess, finer, -1) if of_device(n)), finer)
        try:
            program = topology.compile_step(built, config, pod, images=images * devices, source=data)
        except MemoryError:
            fails = images
        else:
            if program.operations * config.batch_size > _TWICE * step.operations * images * devices:
                fails = images
            else:
                fits[images] = program.memory
    beyond = (
        f"; {fails * devices:,} fit only, if at all, with activations computed twice" if fails <= most else ""
    )
    return (
        f"{largest * devices:,} images a step, {largest:,} on each device, take {size(fits[largest])} of "
        f"{size(limit)}{beyond}"
    ), largest * devices


def lines_up(images: int, *, group: int | None, devices: int) -> bool:
    """Return whether no group of BatchNorm begins or ends within the images of a device, or holds them all.

    Where one does, XLA sends activations from device to device.
    """
    if not group or images * devices <= group:
        return True
    return images % group == 0 or (group % images == 0 and images * devices % group == 0)


def _reaching(limit: int, memory: Mapping[int, int]) -> int:
    """Return the images that take nearly the limit, on a line through the two largest that are known."""
    if len(memory) == 1:
        return 2 * max(memory)
    (less, its), (more, theirs) = sorted(memory.items())[-2:]
    wanted = limit * (1 + _FULL) / 2
    return more + int((wanted - theirs) * (more - less) / max(theirs - its, 1))


def _steps(config: ConfigDict, data: Data) -> int:
    return -(-data.train // config.batch_size)


def _evaluations(config: ConfigDict) -> int:
    return -(-config.epochs // config.eval_every)


def _describe(program: Program, pod: Pod, seconds: float) -> str:
    sent = ", ".join(
        f"{count(operations, kind, f'{kind}s')} of {size(carried)}"
        for kind, (operations, carried) in program.collectives.items()
    )
    return (
        f"{size(program.memory)} of {size(pod.device.memory)} on each device: {size(program.arguments)} of "
        f"arguments, {size(program.temporaries)} of temporaries, {size(program.code)} of code\n"
        f"{program.operations / 1e12:,.3g} TFLOP, {program.moved / 1e9:,.3g} GB moved; {sent or 'nothing'} "
        f"sent; compiled in {duration(seconds)}"
    )
