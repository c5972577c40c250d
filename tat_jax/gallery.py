"""What a run draws after each evaluation: what was confused, and what networks see in some of the images."""

import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, UInt8
from PIL import Image, ImageDraw

from tat_jax import overlays, paths, pictures, sharding
from tat_jax.captions import LINE, fit, font
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.source import class_colours, class_names
from tat_jax.distill import Recipe
from tat_jax.evaluate import Evaluation
from tat_jax.tasks.task import Task

_IMAGES = 4  # spread evenly over the split
_SIDE, _GAP = 320, 6  # pixels: the longer side of an image that is shown, and between two of them

LabelMap = UInt8[np.ndarray, "rows columns"]
Look = list[tuple[np.ndarray, LabelMap, str]]


class Gallery:
    """The pictures of a run's evaluations, each replacing the one before.

    `predictions.png` is drawn after each evaluation where labels are maps, `confusion.png` after the last one
    where the task counts what is confused.
    The process that shows computes by copies on a device of its own, and no other waits; but for what the
    teacher predicts whose arrays are split over the devices of all, which is computed once.

    Args:
        folder: the run's.
        data: the images to validate.
        recipe: has the task, and the structure of the teacher's view.
        teacher: the arrays of that; None where there is no teacher.
        mesh: the devices.
        show: whether this process draws.
    """

    def __init__(
        self,
        folder: Path,
        data: Pipeline,
        recipe: Recipe,
        teacher: nnx.State | None,
        mesh: Mesh,
        *,
        show: bool,
    ):
        self._folder, self._data, self._task, self._mesh, self._show = folder, data, recipe.task, mesh, show
        self._teacher = None
        if recipe.teacher is not None and teacher is not None and recipe.teacher_has_head:
            self._teacher = recipe.teacher, teacher

    def draw_confusion(self, evaluation: Evaluation) -> None:
        """Draw what an evaluation confused, which takes seconds where classes are many.

        Raises:
            OSError: the picture cannot be written.
        """
        if self._show and evaluation.confusion is not None:
            with paths.replacing(self._folder / "confusion.png") as partial:
                pictures.plot_confusion(evaluation.confusion, partial, class_names(self._data.source))

    def draw(self, graph: nnx.GraphDef, state: nnx.State) -> None:
        """Draw what a student's view predicts; to be called in every process.

        Args:
            graph: the structure of the view.
            state: its arrays, whole on every device.

        Raises:
            OSError: the picture cannot be written.
        """
        if self._teacher and not sharding.are_whole(self._teacher[1]):
            _ = self._of_teacher
        source = self._data.source
        if self._show and (maps := self._label_maps(graph, state)):
            named, colours = class_names(source), class_colours(source)
            columns = {"truth": [label for _, label, _ in self._look], "prediction": maps, **self._of_teacher}
            palette = overlays.palette(source.num_classes, colours)
            shown = [overlays.inside(label) for of in columns.values() for label in of]
            sheet = _sheet(self._look, columns, palette)
            legend = overlays.legend(overlays.names(shown, named), palette, sheet.shape[1])
            with paths.replacing(self._folder / "predictions.png") as partial:
                Image.fromarray(np.concatenate([sheet, legend])).save(partial, "PNG", compress_level=1)

    @functools.cached_property
    def _look(self) -> Look:
        """Return the images that are shown, where labels are maps."""
        if len(self._data.label_shape or ()) != 2:  # so that nothing is read that is not shown
            return []
        look = self._data.look(_IMAGES)
        return [(image, np.asarray(label), name) for image, label, name in look]

    @functools.cached_property
    def _of_teacher(self) -> Mapping[str, list[LabelMap]]:
        """Return what the teacher predicts, which stays."""
        maps = self._label_maps(*self._teacher) if self._teacher else []
        return {"teacher": maps} if maps else {}

    def _label_maps(self, graph: nnx.GraphDef, state: nnx.State) -> list[LabelMap]:
        """Return what a network predicts of the images that are shown, one after the other."""
        mesh = None if sharding.are_whole(state) else self._mesh
        if mesh is None:
            state = jax.tree.map(lambda array: array.addressable_data(0), state)
        found = [
            _class_maps(graph, self._task, mesh, state, image[None], label[None])
            for image, label, _ in self._look
        ]
        return [np.asarray(maps)[0] for maps in found if maps is not None]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _class_maps(
    graph: nnx.GraphDef, task: Task, mesh: Mesh | None, state: nnx.State, image: Array, label: Array
) -> Array | None:
    """Return the class of each pixel; on all devices of a mesh, where the state is split over them."""
    state = sharding.gathered(state, mesh) if mesh else state
    maps = task.class_maps(nnx.merge(graph, state)(image), label)
    return sharding.gathered(maps, mesh) if mesh else maps


def _sheet(
    look: Look, columns: Mapping[str, list[LabelMap]], palette: UInt8[np.ndarray, "256 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Return a row for each image: itself as its file has its sides, and its label maps beside it."""
    inside = [overlays.inside(label).shape for _, label, _ in look]
    sizes = [tuple(max(side * _SIDE // max(shape), 1) for side in shape) for shape in inside]
    cell, high = max(width for _, width in sizes) + _GAP, sum(height + LINE for height, _ in sizes)
    canvas = Image.new("RGB", (cell * (1 + len(columns)), LINE + high), "white")
    draw = ImageDraw.Draw(canvas)
    for i, title in enumerate(("image", *columns)):
        draw.text((i * cell + _GAP // 2, 2), title, "black", font())
    top = LINE
    for i, ((image, _, name), (height, width)) in enumerate(zip(look, sizes, strict=True)):
        shown = [Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)]
        for maps in columns.values():
            label = Image.fromarray(overlays.inside(maps[i])).resize(
                (width, height), Image.Resampling.NEAREST
            )
            shown.append(Image.fromarray(overlays.colourise(np.asarray(label), palette)))
        for j, picture in enumerate(shown):
            canvas.paste(picture, (j * cell + _GAP // 2, top))
        draw.text((_GAP // 2, top + height + 1), fit(Path(name).name, cell), "black", font())
        top += height + LINE
    return np.asarray(canvas)
