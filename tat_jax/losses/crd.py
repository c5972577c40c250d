"""Contrastive representation distillation (CRD): which image is it, told by what both networks said before.

Contrastive Representation Distillation, Tian et al., ICLR 2020, as RepDistiller's code has it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from tat_jax.batch import Batch, Where
from tat_jax.fields import Field, whole
from tat_jax.losses.adapt import counted, embedding_of_vectors, unit_vectors, vectors
from tat_jax.losses.loss import Loss, Rows, labels_of, tap_of
from tat_jax.networks.layers import at_least_float32, uniform
from tat_jax.networks.view import Outputs, OutputShapes

_TEMPERATURE = 0.07
_LEAST = 1e-7  # what the published code adds to a denominator
_BLOCK = 2**21  # bytes of scores that are held at a time
_PIECES = 64  # of a memory, of each of which a block has as much: devices that share them need no other's


class Memory(NamedTuple):
    """What is remembered of every image, and what turns scores into probabilities.

    Attributes:
        student: embeddings of the images by the student.
        teacher: likewise by the teacher.
        student_scale: what scores of the student's embeddings are divided by; 0 before the first batch.
        teacher_scale: likewise of the teacher's.
    """

    student: Float[Array, "rows features"]
    teacher: Float[Array, "rows features"]
    student_scale: Float[Array, ""]
    teacher_scale: Float[Array, ""]


def crd(
    student: Float[Array, "batch features"],
    teacher: Float[Array, "batch features"],
    memory: Memory,
    index: Int[Array | np.ndarray, " batch"],
    negatives: Int[Array | np.ndarray, "batch negatives"],
    *,
    temperature: float = _TEMPERATURE,
    where: Where | None = None,
) -> tuple[Float[Array, " batch"], Memory]:
    """Return the loss of each image, and the memory after the batch.

    Of an image's unit vector v, its own row m_0 in the other network's memory and those m_k of K others,
    log((q_0 + c + 1e-7) / q_0) + Σ_k log((q_k + c + 1e-7) / c), with q = exp(⟨m, v⟩ / temperature) / Z and
    c = K / images; the student's and the teacher's are added. Z is the mean of the first batch's exponentials
    times the number of images, and stays. Then rows of the batch become the unit vectors of (row + v) / 2.

    Args:
        student: embeddings.
        teacher: likewise, which are trained, too.
        memory: has no gradient.
        index: of each image in the memory.
        negatives: indices of the others, image by image.
        temperature: of scores.
        where: the images that count; others change no memory. None is all.
    """
    rows = jnp.arange(len(student))[:, None]
    times = jnp.zeros((len(student), len(memory.student)), jnp.int32).at[rows, negatives].add(1)
    images = len(memory.student)
    return contrast(
        student, teacher, memory, index, times, images=images, temperature=temperature, where=where
    )


def contrast(
    student: Float[Array, "batch features"],
    teacher: Float[Array, "batch features"],
    memory: Memory,
    index: Int[Array | np.ndarray, " batch"],
    times: Bool[Array, "batch images"] | Int[Array, "batch images"],
    *,
    images: int,
    temperature: float = _TEMPERATURE,
    where: Where | None = None,
) -> tuple[Float[Array, " batch"], Memory]:
    """Return what `crd` does, given how often each image of the memory is among the negatives of another.

    The memory may have more rows than there are `images`.
    """
    counts = counted(where, student, teacher)
    ours, theirs = unit_vectors(student), unit_vectors(teacher)
    at, read = jax.lax.stop_gradient(((ours, theirs), memory))
    how: dict[str, Any] = {
        "index": jnp.asarray(index),
        "times": times,
        "images": images,
        "temperature": temperature,
        "counts": counts,
    }
    of_student = _told(at[0], read.teacher, read.student_scale, **how)
    of_teacher = _told(at[1], read.student, read.teacher_scale, **how)
    value = of_student.value + of_teacher.value
    # The memory depends on what was read of it, so that it changes in place.
    counts &= jnp.isfinite(value)
    followed = (_followed(rows, v, how["index"], counts) for rows, v in zip(read[:2], at, strict=True))
    # Of this value 0 is added: it has the gradient.
    value += jnp.sum((ours - at[0]) * of_student.slope + (theirs - at[1]) * of_teacher.slope, -1)
    return value, Memory(next(followed), next(followed), of_student.scale, of_teacher.scale)


class _Told(NamedTuple):
    """The loss of each image by the vectors of one network, its gradient by them, and their scale."""

    value: Float[Array, " batch"]
    slope: Float[Array, "batch features"]
    scale: Float[Array, ""]


def _told(
    v: Float[Array, "batch features"],
    rows: Float[Array, "rows features"],
    scale: Float[Array, ""],
    *,
    index: Int[Array, " batch"],
    times: Bool[Array, "batch rows"] | Int[Array, "batch rows"],
    images: int,
    temperature: float,
    counts: Where,
) -> _Told:
    """Compare vectors of one network with the memory of the other, of which each row is read once.

    It is scored block by block, so that no scores of all images are held, nor the rows of each image's
    negatives; the gradient, which would need them again, is summed beside the loss.
    """
    negatives = jnp.sum(times, 1).astype(v.dtype)
    own = jnp.take(rows, index, axis=0, mode="clip")
    positive = jnp.exp(jnp.sum(v * own, -1) / temperature)

    def likeness(block: Array) -> Array:
        return jnp.exp(jnp.einsum("bd,pnd->bpn", v, block, precision="highest") / temperature)

    def first_scale() -> Array:
        def add(total: Array, block: Array, often: Array) -> Array:
            return total + jnp.sum(likeness(block) * often, (1, 2))

        mean = _over_blocks(add, positive, rows, times) / (1 + negatives)
        return jnp.sum(mean, where=counts) / jnp.maximum(jnp.sum(counts), 1).astype(v.dtype) * images

    scale = jax.lax.cond(scale > 0, lambda: scale, first_scale)
    noise, q = negatives / images, positive / scale

    def add(sums: tuple[Array, Array], block: Array, often: Array) -> tuple[Array, Array]:
        q = likeness(block) / scale
        share = often * q / (q + noise[:, None, None] + _LEAST)
        # Most are so much smaller than 1 that a sum with it would lose them.
        value = jnp.sum(often * jnp.log1p((q + _LEAST) / noise[:, None, None]), (1, 2))
        slope = jnp.einsum("bpn,pnd->bd", share, block, precision="highest")
        return sums[0] + value, sums[1] + slope

    first = jnp.log1p((noise + _LEAST) / q), -((noise + _LEAST) / (q + noise + _LEAST))[:, None] * own
    value, slope = _over_blocks(add, first, rows, times)
    return _Told(value, slope / temperature, scale)


def _over_blocks(
    add: Callable[[Any, Array, Array], Any],
    first: Any,
    rows: Float[Array, "rows features"],
    times: Array,
) -> Any:
    """Return what becomes of `first` when blocks of the memory are added, with how often each row counts."""
    pieces = math.gcd(len(rows), _PIECES)
    rows = rearrange(rows, "(p n) d -> p n d", p=pieces)
    times = rearrange(times, "b (p n) -> b p n", p=pieces)
    length = rows.shape[1]
    size = min(length, max(1, _BLOCK // (len(times) * pieces * rows.dtype.itemsize)))

    def step(i: Array, sums: Any) -> Any:
        start = jnp.minimum(i * size, length - size)  # the last block begins within the one before
        new = start + jnp.arange(size) >= i * size
        often = jax.lax.dynamic_slice_in_dim(times, start, size, axis=2) * new[None, None]
        block = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        return add(sums, block, often.astype(rows.dtype))

    return jax.lax.fori_loop(0, -(-length // size), step, first)


def _followed(
    rows: Float[Array, "rows features"],
    v: Float[Array, "batch features"],
    index: Int[Array | np.ndarray, " batch"],
    counts: Where,
) -> Float[Array, "rows features"]:
    """Return the memory in which the rows of a batch have moved half of the way to its vectors."""
    moved = unit_vectors((jnp.take(rows, jnp.asarray(index), axis=0, mode="clip") + v) / 2)
    beyond = jnp.where(counts, index, len(rows))
    return rows.at[beyond].set(moved.astype(rows.dtype), mode="drop")


def draw_negatives(
    key: Array,
    classes: Int[Array, " images"],
    labels: Int[Array, " batch"],
    *,
    count: int,
    largest: int,
) -> Bool[Array, "batch images"]:
    """Draw for each image of a batch images of other classes, without repetition; return which they are.

    All images are put into one random order. Each of the batch takes from it those of other classes that come
    first from a place of its own on, round the end to the beginning. From any place a random order is one
    again, and so it is without some of its members: of one image, every choice is equally likely. The
    choices of two images are of one order, and not independent.

    Args:
        key: decides all.
        classes: of all images.
        labels: of those of the batch.
        count: how many to draw.
        largest: images in the largest class, without which there must be `count`.
    """
    of_places, of_first = jax.random.split(key)
    images = len(classes)
    order = jax.random.permutation(of_places, images)
    first = jax.random.randint(of_first, (len(labels), 1), 0, images)
    window = jnp.take(classes[order], first + jnp.arange(count + largest)[None], mode="wrap")
    enough = jnp.cumsum(window != labels[:, None], axis=1) >= count
    length = jnp.argmax(enough, axis=1)[:, None] + 1
    place = jnp.zeros(images, order.dtype).at[order].set(jnp.arange(images))
    return ((place[None] - first) % images < length) & (classes[None] != labels[:, None])


class CRD(Loss):
    """CRD of the student's and the teacher's vectors; published is weight 0.8, beside cross-entropy.

    Both are brought to `features` by linear layers, which are trained. Memories are no parameters.

    Args:
        student_features: channels of the student's tap.
        teacher_features: channels of the teacher's tap.
        labels: the class of every image of the training set.
        student_tap: its name among the student's outputs.
        teacher_tap: its name among the teacher's.
        features: of embeddings.
        negatives: images of other classes that each image is compared with.
        dtype: the type of activations; embeddings and memories are of float32 at least.
        rngs: the key stream `params`.

    Raises:
        ValueError: there are not so many images of other classes.
    """

    name: ClassVar[str] = "crd"
    has_parameters: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    needs_all_labels: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Field]] = {
        **tap_of("pooled"),
        "features": Field(128, whole(1), "of embeddings", optional=True),
        "negatives": Field(16_384, whole(1), "images of other classes for each image", optional=True),
    }

    def __init__(
        self,
        student_features: int,
        teacher_features: int,
        labels: Int[np.ndarray, " images"],
        *,
        student_tap: str = "pooled",
        teacher_tap: str = "pooled",
        features: int = 128,
        negatives: int = 16_384,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.count, self.largest = negatives, int(np.bincount(labels).max())
        if negatives > len(labels) - self.largest:
            raise ValueError(
                f"negatives={negatives:,}, and of the {len(labels):,} images {len(labels) - self.largest:,} "
                "are of another class than the largest; lower it"
            )
        exact = at_least_float32(dtype)
        self.student, self.teacher = (
            embedding_of_vectors(channels, features, dtype=dtype, rngs=rngs)
            for channels in (student_features, teacher_features)
        )
        draw, rows = uniform((features / 3) ** -0.5), -(-len(labels) // _PIECES) * _PIECES
        self.student_memory, self.teacher_memory = (
            Rows(draw(rngs.params(), (rows, features), exact)) for _ in range(2)
        )
        self.student_scale, self.teacher_scale = (nnx.Variable(jnp.zeros((), exact)) for _ in range(2))
        self.classes = nnx.Variable(jnp.asarray(labels, jnp.int32))
        self.stream = rngs.params.fork()

    @classmethod
    def build(
        cls, student: OutputShapes, teacher: OutputShapes, *, bn_group: int | None, **options: Any
    ) -> Self:
        """Build the embeddings for the channels of the two taps, and a memory of the images."""
        ours, theirs = student.taps[options["student_tap"]], teacher.taps[options["teacher_tap"]]
        return cls(ours.shape[-1], theirs.shape[-1], **options)

    def __call__(
        self, student: Outputs, teacher: Outputs, batch: Batch, *, train: bool
    ) -> Float[Array, " batch"]:
        """Return CRD of each image; in training, the memory then follows.

        Raises:
            ValueError: the batch does not say which images it has, or which classes they are of.
        """
        if batch.indices is None:
            raise ValueError("crd remembers each image by its index, and the batch has no indices")
        values, memory = contrast(
            self.student(vectors(student.taps[self.student_tap])),
            self.teacher(vectors(teacher.taps[self.teacher_tap])),
            self.memory,
            batch.indices,
            self.negatives(labels_of(batch)),
            images=len(self.classes),
            where=batch.where,
        )
        if train:
            self.remember(memory)
        return values

    def negatives(self, labels: Int[Array, " batch"]) -> Bool[Array, "batch rows"]:
        """Draw anew which images each of a batch is compared with."""
        classes = self.classes[...]
        drawn = draw_negatives(self.stream(), classes, labels, count=self.count, largest=self.largest)
        return jnp.pad(drawn, ((0, 0), (0, len(self.student_memory) - len(classes))))

    @property
    def memory(self) -> Memory:
        """Return what is remembered."""
        return Memory(*(variable[...] for variable in self._variables))

    def remember(self, memory: Memory) -> None:
        """Take another memory."""
        for variable, value in zip(self._variables, memory, strict=True):
            variable[...] = value

    @property
    def _variables(self) -> tuple[nnx.Variable, ...]:
        return self.student_memory, self.teacher_memory, self.student_scale, self.teacher_scale
