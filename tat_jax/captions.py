"""Lines of text in pictures."""

import functools
from pathlib import Path

from PIL import ImageFont

LINE = 18  # height of a caption


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    """Return the font of captions: DejaVu, which comes with Matplotlib."""
    from matplotlib import get_data_path  # here, because a run needs it for its pictures alone

    # Basic, and Pillow's: it draws what it has no letters for as boxes, without a warning.
    face = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(face, 12, layout_engine=ImageFont.Layout.BASIC)


def fit(text: str, width: int) -> str:
    """Return a text, or so much of its beginning as is not wider than so many pixels."""
    if font().getlength(text) <= width:
        return text
    text = text[:width]  # a letter takes a pixel
    while text and font().getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
