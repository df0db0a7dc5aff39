"""How every figure looks and is saved: fonts, widths, one colour per strategy, stable bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

#: Widths of one and of two text columns, in inches.
COLUMN_WIDTH = 3.35
PAGE_WIDTH = 7.0

#: Okabe and Ito (2008), "Color Universal Design": safe for the common colour-vision deficiencies.
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
            "font.family": "serif",
            "font.serif": ["DejaVu Serif"],
            "mathtext.fontset": "cm",
            "font.size": 8,
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


def save(figure: Figure, base: Path) -> list[Path]:
    """Write ``base`` as PDF, SVG and PNG without dates: the same data give the same bytes."""
    base.parent.mkdir(parents=True, exist_ok=True)
    stamps = {"pdf": {"CreationDate": None, "ModDate": None}, "svg": {"Date": None}, "png": {}}
    written = []
    for suffix, metadata in stamps.items():
        path = base.with_suffix(f".{suffix}")
        figure.savefig(path, metadata=metadata)
        written.append(path)
    plt.close(figure)
    return written


@dataclass(frozen=True)
class Look:
    """Colour, marker and label by which a strategy is known in every figure.

    Attributes
    ----------
    colour:
        Hex colour. Hue names the family (static caches are orange, quantised ones green ...).
    marker:
        A matplotlib marker; no two strategies share one, so that colour is never the only sign.
    label:
        What the reader sees.
    """

    colour: str
    marker: str | tuple[int, int, int]
    label: str

    @property
    def size(self) -> float:
        """Factor on the marker size: thin shapes are drawn larger to weigh the same."""
        return 1.4 if self.marker in {"*", "P", "X"} or isinstance(self.marker, tuple) else 1.0


#: Every strategy the artifact ships. A strategy missing here still gets a look of its own, see
#: :func:`look`.
STRATEGIES = {
    "none": Look(OKABE_ITO["black"], "X", "no cache"),
    "dynamic": Look(OKABE_ITO["blue"], "o", "dynamic"),
    "dynamic_reuse": Look("#003F66", ">", "dynamic (reused)"),
    "static": Look(OKABE_ITO["vermilion"], "s", "static"),
    "static_compiled": Look(OKABE_ITO["orange"], "D", "static (forced compile)"),
    "static_graph": Look("#7A3300", "d", "static (own graph)"),
    "static_reuse": Look("#F0A070", "8", "static (reused)"),
    "offloaded": Look(OKABE_ITO["sky"], "^", "offloaded"),
    "offloaded_static": Look("#8ACFEF", "v", "offloaded static"),
    "quantized_int4": Look(OKABE_ITO["green"], "P", "int4 (quanto)"),
    "quantized_int4_reuse": Look("#00573F", (4, 1, 0), "int4 (quanto, reused)"),
    "quantized_int2": Look("#66C2A5", "p", "int2 (quanto)"),
    "quantized_hqq_int8": Look("#4B7A2B", "h", "int8 (HQQ)"),
    "quantized_hqq_int4": Look("#93B55A", "H", "int4 (HQQ)"),
    "quantized_fp8": Look("#B3A600", "*", "fp8"),
    "paged": Look(OKABE_ITO["purple"], "<", "paged"),
    "shared_prefix": Look("#8A3A68", (6, 1, 0), "shared prefix"),
    "sliding_window": Look(OKABE_ITO["grey"], (5, 0, 180), "sliding window"),
    "attention_sink": Look("#505050", (3, 1, 0), "attention sinks"),
    "kvpress_knorm": Look("#A6611A", (5, 1, 0), "key norms (kvpress)"),
    "kvpress_snapkv": Look("#6B3E0A", (5, 1, 36), "SnapKV (kvpress)"),
}

#: Markers for strategies this file has not heard of, all different from those above.
_SPARE_MARKERS = ((7, 1, 0), (8, 1, 0), (4, 0, 20), (7, 0, 0), (9, 1, 0), (3, 0, 20))
_SPARE_COLOURS = ("#5B5EA6", "#9B6A3C", "#B05A5A", "#3E8E8E")


def look(strategy: str) -> Look:
    """The look of a strategy; an unknown one gets a stable one derived from its name."""
    if strategy in STRATEGIES:
        return STRATEGIES[strategy]
    number = crc32(strategy.encode())
    return Look(
        _SPARE_COLOURS[number % len(_SPARE_COLOURS)],
        _SPARE_MARKERS[number % len(_SPARE_MARKERS)],
        strategy.replace("_", " "),
    )


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
