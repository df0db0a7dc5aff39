"""Values of reuse and of lossy caches, and the order in which the paper tells the studies."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from kvbench.analysis import metrics, selection, tables
from kvbench.paper import sections
from kvbench.paper.values import Value

IDENTITY = {"model": "embedded", "device": "cpu", "dtype": "float32", "scenario": "talk"}


def summary(strategies: list[str], machine: str = "here") -> pd.DataFrame:
    columns = ["machine", *IDENTITY, "strategy", "status", "turns", "e2e_s_median"]
    return pd.DataFrame(
        [
            {"machine": machine, **IDENTITY, "strategy": name, "status": "ok", "turns": 3}
            | {"e2e_s_median": 1.0}
            for name in strategies
        ],
        columns=columns,
    )


def samples(machine: str = "here") -> pd.DataFrame:
    rows = []
    for strategy, ttfts in (("dynamic", (0.1, 0.2, 0.4)), ("dynamic_reuse", (0.1, 0.1, 0.1))):
        for replicate in (1, 2, 3):
            for turn, ttft in enumerate(ttfts, start=1):
                for iteration in range(4):
                    reused = 100 * (turn - 1) if strategy.endswith("_reuse") else 0
                    rows.append(
                        {
                            "machine": machine,
                            **IDENTITY,
                            "strategy": strategy,
                            "replicate": replicate,
                            "turn": turn,
                            "iteration": iteration,
                            "block": f"talk/r{replicate}",
                            "round": iteration,
                            "disturbed": False,
                            "prompt_tokens": 100 * turn,
                            "reused_tokens": reused,
                            "ttft_s": ttft * (1 + 0.01 * iteration),
                            "kv_mib": 1.0 * turn,
                        }
                    )
    return pd.DataFrame(rows)


def reuse(summary: pd.DataFrame, samples: pd.DataFrame) -> dict[str, Value]:
    return sections.reuse_values(summary, samples, selection.choices(summary, samples))


def test_reuse_is_compared_with_the_same_cache_without_it_at_the_last_turn():
    found = reuse(summary(["dynamic", "dynamic_reuse"]), samples())
    assert found["reuse_strategies"].value == "dynamic_reuse"
    assert found["reuse_turns"].value == 3
    speedup = found["reuse_dynamic_reuse_speedup"]
    assert speedup.value == pytest.approx(4.0)
    assert speedup.ci[0] <= speedup.value <= speedup.ci[1]
    assert found["reuse_dynamic_reuse_share"].value == pytest.approx(100 * 300 / 600)
    assert found["reuse_dynamic_reuse_held"].value == 3.0


def test_without_a_reusing_strategy_the_list_is_empty():
    found = reuse(summary(["dynamic"]), samples())
    assert found == {"reuse_strategies": found["reuse_strategies"]}
    assert found["reuse_strategies"].value == ""


def test_a_saving_from_too_few_rounds_has_no_interval():
    table, rows = summary(["dynamic", "dynamic_reuse"]), samples()
    chosen = selection.choices(table, rows)
    more = {"here": metrics.Evidence(rounds=50, blocks=1)}
    speedup = sections.reuse_values(table, rows, chosen, more)["reuse_dynamic_reuse_speedup"]
    assert speedup.value == pytest.approx(4.0)
    assert speedup.ci is None


def test_a_saving_beside_a_control_that_is_off_has_no_interval():
    table = summary(["dynamic", "dynamic_reuse"])
    table["not_judged"] = [f"{metrics.CONTROL_OFF} by 15.0 %", None]
    speedup = reuse(table, samples())["reuse_dynamic_reuse_speedup"]
    assert (speedup.value, speedup.ci) == (pytest.approx(4.0), None)


def test_the_machine_is_the_one_that_measured_a_reusing_strategy():
    table = pd.concat([summary(["none", "dynamic"]), summary(["dynamic", "dynamic_reuse"], "lab")])
    rows = pd.concat([samples().query("strategy == 'dynamic'"), samples("lab")])
    found = reuse(table, rows)
    assert found["reuse_machine"].value == "lab"
    assert found["reuse_strategies"].value == "dynamic_reuse"
    assert found["reuse_dynamic_reuse_held"].cells[0].startswith("results/recorded/lab/cells/kv/")


def test_prose_and_figure_show_the_same_conversation():
    short = summary(["dynamic", "dynamic_reuse", "static_reuse"]).assign(scenario="chat", turns=2)
    table = pd.concat([summary(["dynamic", "dynamic_reuse"]), short])
    rows = pd.concat([samples(), samples().assign(scenario="chat")])
    assert reuse(table, rows)["reuse_scenario"].value == "chat"
    assert selection.reusing(table, rows, "here")[1] == "chat"


def test_a_reusing_strategy_that_failed_in_one_replicate_is_told():
    table = summary(["dynamic", "dynamic_reuse"])
    table.loc[table["strategy"] == "dynamic_reuse", "status"] = "mixed"
    assert reuse(table, samples())["reuse_strategies"].value == "dynamic_reuse"


def test_a_disturbed_repeat_does_not_count():
    rows = samples()
    hit = (rows["iteration"] == 2) & (rows["strategy"] == "dynamic")
    rows.loc[hit, "ttft_s"] *= 100
    rows.loc[hit & (rows["turn"] == 1), "disturbed"] = True
    found = reuse(summary(["dynamic", "dynamic_reuse"]), rows)
    assert found["reuse_dynamic_reuse_speedup"].value == pytest.approx(4.0)


def quality(kl: float | None) -> pd.DataFrame:
    row = {"machine": "here", **IDENTITY, "strategy": "quantized_int4", "kl_nats": kl}
    row |= {"top1_share": 0.99, "perplexity": 1.1, "perplexity_exact": 1.0}
    row |= {"exact_reply_share": 0.5, "kv_bytes_per_token": 858.0}
    row |= {"kl_nats_ci_low": 0.001, "kl_nats_ci_high": 0.003}
    return pd.DataFrame([row], columns=list(tables.QUALITY_COLUMNS))


def scored(table: pd.DataFrame) -> dict[str, Value]:
    return sections.quality_values(table, selection.choices(summary([]), samples(), table))


def test_quality_of_two_models_is_not_pooled():
    other = quality(0.5).assign(model="another", strategy="quantized_int2")
    more = quality(0.3).assign(strategy="quantized_int2")
    found = scored(pd.concat([other, quality(0.002), more]))
    assert found["quality_model"].value == "embedded"
    assert found["quality_quantized_int2_kl_nats"].value == pytest.approx(0.3)


def test_quality_values_carry_units_and_intervals():
    found = scored(quality(0.002))
    assert found["quality_quantized_int4_kl_nats"].ci == pytest.approx((0.001, 0.003))
    assert found["quality_quantized_int4_top1_share"].value == pytest.approx(99.0)
    assert found["quality_quantized_int4_top1_share"].unit == "%"


def test_quality_that_was_not_scored_gives_an_empty_list():
    assert scored(quality(math.nan))["quality_strategies"].value == ""


def test_studies_follow_the_order_of_the_paper_and_unknown_ones_come_last():
    assert sections.study_sequence(["zebra", "semantic", "memoization"]) == [
        "memoization",
        "semantic",
        "zebra",
    ]


def test_this_run_stands_for_itself_and_a_recorded_machine_only_for_lack_of_it():
    both = pd.concat([summary(["none"], "alpha"), summary(["none"])])
    assert set(selection.one_machine(both)["machine"]) == {"here"}
    assert set(selection.one_machine(summary(["none"], "alpha"))["machine"]) == {"alpha"}
