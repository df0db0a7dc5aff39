"""Time to first token and time per output token, apart, by strategy."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv

QUESTION = "Where does the time go: reading the prompt or writing the answer?"

METRICS = (
    _kv.Metric("ttft_s", "time to first token, TTFT (s)"),
    _kv.Metric("tpot_s", "time per output token, TPOT (s)"),
)


def draw(
    summary: pd.DataFrame,
    samples: pd.DataFrame,
    *,
    model: str | None = None,
    scenario: str | None = None,
) -> Figure:
    """Draw TTFT and TPOT side by side, one row per machine; arguments as in ``kv_overview``."""
    return _kv.metric_figure(QUESTION, METRICS, summary, samples, model=model, scenario=scenario)
