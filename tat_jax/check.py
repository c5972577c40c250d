"""What an expensive run needs, looked at before it starts: one line each."""

import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import checkpoint, distill, fields, networks, sharding, study, task, train
from tat_jax.data.pipeline import Batch, Pipeline
from tat_jax.data.sources import Example, Source, open_source
from tat_jax.networks import BuiltNetwork

T = TypeVar("T")
Found = tuple[T, str]  # what later items need, and what to say of it

_SAMPLE = 64  # images of a split
_TIMED = 3  # steps


class _Sample(NamedTuple):
    """Images of a split, read and transformed as training or evaluation does.

    Attributes:
        batch: those that could be read.
        images: of the whole split.
        num_classes: of its labels.
        speed: images/s that one thread reads.
    """

    batch: Batch
    images: int
    num_classes: int
    speed: float


class _Report:
    """Says a line of each item, and remembers whether one failed."""

    failed = False

    def look(self, item: str, find: Callable[[], Found[T]]) -> T | None:
        """Say what is found, or why it is not."""
        try:
            found, text = find()
        except (ValueError, OSError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
            self.failed = True
            self.say("FAILED", item, str(error))
            return None
        self.say("ok", item, text)
        return found

    def say(self, mark: str, item: str, text: str) -> None:
        if jax.process_index() == 0:
            print(f"{mark:10}{item:14}" + text.replace("\n", "\n" + 24 * " "), flush=True)


def run(config: ConfigDict, folder: str | Path) -> bool:
    """Look at everything that training `config` in `folder` needs, and write nothing.

    The config, the folder, the devices; images of both splits; weights; the teacher's answer to images; taps;
    of the compiled step its memory, its time and the terms of its loss. What depends on something that failed
    is left out. Of a study, whose teacher is yet to be trained, the last student is looked at, under a random
    teacher.

    Returns:
        Whether nothing failed.
    """
    report = _Report()
    if "study" in config:
        students = report.look("study", partial(_study, config))
        if not students:
            return False
        config = students[-1]
    if not report.look("config", partial(_fields, config)):
        return False
    report.look("folder", partial(_folder, config, Path(folder)))
    mesh = sharding.make_mesh()
    devices = report.look("devices", partial(_devices, config, mesh))
    to_train = report.look("train images", partial(_read, config, "train"))
    to_validate = report.look("val images", partial(_read, config, "val"))
    classes = to_train.num_classes if to_train else 1000
    student = report.look("student", partial(_student, config, classes))
    needed = task.loss_weights(config).need_teacher()
    teacher = report.look("teacher", partial(_teacher, config, classes)) if needed else None
    if (
        teacher
        and to_validate
        and teacher.origin["head"] == "trained"
        and config.teacher.weights != networks.RANDOM
    ):
        report.look("its top-1", partial(_top1, teacher, to_validate))
    if not (devices and to_train and student and (teacher or not needed)):
        report.say("left out", "taps, step", "they need what failed above")
        return False
    prepared = report.look("taps", partial(_taps, config, mesh, to_train, student, teacher))
    if prepared:
        step = report.look("memory", partial(_memory, config, mesh, prepared, to_train))
        if step:
            report.look("time", partial(_time, config, step, to_train))
            report.look("loss", partial(_loss, step, prepared))
    return not report.failed


def _study(config: ConfigDict) -> Found[list[ConfigDict]]:
    teacher, students = study.variants(config)
    for variant in (teacher, *students.values()):
        fields.check(variant)
    *_, last = students
    students[last].teacher.weights = networks.RANDOM
    return list(
        students.values()
    ), f"a teacher and {', '.join(students)}; below, {last} under a random teacher"


def _fields(config: ConfigDict) -> Found[bool]:
    fields.check(config)
    return True, "every field has a value that is allowed"


def _folder(config: ConfigDict, folder: Path) -> Found[bool]:
    changes = train.changes(config, folder)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is no folder")
    steps = checkpoint.steps(folder)
    state = f"continues from step {steps[-1]}" if steps else "starts"
    free = shutil.disk_usage(existing).free / 1e9
    return True, "\n  changed ".join([f"{folder}: {state}; {free:,.1f} GB are free", *changes])


def _devices(config: ConfigDict, mesh: Mesh) -> Found[bool]:
    sharding.check_batch_size(config.batch_size, mesh)
    each = config.batch_size // mesh.size
    return True, f"{mesh.size} × {mesh.devices.flat[0].device_kind}, {each} images on each"


class _Every:
    """Images of a source, evenly spread over it."""

    def __init__(self, source: Source, count: int):
        self.num_classes = source.num_classes
        self._source = source
        self._indices = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int).tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._indices[index]]


def _read(config: ConfigDict, split: str) -> Found[_Sample]:
    source = open_source(config.data, split)
    some = _Every(source, _SAMPLE)
    data = config.data.copy_and_resolve_references()
    data.skip_broken = True
    pipeline = Pipeline(some, data, batch_size=len(some), train=split == "train", seed=config.seed, threads=0)
    began = time.perf_counter()
    (batch,) = pipeline.epoch(0)
    speed = len(some) / (time.perf_counter() - began)
    if len(pipeline.skipped) == len(some) or (pipeline.skipped and not config.data.skip_broken):
        names = "\n  ".join(pipeline.skipped.values())
        raise ValueError(
            f"of {len(some)} images these cannot be read; mend them, or set --config.data.skip_broken:"
            f"\n  {names}"
        )
    skipped = f", {len(pipeline.skipped)} of them unreadable" if pipeline.skipped else ""
    text = (
        f"{len(source):,}, {source.num_classes:,} classes; "
        f"{len(some)} read{skipped}, {speed:,.0f} images/s a thread"
    )
    read = batch["where"]
    kept = Batch(image=batch["image"][read], label=batch["label"][read], where=read[read])
    return _Sample(kept, len(source), source.num_classes, speed), text


