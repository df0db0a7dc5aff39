"""The source document's three panels by strategy: generation time, memory, tokens per second."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from kvbench.figures import _kv

QUESTION = "What does each way of keeping keys and values cost?"

METRICS = (
    _kv.Metric("e2e_s", "generation time per turn\nE2E latency (s)"),
    _kv.Metric("peak_memory_mib", "memory above the model\npeak (MiB)", inner="kv_mib"),
    _kv.Metric("output_tokens_per_s", "tokens per second\noutput throughput (tokens/s)"),
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
        measured the most strategies.
    """
    return _kv.metric_figure(QUESTION, METRICS, summary, samples, model=model, scenario=scenario)
