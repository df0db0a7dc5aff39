"""Every strategy that was measured, in the three things it costs: time, peak memory, bytes held."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv

QUESTION = "What does each way of keeping keys and values cost?"

METRICS = (
    _kv.Metric("e2e_s", "time of a turn (s)"),
    _kv.Metric("peak_memory_mib", "peak memory\nabove the model (MiB)"),
    _kv.Metric("kv_mib", "bytes held\nby the cache (MiB)"),
)


def draw(
    summary: pd.DataFrame,
    samples: pd.DataFrame,
    *,
    model: str | None = None,
    scenario: str | None = None,
) -> Figure:
    """Draw one row of panels per machine.

    Parameters
    ----------
    summary, samples:
        The tables ``kv_summary`` and ``kv_samples``.
    model, scenario:
        Narrow the choice of cell; by default each machine shows the model and scenario in which it
        measured the most strategies. Those that it cannot run are left out; the paper lists them.
    """
    return _kv.metric_figure(QUESTION, METRICS, summary, samples, model=model, scenario=scenario)
