"""A drawn figure as a light bitmap, for pages that hold their figures."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

#: Colours of a bitmap: charts have few, and with a palette a page stays light.
COLOURS = 64


def bitmap(path: Path) -> bytes:
    """A PNG with a palette.

    Not the SVG: its text is text, and where its font is missing another one runs out of the picture.
    """
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    written = io.BytesIO()
    few.save(written, "PNG", optimize=True)
    return written.getvalue()
