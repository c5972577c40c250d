"""Pictures of runs."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import numpy as np
from jaxtyping import Integer
from PIL import Image, ImageDraw

from tat_jax import overlays, paths
from tat_jax.captions import LINE, fit, font
from tat_jax.comparison import Comparison, Rows, interval, of_average
from tat_jax.data.pipeline import Pipeline
from tat_jax.data.source import Label, Source, class_colours, class_names, printable
from tat_jax.quantities import count
from tat_jax.tasks.task import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Block: TypeAlias = list[tuple[np.ndarray, str]]  # images, each with its caption

_IMAGES, _COLUMNS = 16, 8  # of each split, in rows of so many
_WRITTEN = 32  # classes or fewer of a confusion, whose cells have numbers
_LEAST, _MOST = 96, 224  # of the side of an image that is shown
_LISTED = 8  # methods or fewer of a study, whose legend lies within the axes
_STYLES = ("-", "--", "-.", ":")  # of lines, where there are more than ten colours
# Of dots: their marker and colour, and how far they lie below the place of their method.
_EPOCHS = {"last": ("o", "C0", -0.16), "best": ("D", "C1", 0.16)}


def plot_run(rows: Rows, path: Path, terms: Sequence[str], task: Task) -> None:
    """Draw the loss, its terms and the task's measures of one run against the step."""
    figure = _figure(11, 4)
    loss, measures = figure.subplots(1, 2)
    for name in ("loss", *terms):
        steps, values = _column(rows, f"train/{name}")
        if len(steps):
            loss.plot(steps, values, label=name)
    loss.set(xlabel="step", ylabel="loss", title="Training", yscale="log")
    for evaluations, whose in ((rows, ""), (of_average(rows), " of the EMA")):
        for name, title in task.titles.items():
            steps, values = _column(evaluations, f"eval/{name}")
            if len(steps):
                measures.plot(steps, task.shown(values), marker=".", label=f"{title}{whose}")
    measures.set(xlabel="step", ylabel=_of_unit(", ".join(task.titles.values()), task), title="Validation")
    for axes in (loss, measures):
        axes.grid(alpha=0.3)
        _count(axes)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def plot_study(study: Comparison, path: Path) -> None:
    """Draw mean and standard deviation of the task's best measure over the seeds of each method, by epoch."""
    task = study.task
    few = len(study.lines) <= _LISTED
    figure = _figure(8 if few else 11, 5)
    axes = figure.subplots()
    for (name, measures), style in zip(study.teachers.items(), itertools.cycle(("--", "-.", ":"))):
        if task.best in measures:
            label = f"{name} {measures[task.best]:.1f} {task.unit}".strip()
            axes.axhline(measures[task.best], color="black", linestyle=style, label=label)
    for line, (style, colour) in zip(study.lines, itertools.product(_STYLES, range(10)), strict=False):
        epochs = _column(line.runs[0], f"eval/{task.best}", by="epoch")[0]
        values = task.shown(np.stack([_column(rows, f"eval/{task.best}")[1] for rows in line.runs]))
        mean, deviation = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
        label = f"{line.method} {mean[-1]:.1f} {task.unit}".strip()
        axes.plot(epochs, mean, label=label, color=f"C{colour}", linestyle=style)
        axes.fill_between(epochs, mean - deviation, mean + deviation, color=f"C{colour}", alpha=0.2, lw=0)
    title = "Students, mean ± standard deviation over seeds"
    axes.set(xlabel="epoch", ylabel=_of_unit(f"validation {task.titles[task.best]}", task), title=title)
    axes.grid(alpha=0.3)
    _count(axes)
    legend = axes.legend(loc="lower right") if few else figure.legend(loc="outside right upper")
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path, dpi=120)


