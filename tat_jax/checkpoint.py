"""Networks and training states on disk, through Orbax.

A checkpoint is a folder of items. `student` and `network` are a network: its weights under the model's own
attribute paths, and the arguments that build it. They are all an evaluation reads, and all a folder of
converted weights holds. `training` (optimiser, embeddings, step) and `data` (the position in the data) let a
run continue. A teacher is never saved.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from tat_jax.distill import TrainState

Weights = dict[str, Any]
_STUDENT = "student."  # where the student lies in what is trained


class Network(NamedTuple):
    """A network as read from disk.

    Attributes:
        weights: arrays by attribute path, as in `layer1.0.conv1.kernel`.
        arguments: the keyword arguments of `ResNet` that build the network.
        origin: where the weights came from, with `head`: "trained", or "fresh" if its logits mean nothing.
    """

    weights: Weights
    arguments: dict[str, Any]
    origin: dict[str, str]


def flatten(state: nnx.State) -> Weights:
    """Return the arrays of `state` by attribute path, as in `layer1.0.conv1.kernel`."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _unflatten(weights: Weights, like: nnx.State) -> nnx.State:
    """Return `like` with its arrays replaced by those of the same paths in `weights`."""
    return nnx.from_flat_state(
        [(path, leaf.replace(weights[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(like)]
    )


def network_weights(model: nnx.Module) -> Weights:
    """Return parameters and running statistics of `model` by attribute path."""
    return flatten(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))


def set_weights(model: nnx.Module, weights: Mapping[str, Any], *, source: str) -> None:
    """Write `weights` into `model`, in the model's own types.

    Raises:
        ValueError: entries are missing, extra or of another shape; each is named, and nothing is written.
    """
    state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
    own = flatten(state)
    check_entries(
        {name: np.shape(value) for name, value in weights.items()},
        {name: value.shape for name, value in own.items()},
        source=source,
    )
    cast = {name: jax.numpy.asarray(weights[name], value.dtype) for name, value in own.items()}
    nnx.update(model, _unflatten(cast, state))


def check_entries(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], *, source: str
) -> None:
    """Raise a ValueError that names every entry of `found` that is missing, extra or of another shape."""
    lines = [f"  missing: {name} {expected[name]}" for name in sorted(expected) if name not in found]
    lines += [f"  extra: {name} {found[name]}" for name in sorted(found) if name not in expected]
    lines += [
        f"  wrong shape: {name} is {found[name]}, the network has {expected[name]}"
        for name in sorted(expected)
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    if lines:
        raise ValueError("\n".join([f"{source} does not hold this network:", *lines]))


def save_network(folder: Path, network: Network) -> None:
    """Write a network alone, as the conversion of published weights does.

    Raises:
        FileExistsError: `folder` exists; nothing is overwritten.
    """
    folder = Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or name another folder")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, _network_items(network))


def _network_items(network: Network) -> ocp.args.Composite:
    return ocp.args.Composite(
        student=ocp.args.StandardSave(network.weights),
        network=ocp.args.JsonSave({"arguments": network.arguments, "origin": network.origin}),
    )


def load_network(folder: Path) -> Network:
    """Read the network of a checkpoint or of converted weights onto the host.

    Raises:
        FileNotFoundError: there is none in `folder`.
        ValueError: what is there cannot be read.
    """
    folder = Path(folder).absolute()
    if not (folder / "student").is_dir() or not (folder / "network").is_dir():
        raise FileNotFoundError(f"no network in {folder} (it would hold the folders student and network)")
    try:
        weights = load_item(folder / "student")
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            network = checkpointer.restore(folder / "network")
    except Exception as error:  # Orbax raises whatever its storage layers raise.
        raise ValueError(f"cannot read the network in {folder}: {error}") from error
    return Network(dict(weights), network["arguments"], network["origin"])


def load_item(folder: Path) -> Any:
    """Read the arrays of one item of a checkpoint onto the host."""
    folder = Path(folder).absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, ocp.args.PyTreeRestore(restore_args=on_host))


class RunCheckpoints:
    """The checkpoints of one training run: the latest, and the best by validation top-1.

    Saving is asynchronous: it returns when the arrays are copied, and a checkpoint counts once it is whole.

    Args:
        folder: the run's folder; checkpoints lie in `folder/checkpoints/<step>`.
    """

    def __init__(self, folder: Path):
        self._manager = ocp.CheckpointManager(
            _checkpoints(folder).absolute(),
            options=ocp.CheckpointManagerOptions(
                best_fn=_top1,
                preservation_policy=AnyPreservationPolicy(
                    [LatestN(1), BestN(n=1, get_metric_fn=_top1, keep_checkpoints_without_metrics=False)]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ):
        self._manager.close()

    def save(
        self,
        state: TrainState,
        *,
        arguments: dict[str, Any],
        data: dict[str, int],
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Save a state.

        Args:
            state: what is trained. Its student counts as one with a trained head.
            arguments: the keyword arguments of `ResNet` that build the student.
            data: the position in the data.
            metrics: `top1` at least, where the state has been evaluated.
        """
        origin = {"head": "trained", "source": f"step {int(state.step)}"}
        items = _network_items(Network(_student(state), arguments, origin))
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                **items, training=ocp.args.StandardSave(_training(state)), data=ocp.args.JsonSave(data)
            ),
            metrics=metrics,
        )

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, if there is one."""
        return self._manager.latest_step()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, int]] | None:
        """Return the latest state and its position in the data, or None if nothing is saved.

        Args:
            like: a state of the same shapes, types and shardings.

        Raises:
            ValueError: the checkpoint is not of this training, or cannot be read.
        """
        step = self.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    student=ocp.args.StandardRestore(_student(abstract)),
                    training=ocp.args.StandardRestore(_training(abstract)),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except Exception as error:  # Orbax raises whatever its storage layers raise.
            raise ValueError(
                f"cannot continue from {self._manager.directory / str(step)}: {error}"
            ) from error
        trained = {f"{_STUDENT}{path}": value for path, value in read.student.items()}
        trained |= read.training["embeddings"]
        params, batch_stats = (_unflatten(trained, state) for state in (like.params, like.batch_stats))
        return TrainState(read.training["step"], params, batch_stats, read.training["opt_state"]), read.data


def network_folder(folder: Path) -> Path:
    """Return where the network of a folder of converted weights, or the best one of a run, lies.

    Raises:
        FileNotFoundError: `folder` is neither.
    """
    return Path(folder) if (Path(folder) / "student").is_dir() else best(folder)


def best(run: Path) -> Path:
    """Return the checkpoint of a run with the highest validation top-1.

    Raises:
        FileNotFoundError: the run has no evaluated checkpoint.
    """
    with ocp.CheckpointManager(
        _existing(run), options=ocp.CheckpointManagerOptions(best_fn=_top1, read_only=True)
    ) as manager:
        step = manager.best_step()
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {run} has been evaluated yet")
    return _checkpoints(run) / str(step)


def last(run: Path) -> Path:
    """Return the newest checkpoint of a run.

    Raises:
        FileNotFoundError: the run has no checkpoint.
    """
    step = ocp.utils.checkpoint_steps(_existing(run))
    return _checkpoints(run) / str(max(step))


def _checkpoints(run: Path) -> Path:
    return Path(run) / "checkpoints"


def _existing(run: Path) -> Path:
    folder = _checkpoints(run).absolute()
    if not folder.is_dir() or not ocp.utils.checkpoint_steps(folder):
        raise FileNotFoundError(f"no checkpoint in {run}: train one with main.py --workdir {run}")
    return folder


def _top1(metrics: dict[str, float]) -> float:
    return metrics["top1"]


def _student(state: TrainState) -> Weights:
    trained = flatten(state.params) | flatten(state.batch_stats)
    return {
        path.removeprefix(_STUDENT): value for path, value in trained.items() if path.startswith(_STUDENT)
    }


def _training(state: TrainState) -> dict[str, Any]:
    """Return all of a state that is not the student."""
    trained = flatten(state.params) | flatten(state.batch_stats)
    embeddings = {path: value for path, value in trained.items() if not path.startswith(_STUDENT)}
    return {"step": state.step, "embeddings": embeddings, "opt_state": state.opt_state}
