"""The figure of swept options: which rows make a curve, and what each panel draws."""

from __future__ import annotations

import pandas as pd
import pytest
from kvbench.figures import _language, kv_options

IDENTITY = {
    "machine": "here",
    "model": "embedded",
    "device": "cpu",
    "dtype": "float32",
    "scenario": "context_growth",
}
WINDOWS = {64: 0.5, 256: 1.0, 1024: 2.0}


def name(window: int) -> str:
    return "sliding_window" if window == 256 else f"sliding_window-w{window}"


def summary(windows=WINDOWS, **changed) -> pd.DataFrame:
    rows = [
        {
            **IDENTITY,
            "strategy": name(window),
            "status": "ok",
            "kv_mib": mib,
            "e2e_s_median": 1.0,
            "samples": 12,
            "speedup_vs_dynamic": 1 / mib,
            "speedup_vs_dynamic_ci_low": 0.8 / mib,
            "speedup_vs_dynamic_ci_high": 1.25 / mib,
            "not_judged": None,
        }
        | changed
        for window, mib in windows.items()
    ]
    others = [
        rows[0] | {"strategy": "dynamic"},
        rows[0] | {"strategy": "control"},
        rows[0] | {"strategy": "attention_sink"},
    ]
    return pd.DataFrame([*reversed(rows), *others])


def quality() -> pd.DataFrame:
    rows = [
        {
            **IDENTITY,
            "strategy": name(window),
            "kl_nats": 1 / window,
            "kl_nats_ci_low": 0.5 / window,
            "kl_nats_ci_high": 2 / window,
        }
        for window in WINDOWS
    ]
    return pd.DataFrame(rows)


def panels(figure):
    return figure.subfigs[0].axes


def test_three_values_of_an_option_are_a_sweep_in_the_order_of_the_values():
    (sweep,) = kv_options.sweeps(summary())
    assert (sweep.strategy, sweep.option) == ("sliding_window", "window")
    assert list(sweep.rows["value"]) == [64, 256, 1024]


def test_two_values_are_no_curve_and_the_figure_says_so():
    table = summary({64: 0.5, 256: 1.0})
    assert kv_options.sweeps(table) == []
    texts = [text.get_text() for text in kv_options.draw(table, quality()).texts]
    assert any("three values" in text for text in texts)


def test_rows_that_differ_in_another_option_too_are_no_sweep():
    table = summary()
    table["strategy"] = [
        "quantized-hqq-b2-r16",
        "quantized-hqq-b3-r32",
        "quantized-hqq-b4-r64",
        *table["strategy"][3:],
    ]
    assert kv_options.sweeps(table) == []


def test_the_panels_are_bytes_time_over_dynamic_and_divergence():
    size, time, loss = panels(kv_options.draw(summary(), quality()))
    assert list(size.lines[0].get_xdata()) == [64, 256, 1024]
    assert list(size.lines[0].get_ydata()) == [0.5, 1.0, 2.0]
    assert list(time.lines[0].get_ydata()) == pytest.approx([0.5, 1.0, 2.0])
    low, high = time.collections[0].get_segments()[2][:, 1]
    assert (low, high) == pytest.approx((2 / 1.25, 2 / 0.8))
    assert list(loss.lines[0].get_ydata()) == pytest.approx([1 / 64, 1 / 256, 1 / 1024])


def test_a_ratio_that_may_not_be_judged_has_no_bar():
    table = summary(not_judged="not enough rounds: 3 of 10")
    _, time, _ = panels(kv_options.draw(table, quality()))
    assert list(time.lines[0].get_ydata()) == pytest.approx([0.5, 1.0, 2.0])
    assert not any(len(part) for part in time.collections[0].get_segments())


def test_a_sweep_without_quality_says_that_it_was_not_measured():
    loss = panels(kv_options.draw(summary(), quality().iloc[:0]))[2]
    assert [text.get_text() for text in loss.texts] == ["not measured"]


@pytest.mark.parametrize(
    ("english", "portuguese"),
    [
        ("sliding window 512", "janela deslizante 512"),
        ("int2 (quanto), rest of 16", "int2 (quanto), resto de 16"),
        ("quantised hqq, 3 bits", "quantizado hqq, 3 bits"),
        (kv_options.QUESTION, "O que traz uma opção de um cache, valor a valor?"),
    ],
)
def test_labels_of_variants_are_put_into_the_readers_language(english, portuguese):
    assert _language.phrases("pt").say(english) == portuguese