def _student(config: ConfigDict, classes: int) -> Found[BuiltNetwork]:
    return _network(
        networks.student(
            config.student,
            num_classes=classes,
            dtype=config.dtype,
            bn_group=config.bn_group,
            seed=config.seed,
        )
    )


def _teacher(config: ConfigDict, classes: int) -> Found[BuiltNetwork]:
    return _network(
        networks.teacher(config.teacher, num_classes=classes, dtype=config.dtype, seed=config.seed)
    )


def _network(network: BuiltNetwork) -> Found[BuiltNetwork]:
    weights = checkpoint.network_weights(network.model)
    broken = [name for name, array in weights.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"{network.origin['source']} has NaN or infinity in {', '.join(broken[:5])}")
    numbers = sum(array.size for array in weights.values())
    origin = f"from {network.origin['source']}, head {network.origin['head']}"
    return network, f"{network.arguments['architecture']} {origin}, {numbers:,} numbers"


def _top1(teacher: BuiltNetwork, sample: _Sample) -> Found[bool]:
    graph, weights = nnx.split(teacher.model)
    (batch,) = sharding.put_batches([sample.batch], sharding.make_mesh(jax.local_devices()[:1]))
    counts = jax.jit(distill.eval_step, static_argnums=0)(graph, weights, distill.Batch(**batch))
    right, count = int(counts["top1"]), int(counts["count"])
    text = f"{right} of {count} images to validate"
    if right * sample.num_classes < 2 * count:
        text += "; hardly more than by chance: are these its classes, in its order?"
    return True, text


def _taps(
    config: ConfigDict,
    mesh: Mesh,
    sample: _Sample,
    student: BuiltNetwork,
    teacher: BuiltNetwork | None,
) -> Found[task.Prepared]:
    steps = -(-sample.images // config.batch_size)
    prepared = task.prepare(config, mesh, num_classes=sample.num_classes, steps_per_epoch=steps)
    lines = []
    for tap, tat in prepared.task.weights.of_taps().items():
        shapes = [
            task.tap_shapes(network.model, config.data.image_size)[tap]
            for network in (student, teacher)
            if network
        ]
        ours, theirs = ("×".join(map(str, shape)) for shape in shapes)
        height, width, _ = shapes[0]
        lines.append(
            f"{tap}: student {ours}, teacher {theirs}, {height * width:,} positions, heads {tat.heads}"
        )
    return prepared, "\n".join(lines) or "none is compared"


class _Step(NamedTuple):
    """The compiled step, and what it needs.

    Attributes:
        program: takes state, teacher and batch.
        arguments: those three.
    """

    program: jax.stages.Compiled
    arguments: tuple[distill.TrainState, nnx.State | None, distill.Batch]


def _memory(config: ConfigDict, mesh: Mesh, prepared: task.Prepared, sample: _Sample) -> Found[_Step]:
    rows = config.batch_size // jax.process_count()
    local = jax.tree.map(lambda array: np.resize(array, (rows, *array.shape[1:])), sample.batch)
    (batch,) = sharding.put_batches([local], mesh)
    arguments = (prepared.state, prepared.teacher, distill.Batch(**batch))
    program = train.jit_train_step(prepared.task, mesh).lower(*arguments).compile()
    sizes = program.memory_analysis()
    assert sizes is not None  # every compiled step has them
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    needed -= sizes.alias_size_in_bytes
    has = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {has / 2**30:,.1f}" if has else ""
    if has and needed > has:
        raise ValueError(
            f"a step needs {needed / 2**30:,.2f}{of} GiB on each device; lower batch_size, or take bfloat16"
        )
    return _Step(program, arguments), f"a step needs {needed / 2**30:,.2f}{of} GiB on each device"


def _time(config: ConfigDict, step: _Step, sample: _Sample) -> Found[bool]:
    state, teacher, batch = step.arguments
    # The program may overwrite the state that it is given.
    state = jax.tree.map(jax.numpy.copy, state)
    seconds = []
    for _ in range(1 + _TIMED):
        began = time.perf_counter()
        state, metrics = step.program(state, teacher, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    speed = config.batch_size / float(np.median(seconds[1:]))
    whole = timedelta(seconds=round(config.epochs * sample.images / speed))
    reading = sample.speed * max(1, config.data.threads) * jax.process_count()
    each = f"{1000 * config.batch_size / speed:,.0f} ms a step, {speed:,.0f} images/s"
    text = f"{each}; {config.epochs} epochs {whole}"
    if reading < speed:
        text += f"; reading is slower: {config.data.threads} threads, about {reading:,.0f} images/s"
    return True, text


def _loss(step: _Step, prepared: task.Prepared) -> Found[bool]:
    state, teacher, batch = step.arguments
    _, metrics = step.program(jax.tree.map(jax.numpy.copy, state), teacher, batch)
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    weights = prepared.task.weights
    terms = weights.of_logits() | {f"tat_{tap}": tat.weight for tap, tat in weights.of_taps().items()}
    said = [f"{weight:g}·{values[name]:.4g} ({name})" for name, weight in terms.items()]
    text = f"{values['loss']:.4g} = {' + '.join(said)}; gradient {values['gradient_norm']:.3g}"
    broken = [name for name in (*terms, "loss", "gradient_norm") if not np.isfinite(values[name])]
    if broken:
        raise FloatingPointError(f"at the first step not a number: {', '.join(broken)}; {text}")
    return True, text
