"""How every figure looks and is saved: fonts, widths, one colour per strategy, stable bytes."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from kvbench import documents
from kvbench.strategies.looks import look

#: Widths of one and of two text columns, in inches.
COLUMN_WIDTH = 3.35
PAGE_WIDTH = 7.0

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
            "savefig.dpi": 200,
        }
    )


def save(figure: Figure, base: Path, language: str | None = None) -> list[Path]:
    """Write ``base`` as PDF, SVG and PNG without dates: the same data give the same bytes.

    With a language the figure, which is drawn in English, is put into it first, and the files are
    called ``<base>.<language>``.
    """
    from kvbench.figures import _language

    if language is not None:
        _language.localise(figure, language)
        base = base.with_name(f"{base.name}.{language}")
    base.parent.mkdir(parents=True, exist_ok=True)
    stamps = {"pdf": {"CreationDate": None, "ModDate": None}, "svg": {"Date": None}, "png": {}}
    written = []
    for suffix, metadata in stamps.items():
        path = base.with_name(f"{base.name}.{suffix}")
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix, metadata=metadata)
        documents.write_bytes_atomic(path, drawn.getvalue())
        written.append(path)
    plt.close(figure)
    return written


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
