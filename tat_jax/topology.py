"""A pod of TPUs that is not here: which chips it has, and what their compiler says of a program.

libtpu compiles for every pod on any Linux machine; no accelerator is looked for.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tat_jax import paths, sharding
from tat_jax.batch import Batch
from tat_jax.build import Built, teacher_places
from tat_jax.compiled import Program, describe
from tat_jax.evaluate import jit_eval_step
from tat_jax.step import jit_train_step, places_of
from tat_jax.tasks import task_of

_NAME = re.compile(r"\w+[:=]\d+(x\d+)*(_\w+)?")
_KNOWN = "a kind of chip and its grid, as v4:2x2x4, v5e:2x4, v5p:2x2x2, v6e:8x8 or tpu7x:2x2x1"
# Without these libtpu takes a lock, which is of use where chips are, and complains of what it does not know.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# For the compiler: a tenth of the time that it takes of itself; docs/pods.md has what is lost.
QUICK: dict[str, Any] = {"exec_time_optimization_effort": -1.0}


class Device(NamedTuple):
    """What a device promises: bytes of memory, operations a second in bfloat16, bytes a second to memory."""

    memory: int
    operations: int
    bandwidth: int


class Pod(NamedTuple):
    """A pod of TPUs.

    Attributes:
        name: of its topology.
        mesh: its devices.
        chips: how many it has; a device is a chip, or of v2, v3 and tpu7x half of one.
        device: what one of its devices promises.
    """

    name: str
    mesh: Mesh
    chips: int
    device: Device


def check_name(name: str) -> None:
    """Raise a ValueError unless a name may be that of a pod."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"--topology={name} is no pod of TPUs: it must be {_KNOWN}")


def find(name: str) -> Pod:
    """Return the pod of a name that JAX's topologies know.

    Raises:
        ImportError: libtpu is not installed.
        ValueError: there is no such pod.
    """
    check_name(name)
    if find_spec("libtpu") is None:
        raise ImportError(f'--topology={name} needs the compiler for TPUs, libtpu: pip install "jax[tpu]"')
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # Of v4 JAX shows a chip's two cores as one device, of which the name alone says nothing.
    kind = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        devices: list[Any] = topologies.get_topology_desc(platform="tpu", topology_name=name, **kind).devices
    except jax.errors.JaxRuntimeError as error:
        why = _said(error)
        raise ValueError(f"--topology={name} is no pod of TPUs: {why}; it must be {_KNOWN}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # which libtpu answers with a stack trace and a pause
    chips = len({tuple(device.coords) for device in devices})
    return Pod(name, sharding.make_mesh(devices), chips, _promises(devices[0]))


def _promises(device: jax.Device) -> Device:
    """Return what a device promises, by JAX's own table, which is Google's."""
    from jax.experimental.pallas import tpu  # here, because no other command needs it

    with jax.default_device(device):
        core = tpu.get_tpu_info()
    return Device(
        *(
            core.num_cores * of_core
            for of_core in (core.hbm_capacity_bytes, core.bf16_ops_per_second, core.mem_bw_bytes_per_second)
        )
    )


def compile_step(
    built: Built,
    config: ConfigDict,
    pod: Pod,
    *,
    images: int,
    source: Any = None,
    options: Mapping[str, Any] = QUICK,
) -> Program:
    """Compile the training step on a batch of so many images.

    Args:
        built: the training, its arrays anywhere: only their shapes count.
        config: its config.
        pod: for which.
        images: of the batch, over all devices.
        source: has what the shape of labels depends on, as `largest` of label maps.
        options: of the compiler.

    Raises:
        MemoryError: it needs more than a device has.
    """
    state = _abstract(built.state, places_of(built.state, pod.mesh))
    teacher = _abstract(built.teacher, teacher_places(config, built.teacher, pod.mesh))
    step = jit_train_step(built.recipe, pod.mesh)
    batch = _batch(config, pod, images, source, train=True)
    return _compile(step.lower(state, teacher, batch), pod, options)


def compile_evaluation(
    built: Built, config: ConfigDict, pod: Pod, *, images: int, source: Any = None
) -> Program:
    """Compile likewise what an evaluation of the student counts of a batch."""
    graph, state = nnx.split(built.student.view)
    state = _abstract(state, sharding.everywhere(state, pod.mesh))
    count = jit_eval_step(pod.mesh)
    batch = _batch(config, pod, images, source, train=False)
    return _compile(count.lower(graph, built.recipe.task, state, batch), pod, QUICK)


def _batch(config: ConfigDict, pod: Pod, images: int, source: Any, *, train: bool) -> Any:
    side, task = config.data.image_size, task_of(config)
    label = task.blank_label(config.data, source, train=train)
    split = sharding.batched(pod.mesh)

    def rows(shape: Sequence[int], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((images, *shape), dtype, sharding=split)

    return Batch(
        image=rows((side, side, 3), "uint8"),
        label=None if label is None else rows(label.shape, label.dtype),
        where=rows((), "bool"),
        indices=rows((), "int32"),
    )


def _abstract(arrays: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), arrays, places)


def _compile(lowered: jax.stages.Lowered, pod: Pod, options: Mapping[str, Any]) -> Program:
    """Compile a program, or read what was found when the same compiler compiled the same one before."""
    compiler = pod.mesh.devices.flat[0].client.platform_version
    key = json.dumps([pod.name, compiler, jax.__version__, dict(options), lowered.as_text()])
    name = f"pods/{hashlib.sha256(key.encode()).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError):
        return Program(**json.loads((paths.cache() / name).read_text()))
    try:
        found = describe(lowered.compile(compiler_options=dict(options)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise MemoryError(_said(error)) from error
        raise
    with contextlib.suppress(OSError, ValueError):  # without a place for it, the next one compiles anew
        kept = paths.cache() / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        with paths.replacing(kept) as partial:
            partial.write_text(json.dumps(found._asdict()))
    return found


def _said(error: jax.errors.JaxRuntimeError) -> str:
    """Return what libtpu says, without the kind of error before it."""
    return str(error).splitlines()[0].partition(": ")[2] or str(error)
