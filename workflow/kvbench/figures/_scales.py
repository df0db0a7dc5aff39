"""Logarithmic axes of every figure: said beside the quantity, with plain numbers where they fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter, LogLocator, NullFormatter

#: Plain numbers are written between these; beyond them powers of ten.
_PLAIN = (1e-3, 1e6)
#: Which multiples of a power of ten get a number, the densest first.
_SUBS = ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))
#: Numbers that fit an inch of a horizontal and of a vertical axis.
_PER_INCH = {"x": 2.6, "y": 4.5}


def explain(figure: Figure) -> None:
    """Write ", log" behind the label of each logarithmic axis, and number it plainly where that fits."""
    for ax in all_axes(figure):
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_scale() != "log":
                continue
            label = axis.get_label()
            if label.get_text() and not re.search(r"\blog\b", label.get_text()):
                label.set_text(f"{label.get_text()}, log")
            if isinstance(axis.get_major_formatter(), LogFormatter):
                _number(figure, ax, axis)


def _number(figure: Figure, ax: Axes, axis: Axis) -> None:
    axis.set_minor_formatter(NullFormatter())
    low, high = sorted(axis.get_view_interval())
    if low < _PLAIN[0] or high > _PLAIN[1]:
        return
    room = _room(figure, ax, axis.axis_name)
    for subs in _SUBS:
        places = [
            sub * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for sub in subs
        ]
        if sum(low <= place <= high for place in places) <= room or subs == _SUBS[-1]:
            numbers = int(room) if subs == _SUBS[-1] else max(9, int(room))
            axis.set_major_locator(LogLocator(subs=subs, numticks=numbers))
            break
    axis.set_major_formatter(FuncFormatter(plain))


def _room(figure: Figure, ax: Axes, name: str) -> float:
    """How many numbers an axis has room for, from the grid it stands in."""
    grid = ax.get_subplotspec()
    parts = 1 if grid is None else getattr(grid.get_gridspec(), "ncols" if name == "x" else "nrows")
    return max(2.0, _PER_INCH[name] * figure.get_size_inches()[int(name == "y")] * 0.75 / parts)


def plain(number: float, _: object = None) -> str:
    """0.5, 20, 1,000: never in powers of ten."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:g}"


def all_axes(figure: Figure) -> Iterator[Axes]:
    """Every axes of a figure and of its subfigures."""
    yield from dict.fromkeys(figure.axes)
    for part in getattr(figure, "subfigs", ()):
        yield from all_axes(part)
