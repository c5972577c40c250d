"""Checkpoints of a run: which are kept, which is the best, and that those of before are still read."""

import json
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tat_jax import distill, ema
from tat_jax.checkpoints import RunCheckpoints
from tat_jax.distill import Distillation
from tat_jax.losses.loss import Loss
from tat_jax.losses.tat import TargetAwareTransformer
from tat_jax.networks.view import View
from tat_jax.weights import folders, store
from tat_jax.weights.orbax_quiet import try_to_read
from tests.tiny import Tiny

pytestmark = pytest.mark.usefixtures("unchecked")


class Dropping(nnx.Module):
    """A student with a random stream of its own."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, images, *, train=False, where=None):
        return self.dropout(self.linear(images.mean((1, 2))), deterministic=not train)


class Memory(nnx.Variable):
    """What a loss remembers of the images before."""


class Remembers(Loss):
    """A loss with state that is no parameter."""

    def __init__(self, *, rngs):
        self.memory = Memory(rngs.normal((3, 2)))
        self.count = Memory(jnp.zeros((), jnp.int32))


def state_of(student, step=3):
    """Return the state of a student with a TaT loss, at some step."""
    tat = TargetAwareTransformer(8, 16, embedding_kernel=1, rngs=nnx.Rngs(1))
    state = distill.init_state(Distillation(View(student), {"tat_layer2": tat}), optax.adamw(0.1))
    return state._replace(step=jnp.array(step))


def other(state):
    """Return a state of the same shapes, with other numbers, at step 0."""

    def change(x):
        return jax.random.key(7) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x + 1

    return jax.tree.map(change, state)._replace(step=jnp.zeros((), int))


def assert_same(state, expected):
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        is_key = jnp.issubdtype(theirs.dtype, jax.dtypes.prng_key)
        ours, theirs = map(jax.random.key_data, (ours, theirs)) if is_key else (ours, theirs)
        np.testing.assert_array_equal(ours, theirs)


def save(folder, state, metrics=None):
    with RunCheckpoints(folder) as checkpoints:
        checkpoints.save(state, arguments={}, position={"epoch": 1}, metrics=metrics)


def restore(folder, like):
    with RunCheckpoints(folder) as checkpoints:
        return checkpoints.restore(like)


def test_the_best_and_the_two_latest_checkpoints_are_kept_and_the_first_measure_says_which_is_best(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        for step, measure in enumerate((0.1, 0.9, 0.2, 0.3, 0.4)):
            state = state_of(Tiny(2, rngs=nnx.Rngs(0)), step)
            metrics = {"best": measure, "another": -measure}
            checkpoints.save(state, arguments={}, position={}, metrics=metrics)
    assert folders.steps(tmp_path) == [1, 3, 4]
    assert folders.best(tmp_path).name == "1"
    assert folders.last(tmp_path).name == "4"


def test_the_first_measure_says_which_is_best_after_a_run_was_continued_too(tmp_path):
    for step, first in enumerate((0.9, 0.1, 0.2, 0.3)):
        save(tmp_path, state_of(Tiny(2, rngs=nnx.Rngs(0)), step), {"z": first, "a": -first})
    assert folders.steps(tmp_path) == [0, 2, 3]
    assert folders.network_folder(tmp_path) == folders.best(tmp_path) == tmp_path / "checkpoints" / "0"


def test_a_state_that_was_saved_can_be_saved_again_with_its_metrics(tmp_path):
    state = state_of(Tiny(2, rngs=nnx.Rngs(0)))
    save(tmp_path, state)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .* has been evaluated yet"):
        folders.best(tmp_path)
    save(tmp_path, state, {"best": 0.5})
    assert folders.best(tmp_path).name == "3"


def test_a_measure_that_is_no_number_damages_no_checkpoint(tmp_path):
    state = state_of(Tiny(2, rngs=nnx.Rngs(0)))
    save(tmp_path, state, {"best": 0.5, "of one class": float("nan")})
    assert folders.best(tmp_path).name == "3"
    assert restore(tmp_path, other(state)).set_aside == []


@pytest.mark.parametrize("call", ["save", "check_for_errors", "close"])
def test_a_process_that_is_lost_during_a_save_is_no_failure_of_the_disk(tmp_path, monkeypatch, call):
    def lose(*_, **__):
        lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
        raise ValueError("an error of a thread of Orbax") from lost

    def save_and_check():
        with RunCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(state_of(Tiny(4, rngs=nnx.Rngs(0))), arguments={}, position={})
            checkpoints.check()

    monkeypatch.setattr(ocp.CheckpointManager, call, lose)
    with pytest.raises(jax.errors.JaxRuntimeError, match="closed by peer"):
        save_and_check()


@pytest.mark.parametrize("student", [lambda rngs: Tiny(4, rngs=rngs), lambda rngs: Dropping(rngs=rngs)])
def test_what_is_saved_comes_back_to_the_bit_random_streams_included(tmp_path, student):
    state = state_of(student(nnx.Rngs(0)))
    save(tmp_path, state)
    restored = restore(tmp_path, other(state))
    assert_same(restored.state, state)
    assert restored.position == {"epoch": 1}


def averaged(step, measures, folder):
    """Save a state with an average of its student, whose numbers are others."""
    state = state_of(Tiny(2, rngs=nnx.Rngs(0)), step)
    average = jax.tree.map(lambda x: x + 1, ema.student_of(state.params, state.variables))
    save(folder, state._replace(ema=average), measures)
    return state._replace(ema=average)


def test_the_average_of_the_best_evaluation_of_averages_is_kept_when_the_rest_is_dropped(tmp_path):
    of_steps = ((0.1, 0.1), (0.2, 0.9), (0.9, 0.2), (0.3, 0.3), (0.4, 0.4))
    for step, (top1, of_ema) in enumerate(of_steps):
        state = averaged(step, {"top1": top1, "ema_top1": of_ema}, tmp_path)
    assert folders.steps(tmp_path) == [1, 2, 3, 4]
    assert (folders.best(tmp_path).name, folders.best_ema(tmp_path).parent.name) == ("2", "1")
    assert folders.last_ema(tmp_path) == tmp_path / "checkpoints" / "4" / "student_ema"
    assert_same(restore(tmp_path, other(state)).state, state)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.drop_training()
    assert folders.steps(tmp_path) == [1, 2, 4]
    average = store.load_network(folders.best_ema(tmp_path)).weights
    np.testing.assert_array_equal(average["conv1.kernel"], state.ema.student.network.conv1.kernel)


def test_a_damaged_average_is_seen_and_the_checkpoint_before_it_is_taken(tmp_path):
    for step in (1, 2):
        state = averaged(step, None, tmp_path)
    files = [path for path in folders.last_ema(tmp_path).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the network in .*student_ema"):
        store.load_network(folders.last_ema(tmp_path))
    restored = restore(tmp_path, other(state))
    assert (int(restored.state.step), len(restored.set_aside)) == (1, 1)


def test_where_no_disk_is_shared_what_the_first_process_saves_alone_comes_back_to_the_bit(tmp_path):
    state = state_of(Tiny(2, rngs=nnx.Rngs(0)))
    with RunCheckpoints(tmp_path, is_shared=False) as checkpoints:
        checkpoints.save(state, arguments={}, position={"epoch": 1})
    assert_same(restore(tmp_path, other(state)).state, state)


def test_a_students_random_stream_is_no_part_of_the_network_that_is_handed_on(tmp_path):
    save(tmp_path, state_of(Dropping(rngs=nnx.Rngs(0))))
    assert store.load_network(folders.last(tmp_path)).weights.keys() == {"linear.kernel", "linear.bias"}


def test_what_a_loss_remembers_comes_back_and_is_no_part_of_the_student(tmp_path):
    losses = {"remembers": Remembers(rngs=nnx.Rngs(1))}
    distillation = Distillation(View(Tiny(2, rngs=nnx.Rngs(0))), losses)
    state = distill.init_state(distillation, optax.sgd(0.1))
    save(tmp_path, state)
    assert_same(restore(tmp_path, other(state)).state, state)
    folder = folders.last(tmp_path)
    assert store.load_item(folder / "training")["embeddings"].keys() == {
        "losses.remembers.memory",
        "losses.remembers.count",
    }
    assert (
        store.load_network(folder).weights.keys()
        == store.network_weights(distillation.student.network).keys()
    )


def in_the_layout_of_before(folder, state, metrics):
    """Write a checkpoint as it was written when only TaT had parameters besides the student."""

    def names(flat):
        return {tuple(p if p != "tat_layer2" else "layer2" for p in path): leaf for path, leaf in flat}

    def before(node):
        if not isinstance(node, nnx.State):
            return node
        flat = names(nnx.to_flat_state(node))
        renamed = {
            ("student", *path[2:]) if path[0] == "student" else ("tat", *path[1:]): leaf
            for path, leaf in flat.items()
        }
        return nnx.from_flat_state(list(renamed.items()))

    trained = store.flatten(before(state.params)) | store.flatten(before(state.variables))
    student = {k.removeprefix("student."): v for k, v in trained.items() if k.startswith("student.")}
    training = {
        "step": state.step,
        "embeddings": {k: v for k, v in trained.items() if k.startswith("tat.")},
        "opt_state": jax.tree.map(before, state.opt_state, is_leaf=lambda x: isinstance(x, nnx.State)),
    }
    said = {"position": {"epoch": 1}, "metrics": metrics, "arrays": store.digest(training)}
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["top1"])
    manager = ocp.CheckpointManager(folder.absolute() / "checkpoints", options=options)
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            **store.network_items(store.StoredNetwork(student, {}, {"head": "trained", "source": "before"})),
            training=ocp.args.StandardSave(training),
            data=ocp.args.JsonSave(store.seal(said)),
        ),
        metrics=metrics,
    )
    manager.close()


def test_a_checkpoint_of_before_losses_were_a_list_continues_to_the_bit(tmp_path):
    state = state_of(Tiny(4, rngs=nnx.Rngs(0)))
    in_the_layout_of_before(tmp_path, state, {"top1": 0.5, "top5": 0.9})
    assert folders.best(tmp_path).name == "3"
    restored = restore(tmp_path, other(state))
    assert restored.set_aside == []
    assert_same(restored.state, state)


def test_of_what_python_cannot_raise_only_what_orbax_abandons_is_unheard(tmp_path, monkeypatch):
    class Raises:
        def __init__(self, message):
            self.message = message

        def __del__(self):
            raise RuntimeError(self.message)

    heard = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: heard.append(str(raised.exc_value)))
    with RunCheckpoints(tmp_path):
        Raises("Event loop is closed")
        Raises("another")
    Raises("after writing")
    try_to_read(lambda: str(Raises("whatever it is")))
    Raises("after reading")
    assert heard == ["another", "after writing", "after reading"]


def test_a_write_that_ends_after_its_save_failed_is_unheard_beside_another_error_too(tmp_path, monkeypatch):
    heard = []
    close = ocp.CheckpointManager.close
    abandoned = RuntimeError, RuntimeError("Event loop is closed"), None
    write = threading.Timer(0.1, lambda: sys.excepthook(*abandoned))

    def abandon(manager):
        close(manager)
        write.start()
        raise OSError("a full disk")

    def fail():
        with RunCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(state_of(Tiny(2, rngs=nnx.Rngs(0))), arguments={}, position={})
            raise ValueError("another error")

    monkeypatch.setattr(sys, "excepthook", lambda _, error, __: heard.append(str(error)))
    monkeypatch.setattr(ocp.CheckpointManager, "close", abandon)
    with pytest.raises(ValueError, match="another error"):
        fail()
    write.join()
    assert heard == []


def test_metrics_that_were_changed_since_are_no_evaluation(tmp_path):
    save(tmp_path, state_of(Tiny(2, rngs=nnx.Rngs(0))), {"best": 0.5})
    (path,) = tmp_path.glob("checkpoints/3/metrics/metrics")
    path.write_text(json.dumps({"best": 0.9}))
    with pytest.raises(ValueError, match=r"cannot read .*/3: its metrics are not those that were written"):
        folders.best(tmp_path)


def damage(folder, step):
    (folder / "checkpoints" / str(step) / "training" / "_METADATA").unlink()


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_continues(tmp_path):
    states = [state_of(Tiny(2, rngs=nnx.Rngs(step)), step) for step in (1, 2)]
    for state in states:
        save(tmp_path, state)
    damage(tmp_path, 2)
    restored = restore(tmp_path, other(states[0]))
    assert_same(restored.state, states[0])
    (line,) = restored.set_aside
    assert line.startswith("the checkpoint of step 2 cannot be read (")
    assert line.endswith(f"is now in {tmp_path / 'damaged' / '2'}")
    assert (tmp_path / "damaged" / "2" / "student").is_dir()
    assert folders.steps(tmp_path) == [1]


def test_where_no_checkpoint_can_be_read_each_is_named_and_none_is_moved(tmp_path):
    states = [state_of(Tiny(2, rngs=nnx.Rngs(0)), step) for step in (1, 2)]
    for state in states:
        save(tmp_path, state)
        damage(tmp_path, int(state.step))
    with pytest.raises(ValueError, match="no checkpoint can be continued from; another --workdir") as refused:
        restore(tmp_path, other(states[0]))
    assert [f"checkpoints/{step}: " in str(refused.value) for step in (1, 2)] == [True, True]
    assert folders.steps(tmp_path) == [1, 2]


def test_a_checkpoint_of_another_training_is_refused_in_a_line(tmp_path):
    save(tmp_path, state_of(Tiny(4, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="no checkpoint can be continued from; another --workdir") as refused:
        restore(tmp_path, state_of(Dropping(rngs=nnx.Rngs(0))))
    assert str(refused.value).count("\n") == 1


def test_nothing_saved_is_nothing_to_continue(tmp_path):
    assert restore(tmp_path, state_of(Tiny(2, rngs=nnx.Rngs(0)))) is None
