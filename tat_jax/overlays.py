"""Label maps as pictures: a colour for each class, alone or laid over the image, and what colours mean."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from tat_jax.captions import LINE, fit, font
from tat_jax.data.label_maps import IGNORED, OUTSIDE
from tat_jax.data.source import printable

_WHITE, _GREY, _DARK = (255, 255, 255), (208, 208, 208), (144, 144, 144)
_STRIPE = 4  # pixels of a row
_SWATCH, _GAP = 12, 5  # pixels of a legend


def palette(
    num_classes: int, colours: UInt8[np.ndarray, "classes 3"] | None = None
) -> UInt8[np.ndarray, "256 3"]:
    """Return the colour of each value of a label map: of classes, of what is ignored and what is outside.

    Args:
        num_classes: of the data.
        colours: of its classes. None is PASCAL VOC's: bits 0, 1 and 2 of the class are the highest ones of
            red, green and blue, bits 3, 4 and 5 the next, and bits 6 and 7 the third of red and green.

    Raises:
        ValueError: there are not as many colours as classes.
    """
    values, channels = np.arange(256)[:, None], np.arange(3)
    found = np.zeros((256, 3), np.uint8)
    for i in range(3):
        found |= ((values >> (3 * i + channels) & 1) << (7 - i)).astype(np.uint8)
    if colours is not None:
        if np.shape(colours) != (num_classes, 3):
            raise ValueError(f"{len(colours)} colours for {num_classes} classes")
        found[:num_classes] = colours
    found[IGNORED], found[OUTSIDE] = _WHITE, _GREY
    return found


def colourise(
    label: UInt8[np.ndarray, "height width"], palette: UInt8[np.ndarray, "256 3"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Return a label map in its colours; what is outside the image is hatched."""
    picture = palette[label]
    rows, columns = np.arange(label.shape[0])[:, None], np.arange(label.shape[1])
    picture[(label == OUTSIDE) & ((rows + columns) // _STRIPE % 2 > 0)] = _DARK
    return picture


def overlay(
    image: UInt8[np.ndarray, "height width 3"],
    label: UInt8[np.ndarray, "height width"],
    palette: UInt8[np.ndarray, "256 3"],
    opacity: float = 0.5,
) -> UInt8[np.ndarray, "height width 3"]:
    """Return (1 − opacity) · image + opacity · colours of its label; outside the image the hatch alone.

    Raises:
        ValueError: image and label are not of one size.
    """
    if image.shape[:2] != label.shape:
        sizes = " and ".join(" × ".join(map(str, shape[:2])) for shape in (image.shape, label.shape))
        raise ValueError(f"an image and its label are not of one size: {sizes}")
    colours = colourise(label, palette)
    mixed = np.rint((1 - opacity) * image.astype(np.float32) + opacity * colours).astype(np.uint8)
    outside = label == OUTSIDE
    mixed[outside] = colours[outside]
    return mixed


def inside(label: UInt8[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "height width"]:
    """Return the part of a label map, at its top left, that is not outside the image."""
    return label[label[:, 0] != OUTSIDE][:, label[0] != OUTSIDE]


def names(
    labels: Iterable[UInt8[np.ndarray, "height width"]], classes: Sequence[str] | None
) -> dict[int, str]:
    """Return what the values that occur in label maps are called, for a legend; outside has no name.

    Args:
        labels: the maps.
        classes: their names by value; None where the data has none: then by their numbers.
    """
    counts = np.zeros(256, np.int64)
    for label in labels:
        counts += np.bincount(label.ravel(), minlength=256)
    found = [value for value in np.flatnonzero(counts).tolist() if value != OUTSIDE]
    return {value: "ignored" if value == IGNORED else _name(value, classes) for value in found}


def legend(
    names: Mapping[int, str], palette: UInt8[np.ndarray, "256 3"], width: int
) -> UInt8[np.ndarray, "height {width} 3"]:
    """Draw a square of its colour before each name, in columns as wide as the longest name.

    Args:
        names: what is shown, by value of the label map.
        palette: the colours.
        width: of the legend, in pixels; its height follows.
    """
    margin = _SWATCH + 3 * _GAP
    widest = max((int(font().getlength(printable(name))) for name in names.values()), default=0)
    column = min(max(widest + 1 + margin, 1), width)
    columns = max(width // column, 1)
    canvas = Image.new("RGB", (width, max(-(-len(names) // columns), 1) * LINE), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (value, name) in enumerate(names.items()):
        x, y = i % columns * column + _GAP, i // columns * LINE + 3
        colour = tuple(palette[value].tolist())
        draw.rectangle((x, y, x + _SWATCH - 1, y + _SWATCH - 1), fill=colour, outline="black")
        draw.text((x + _SWATCH + _GAP, y - 1), fit(printable(name), column - margin), "black", font())
    return np.asarray(canvas)


def _name(value: int, classes: Sequence[str] | None) -> str:
    return classes[value] if classes and value < len(classes) else str(value)
