"""How every figure looks and is saved: fonts, widths, one colour per strategy, stable bytes."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.backends import backend_agg, backend_pdf, backend_svg
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvbench import documents
from kvbench.strategies.looks import look

#: Widths of one and of two text columns, in inches.
COLUMN_WIDTH = 3.35
PAGE_WIDTH = 7.0
#: Dots per inch of the bitmaps.
_DPI = 200

#: Okabe and Ito (2008), "Color Universal Design (CUD): How to make figures and presentations that are
#: friendly to colorblind people": safe for the common colour-vision deficiencies. The grey is ours.
OKABE_ITO = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "grey": "#7F7F7F",
}


def apply() -> None:
    """Set the look of all figures; called once by each drawing script."""
    sns.set_theme(context="paper", style="ticks", palette=list(OKABE_ITO.values()))
    plt.rcParams.update(
        {
            # Times, as in the paper's text; the SVG falls back to what the reader's browser has.
            "font.family": "serif",
            "font.serif": ["STIXGeneral", "Times New Roman", "Times", "DejaVu Serif"],
            "mathtext.fontset": "stix",
            "font.size": 8.5,
            "axes.titlesize": 8.5,
            "axes.labelsize": 8,
            "legend.fontsize": 7,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.constrained_layout.use": True,
            "pdf.fonttype": 42,
            "ps.fonttype": 42,
            "svg.fonttype": "none",
            "svg.hashsalt": "kvbench",
            "savefig.dpi": _DPI,
        }
    )


def save(figure: Figure, base: Path, *languages: str) -> list[Path]:
    """Write ``base`` as PDF, SVG and PNG without dates: the same data give the same bytes.

    With languages the figure, which is drawn in English, is put into each of them in turn, and the
    files are called ``<base>.<language>``. It is closed at the end.

    Where everything stands is computed once per language and holds for all formats; what matplotlib's
    own ``savefig`` does beside that is to compute it again, and draw once more, for each format.
    """
    from kvbench.figures import _language, _scales

    _scales.explain(figure)
    base.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for language in languages or ("",):
        stem = f"{base.name}.{language}" if language else base.name
        with _language.spoken(figure, language or "en"):
            _literally(figure)
            for suffix, drawn in _formats(figure).items():
                path = base.with_name(f"{stem}.{suffix}")
                documents.write_bytes_atomic(path, drawn)
                written.append(path)
    plt.close(figure)
    return written


def _literally(figure: Figure) -> None:
    """Print dollar signs as they are: no label is mathematics but powers of ten at ticks."""
    for axis in (axis for axes in figure.axes for axis in axes._axis_map.values()):
        # Names at ticks are written when somebody asks for them.
        axis.get_ticklabels(which="both")
    for text in figure.findobj(Text):
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)


def _formats(figure: Figure) -> dict[str, bytes]:
    """The figure as it stands in every format."""
    canvas, dpi = figure.canvas, _DPI
    layout = figure.get_layout_engine() if figure.axes else None
    if layout is not None:
        backend_agg.FigureCanvasAgg(figure)
        figure.set_dpi(dpi)
        # A legend below its axes has its final place only when these have theirs.
        for _ in range(2):
            layout.execute(figure)
        figure.set_layout_engine("none")
    rendered = {}
    for suffix, render in (("pdf", _pdf), ("svg", _svg), ("png", _png)):
        # The vector formats leave the figure at 72 dots per inch.
        figure.set_dpi(dpi)
        with io.BytesIO() as file:
            render(figure, file)
            rendered[suffix] = file.getvalue()
    if layout is not None:
        figure.set_layout_engine(layout)
    figure.set_canvas(canvas)
    return rendered


def _pdf(figure: Figure, file: io.BytesIO) -> None:
    stamps = {"CreationDate": None, "ModDate": None}
    backend_pdf.FigureCanvasPdf(figure).print_pdf(file, metadata=stamps)


def _svg(figure: Figure, file: io.BytesIO) -> None:
    backend_svg.FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})


def _png(figure: Figure, file: io.BytesIO) -> None:
    backend_agg.FigureCanvasAgg(figure).print_png(file)


def label(strategy: str, compiled: object = None) -> str:
    """What the reader sees for a strategy.

    ``compiled`` is the column of that name: the library compiles a static cache on CUDA and not on
    CPU, so the plain word would hide two different things.
    """
    text = look(strategy).label
    if strategy in {"static", "static_reuse"} and isinstance(compiled, bool | np.bool_):
        way = "compiled" if compiled else "eager"
        return text.replace(")", f", {way})") if ")" in text else f"{text} ({way})"
    return text
