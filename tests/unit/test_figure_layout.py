"""Figures at print size: nothing is cut off, no two texts cover each other, logarithms are said."""

from __future__ import annotations

import importlib
import itertools

import pandas as pd
import pytest
import synthetic_kv
from kvbench.figures import _language, _scales, style
from matplotlib.text import Text

FIGURES = ("kv_overview", "kv_turns", "kv_latency", "kv_memory", "kv_speedup")


@pytest.fixture(scope="module", params=FIGURES)
def drawn(request):
    """A figure of two machines in Portuguese, whose words are the longer ones, and its texts' boxes."""
    import matplotlib.pyplot as plt

    style.apply()
    tables = [
        pd.concat([table, table.assign(machine="epyc-turin-2core")])
        for table in synthetic_kv.tables()
    ]
    figure = importlib.import_module(f"kvbench.figures.{request.param}").draw(*tables)
    _scales.explain(figure)
    _language.localise(figure, "pt")
    figure.draw_without_rendering()
    yield figure, list(boxes(figure))
    plt.close(figure)


def boxes(figure):
    """Texts that are seen, with their boxes on the screen."""
    hidden = set()
    for ax in _scales.all_axes(figure):
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not (ax.get_visible() and low <= tick.get_loc() <= high):
                    hidden |= {id(tick.label1), id(tick.label2)}
        if not ax.get_visible():
            hidden |= {id(text) for text in ax.findobj(Text)}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden:
            box = text.get_window_extent()
            if box.width > 1:
                yield text, box


def test_no_text_is_cut_off_at_the_edge(drawn):
    figure, texts = drawn
    width, height = figure.canvas.get_width_height()
    out = [
        text.get_text()
        for text, box in texts
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    assert out == []


def test_no_text_covers_another(drawn):
    _, texts = drawn
    covering = [
        (one.get_text(), other.get_text())
        for (one, a), (other, b) in itertools.combinations(texts, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1
        and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.25 * min(a.height, b.height)
    ]
    assert covering == []


def test_every_named_logarithmic_axis_says_so(drawn):
    figure, _ = drawn
    for ax in _scales.all_axes(figure):
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_scale() == "log" and axis.get_label().get_text():
                assert axis.get_label().get_text().endswith("log")


def test_a_figure_fits_a_page(drawn):
    figure, _ = drawn
    assert figure.get_size_inches()[0] <= style.PAGE_WIDTH
    assert figure.get_size_inches()[1] <= 9.2