def plot_comparison(study: Comparison, path: Path) -> None:
    """Draw the last and the best measure of each method: its seeds, their mean and its 95 % interval.

    Methods of one control have axes of their own, in which a line is the mean of the control's last epoch.
    """
    groups, task = study.groups, study.task
    heights = [len(lines) for lines in groups.values()]
    figure = _figure(9, 1.2 + 0.45 * sum(heights) + 0.6 * len(groups))
    panels = figure.subplots(len(groups), height_ratios=[height + 0.5 for height in heights], squeeze=False)
    for axes, (control, lines) in zip(panels[:, 0], groups.items(), strict=True):
        for epoch, style in _EPOCHS.items():
            _dots(axes, [line.cells[task.best, epoch].values for line in lines], f"{epoch} epoch", *style)
        (of_control,) = (line for line in lines if line.method == control)
        axes.axvline(of_control.cells[task.best, "last"].mean, color="black", linestyle=":", lw=1, zorder=0)
        axes.set_yticks(range(len(lines)), [line.method for line in lines], parse_math=False)
        axes.set_ylim(len(lines) - 0.5, -0.5)  # in the order of the table
        axes.set_title(f"dotted: {control}, last epoch", fontsize=9, loc="right", parse_math=False)
        axes.grid(alpha=0.3, axis="x")
    panels[-1, 0].set_xlabel(_of_unit(f"validation {task.titles[task.best]}", task))
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False
    )
    spread = "mean and its 95 % interval" if len(study.seeds) > 1 else "which has no interval"
    figure.suptitle(f"{count(len(study.seeds), 'seed')}, {spread}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=120)


def _dots(
    axes: "Axes", methods: Sequence[Sequence[float]], label: str, marker: str, colour: str, shift: float
) -> None:
    """Draw the values of methods, one below the other, each with their mean and its interval."""
    places = np.arange(len(methods)) + shift
    for place, values in zip(places, methods, strict=True):
        axes.scatter(values, np.full(len(values), place), s=18, color="white", edgecolors=colour, zorder=3)
    means, lows, highs = np.array([interval(values) for values in methods]).T
    ends = None if np.isnan(lows).any() else [means - lows, highs - means]
    bars = axes.errorbar(means, places, xerr=ends, fmt=marker, color=colour, ms=7, lw=1, capsize=3, zorder=4)
    bars.set_label(label)


def plot_confusion(
    confusion: Integer[np.ndarray, "classes classes"], path: Path, classes: Sequence[str] | None
) -> None:
    """Draw as what pixels or images of each class are predicted, in percent of that class.

    Args:
        confusion: counts [truth, prediction]; those of each class stand beside its name.
        path: the picture, a PNG.
        classes: their names by number; None where they have none.
    """
    counts = confusion.sum(1)
    shares = 100 * confusion / np.maximum(counts, 1)[:, None]
    names = [printable(name) for name in classes or map(str, range(len(confusion)))]
    side = min(max(6.0, 0.36 * len(names)), 40.0)
    figure = _figure(side + 2, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of a class", fraction=0.04)
    places, size = np.arange(len(names)), 8 if len(names) <= _WRITTEN else 5
    axes.set_xticks(places, names, rotation=90, fontsize=size, parse_math=False)
    rows = [f"{name} ({count:,})" for name, count in zip(names, counts, strict=True)]
    axes.set_yticks(places, rows, fontsize=size, parse_math=False)
    axes.set(xlabel="prediction", ylabel="truth (how many)", title="Confusion")
    if len(names) <= _WRITTEN:
        for truth, prediction in np.argwhere(shares >= 0.5):
            share = shares[truth, prediction]
            colour = "white" if share > 50 else "black"
            axes.text(prediction, truth, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font has not becomes a box
        figure.savefig(path, dpi=120, format="png")


def draw_images(train: Pipeline, val: Pipeline, path: Path) -> None:
    """Draw sixteen training crops and sixteen images to validate as networks see them, with their labels.

    A class stands below its image; a label map lies over it, and a legend below all.

    Args:
        train: the training images; of them the first of the first epoch.
        val: those to validate, spread evenly over the split.
        path: the picture.

    Raises:
        DecodeError: one of them is no image, unless `data.skip_broken`.
        OSError: an image cannot be read, or the picture not be written.
    """
    looks = {"training crops": list(train.look(_IMAGES)), "images to validate": list(val.look(_IMAGES))}
    colours = _colours(train.source)
    blocks = {
        title: [
            (_with_label(image, label, colours), _caption(label, name, data)) for image, label, name in look
        ]
        for (title, look), data in zip(looks.items(), (train.source, val.source), strict=True)
    }
    labels = [label for look in looks.values() for _, label, _ in look]
    _save(_sheet(blocks, _IMAGES // _COLUMNS), labels, train.source, path)


def draw_crops(train: Pipeline, path: Path) -> None:
    """Draw the first training crops of the first epoch, with their classes or beside them their label maps.

    Args:
        train: the training images.
        path: the picture.

    Raises:
        DecodeError: one of them is no image, unless `data.skip_broken`.
        OSError: an image cannot be read, or the picture not be written.
    """
    look, colours = list(train.look(_COLUMNS)), _colours(train.source)
    blocks = {"training crops": [(image, _caption(label, name, train.source)) for image, label, name in look]}
    labels = [label for _, label, _ in look]
    if any(map(_is_map, labels)):
        blocks["with their labels"] = [
            (_with_label(image, label, colours), _caption(label, name, train.source))
            for image, label, name in look
        ]
    _save(_sheet(blocks, 1), labels, train.source, path)


def _sheet(blocks: Mapping[str, _Block], rows: int) -> Image.Image:
    """Return blocks of so many rows of images one below the other, each below its title."""
    size = max((len(image) for block in blocks.values() for image, _ in block), default=_LEAST)
    side = min(size * -(-_LEAST // size), _MOST)  # small ones in whole multiples
    width, height = side + 6, side + LINE
    canvas = Image.new("RGB", (width * _COLUMNS, (LINE + height * rows) * len(blocks)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (title, block) in enumerate(blocks.items()):
        top = i * (LINE + height * rows)
        draw.text((3, top + 2), title, "black", font())
        for j, (image, caption) in enumerate(block):
            x, y = 3 + j % _COLUMNS * width, top + LINE + j // _COLUMNS * height
            canvas.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BOX), (x, y))
            draw.text((x, y + side + 1), fit(caption, side), "black", font())
    return canvas


def _save(sheet: Image.Image, labels: Sequence[Label], source: Source, path: Path) -> None:
    """Write a sheet whole or not at all, below it what the colours of its label maps mean."""
    maps = [label for label in labels if _is_map(label)]
    if maps:
        named = overlays.names(maps, class_names(source))
        legend = overlays.legend(named, _colours(source), sheet.width)
        sheet = Image.fromarray(np.concatenate([np.asarray(sheet), legend]))
    with paths.replacing(path) as partial:
        sheet.save(partial, "PNG", compress_level=1)


def _is_map(label: Label) -> TypeGuard[np.ndarray]:
    return isinstance(label, np.ndarray) and label.ndim == 2 and label.dtype == np.uint8


def _colours(source: Source) -> np.ndarray:
    return overlays.palette(source.num_classes, class_colours(source))


def _with_label(image: np.ndarray, label: Label, colours: np.ndarray) -> np.ndarray:
    """Return an image under its label map, which in evaluation has the size that its file has."""
    if not _is_map(label):
        return image
    size = image.shape[1], image.shape[0]
    fitted = Image.fromarray(overlays.inside(label)).resize(size, Image.Resampling.NEAREST)
    return overlays.overlay(image, np.asarray(fitted), colours)


def _caption(label: Label, name: str, source: Source) -> str:
    """Return an image's class, or its file's name where a label is none."""
    classes = class_names(source)
    if not isinstance(label, int | np.integer):
        return Path(name).name
    if classes and 0 <= label < len(classes):
        return printable(classes[label])
    return str(label)


def _of_unit(what: str, task: Task) -> str:
    return f"{what}, {task.unit}" if task.unit else what


def _figure(width: float, height: float) -> "Figure":
    # Imported here, because a run needs it at its end and not for its first step.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _count(axes: "Axes") -> None:
    """Mark whole steps or epochs alone."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _column(rows: Rows, name: str, by: str = "step") -> tuple[np.ndarray, np.ndarray]:
    chosen = [(row[by], row[name]) for row in rows if name in row]
    steps, values = zip(*chosen, strict=True) if chosen else ((), ())
    return np.array(steps), np.array(values)
