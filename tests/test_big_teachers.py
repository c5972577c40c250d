"""A teacher that is large: its kernels in half the memory, or split over the devices, say the same."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tat_jax import sharding
from tat_jax.batch import Batch
from tat_jax.build import Built, all_terms, build, build_teacher
from tat_jax.compiled import Program, describe
from tat_jax.data.pipeline import open_pipeline
from tat_jax.data.sample import Sample
from tat_jax.distill import TrainState
from tat_jax.gallery import Gallery
from tat_jax.inspection import measure_teacher
from tat_jax.networks.precision import narrow
from tat_jax.networks.view import View
from tat_jax.step import jit_train_step
from tests import test_segmentation, test_train
from tests.tiny import Tiny

WIDTH, LAYERS = 64, 6
KERNEL = 3 * 3 * WIDTH * WIDTH * 4  # bytes of one of its layers
# So that a program takes the memory that it needs, and not more to have many operations of a CPU at once.
IN_TURNS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class Deep(nnx.Module):
    """A network that is large beside its images: kernels of one size after another, a norm after each."""

    def __init__(self, *, classes=10, rngs):
        widths = [3, *[WIDTH] * LAYERS]
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in itertools.pairwise(widths)])
        self.norms = nnx.List([nnx.BatchNorm(WIDTH, rngs=rngs) for _ in range(LAYERS)])
        self.fc = nnx.Linear(WIDTH, classes, rngs=rngs)

    def __call__(self, images):
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        self.sow(nnx.Intermediate, "layer2", nnx.avg_pool(x, (4, 4), strides=(4, 4)))
        return self.fc(x.mean((1, 2)))


class Taken(NamedTuple):
    """A step: what was built, its program, and what that gave for images of the seed."""

    built: Built
    program: Program
    state: TrainState
    metrics: dict[str, jax.Array]


def batch_of(images, mesh):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 16, 16, 3), np.uint8)
    rows = Batch(pixels, rng.integers(0, 10, images, np.int32), np.ones(images, bool))
    return next(iter(sharding.put_batches([rows], mesh)))


@functools.cache
def take(dtype="float32", place="replicated", own=Deep):
    """Take the first step of a tiny student under a large teacher, on eight devices."""
    config, mesh = test_train.config_of(teacher_dtype=dtype, teacher_sharding=place), sharding.make_mesh()
    student = Tiny(4, classes=10, bn_group=8, rngs=nnx.Rngs(0))
    teacher = own(rngs=nnx.Rngs(1))
    built = build(config, mesh, num_classes=10, steps_per_epoch=3, student=student, teacher=teacher)
    arguments = built.state, built.teacher, batch_of(16, mesh)
    program = jit_train_step(built.recipe, mesh).lower(*arguments).compile(IN_TURNS)
    described = describe(program)
    return Taken(built, described, *program(*arguments))


def numbers(taken):
    return [np.asarray(leaf) for leaf in jax.tree.leaves((taken.state.params, taken.metrics))]


def on_each_device(built):
    return sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(built.teacher))


class Rounded(Deep):
    """The same network with kernels that were rounded before."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        for layer in (*self.convs, self.fc):
            layer.kernel[...] = layer.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)


class TestInBfloat16:
    def test_a_step_is_that_under_a_teacher_whose_kernels_were_rounded_to_the_bit(self):
        for found, expected in zip(numbers(take("bfloat16")), numbers(take(own=Rounded)), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert any((a != b).any() for a, b in zip(numbers(take("bfloat16")), numbers(take()), strict=True))

    def test_kernels_take_half_the_memory_and_vectors_stay_as_they_are(self):
        types = {
            (".".join(map(str, path))[-6:] == "kernel", leaf.get_value().dtype.name)
            for path, leaf in nnx.to_flat_state(take("bfloat16").built.teacher)
        }
        assert types == {(True, "bfloat16"), (False, "float32")}
        saved = take().program.arguments - take("bfloat16").program.arguments
        kernels = [conv.kernel for conv in Deep(rngs=nnx.Rngs(1)).convs]
        assert saved == sum(kernel[...].nbytes for kernel in kernels) / 2 + 2 * WIDTH * 10

    def test_a_network_sees_its_weights_in_the_types_that_it_has_them_in(self):
        class Strict(nnx.Module):
            """A network of JAX's own operations, which do not mix types."""

            def __init__(self, dtype):
                self.kernel = nnx.Param(jnp.full((3, 2), 1 / 3, dtype))
                self.table = nnx.Variable(jnp.arange(6.0).reshape(2, 3))
                self.already = nnx.Param(jnp.ones((2, 2), jnp.bfloat16))

            def __call__(self, images):
                assert self.already[...].dtype == jnp.bfloat16
                return jax.lax.dot(jax.lax.dot(images.mean((1, 2)), self.kernel[...]), self.table[...])

        view = View(Strict(jnp.float32))
        narrow(view, jnp.bfloat16)
        narrow(view, jnp.bfloat16)
        assert view.network.kernel[...].dtype == view.network.table[...].dtype == jnp.bfloat16
        logits = view(np.ones((1, 2, 2, 3), np.float32)).logits
        np.testing.assert_array_equal(logits, jnp.float32(jnp.bfloat16(1 / 3)) * 3 * jnp.array([[3.0, 5, 7]]))


class TestSplitOverDevices:
    def test_a_step_is_that_under_a_teacher_that_is_whole_on_each_to_rounding(self):
        for dtype in ("float32", "bfloat16"):
            pairs = zip(numbers(take(dtype, "sharded")), numbers(take(dtype)), strict=True)
            for found, expected in pairs:
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_each_device_has_an_eighth_of_the_kernels(self, dtype):
        whole, split = take(dtype), take(dtype, "sharded")
        kernels = sum(leaf.nbytes for leaf in jax.tree.leaves(whole.built.teacher) if leaf.ndim > 1)
        assert on_each_device(whole.built) - on_each_device(split.built) == kernels * 7 / 8
        assert whole.program.arguments - split.program.arguments == kernels * 7 / 8

    def test_no_more_than_a_few_kernels_are_gathered_at_a_time(self):
        whole, split = take(), take("float32", "sharded")
        assert split.program.temporaries - whole.program.temporaries < 2.5 * KERNEL < LAYERS * KERNEL / 2
        assert split.program.collectives["all-gather"][1] >= (LAYERS - 1) * KERNEL
        assert "all-gather" not in whole.program.collectives

    def test_an_array_is_split_along_its_longest_axis_that_the_devices_share_evenly(self):
        mesh = sharding.make_mesh()
        for shape, axis in {
            (3, 3, 8, 16): 3,
            (3, 3, 24, 20): 2,
            (16, 8): 0,
            (8, 8): 0,
            (3, 5): None,
            (64,): None,
        }.items():
            spec = sharding.split(jax.ShapeDtypeStruct(shape, jnp.float32), mesh).spec
            assert [i for i, name in enumerate(spec) if name] == ([] if axis is None else [axis])
        keys = jax.ShapeDtypeStruct((8, 8), jnp.uint32)
        assert sharding.split(keys, mesh).is_fully_replicated

    def test_a_run_knows_its_teacher_again_wherever_it_lies_but_not_in_other_numbers(self):
        of_whole, of_split, of_rounded = (
            take(*how).built.teacher_digest for how in ((), ("float32", "sharded"), ("bfloat16",))
        )
        assert of_whole == of_split != of_rounded

    def test_a_check_measures_it_as_one_that_is_whole(self):
        mesh, found = sharding.make_mesh(), []
        for place in ("replicated", "sharded"):
            config = test_train.config_of(teacher_sharding=place)
            sample = Sample(open_pipeline(config, "val").source)
            network = build_teacher(config, 10, Tiny(8, classes=10, rngs=nnx.Rngs(1)), all_terms(config))
            found.append(measure_teacher(config, network, sample, mesh)[0])
        assert found[0] == found[1]
        assert found[0].startswith("top-1 ")

    def test_pictures_show_what_it_predicts(self, tmp_path):
        mesh, drawn = sharding.make_mesh(), []
        for place in ("replicated", "sharded"):
            config = test_segmentation.config_of(teacher_sharding=place)
            data = open_pipeline(config, "val")
            networks = {"student": test_segmentation.student, "teacher": test_segmentation.teacher}
            built = build(config, mesh, num_classes=11, steps_per_epoch=2, **networks)
            gallery = Gallery(tmp_path, data, built.recipe, built.teacher, mesh, show=True)
            gallery.draw(*nnx.split(built.student.view))
            drawn.append((tmp_path / "predictions.png").read_bytes())
        assert drawn[0] == drawn[1]
