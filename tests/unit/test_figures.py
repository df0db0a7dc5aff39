from __future__ import annotations

import importlib
import re

import numpy as np
import pandas as pd
import pytest
import synthetic_kv
from kvbench import strategies
from kvbench.analysis import metrics, selection
from kvbench.figures import style
from kvbench.strategies import looks
from matplotlib import pyplot as plt
from matplotlib.text import Text

NAMES = ("kv_overview", "kv_turns", "kv_latency", "kv_memory", "kv_speedup")


@pytest.fixture(autouse=True)
def _look():
    style.apply()
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def one():
    return synthetic_kv.tables()


def module(name: str):
    return importlib.import_module(f"kvbench.figures.{name}")


def words(figure) -> str:
    parts = [text.get_text() for text in figure.findobj(match=lambda a: hasattr(a, "get_text"))]
    return "\n".join(parts)


def test_dollar_signs_in_titles_labels_and_names_at_ticks_are_printed_literally(tmp_path):
    figure, ax = plt.subplots()
    ax.bar(["US$ 1 to US$ 2", "none"], [1.0, 1000.0], label="R$ 1 or R$ 2")
    ax.set_yscale("log")
    ax.set_title("Llama (US$$)")
    ax.legend()
    style.save(figure, tmp_path / "money", "en")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["US$ 1 to US$ 2", "none"]
    read = {text.get_text(): text.get_parse_math() for text in figure.findobj(Text)}
    for text in ("US$ 1 to US$ 2", "R$ 1 or R$ 2", "Llama (US$$)"):
        assert read[text] is False


@pytest.mark.parametrize("name", NAMES)
def test_figure_is_byte_identical_when_made_twice(name, one, tmp_path):
    first = style.save(module(name).draw(*one), tmp_path / "a" / name)
    second = style.save(module(name).draw(*one), tmp_path / "b" / name)
    assert [path.suffix for path in first] == [".pdf", ".svg", ".png"]
    for left, right in zip(first, second, strict=True):
        assert left.read_bytes() == right.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_figure_asks_its_question_and_names_units(name, one):
    figure = module(name).draw(*one)
    assert module(name).QUESTION.endswith("?")
    assert module(name).QUESTION in words(figure)
    for ax in figure.axes:
        label = ax.get_xlabel() + ax.get_ylabel()
        assert any(unit in label for unit in ("(s)", "(MiB)", "(tokens/s)", "(ratio", "tokens"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "narrowed",
    [
        {"strategies": ("dynamic",)},
        {"scenarios": ("symposium_turn",)},
        {"machines": ("epyc", "h200-gpu")},
    ],
)
def test_figure_survives_missing_strategies_scenarios_and_machines(name, narrowed):
    figure = module(name).draw(*synthetic_kv.tables(**narrowed))
    figure.draw_without_rendering()
    assert module(name).QUESTION in words(figure)


@pytest.mark.parametrize("name", NAMES)
def test_figure_without_any_measured_cell_says_so(name):
    summary, samples = synthetic_kv.tables(strategies=("offloaded", "offloaded_static", "none"))
    summary = summary[summary["status"] == "unsupported"].reset_index(drop=True)
    figure = module(name).draw(summary, samples.iloc[:0])
    assert "measured" in words(figure)


@pytest.mark.parametrize("name", NAMES)
def test_figure_reads_tables_as_csv_gives_them(name, one, tmp_path):
    tables = []
    for number, table in enumerate(one):
        table.to_csv(tmp_path / f"{number}.csv", index=False)
        tables.append(pd.read_csv(tmp_path / f"{number}.csv"))
    for folder, pair in {"memory": one, "csv": tables}.items():
        module(name).draw(*pair).savefig(tmp_path / f"{folder}.png", dpi=60)
    assert (tmp_path / "memory.png").read_bytes() == (tmp_path / "csv.png").read_bytes()


def test_overview_leaves_out_what_was_not_measured_and_stars_what_is_unstable(one):
    text = words(module("kv_overview").draw(*one))
    assert "offloaded" not in text
    assert "paged *" in text


def test_figures_say_how_many_conversations_they_rest_on(one):
    for name in ("kv_overview", "kv_turns", "kv_latency"):
        assert re.search(r"n = \d+", words(module(name).draw(*one))), name


def test_turns_shows_only_the_caches_to_choose_from_and_names_their_lines(one):
    text = words(module("kv_turns").draw(*one))
    assert "no cache" in text and "dynamic" in text
    assert "int4" not in text and "paged" not in text


def test_the_symposiums_figure_has_its_three_panels_and_marks_what_was_printed(one):
    summary, _ = one
    figure = module("symposium").draw(summary, "symposium_turn")
    titles = [ax.get_title() for ax in figure.findobj(match=lambda a: hasattr(a, "get_title"))]
    assert {"Mean generation time (s)", "Mean memory used (MB)", "Tokens/second (avg)"} <= set(
        titles
    )
    time, memory, speed = (ax for ax in figure.axes if ax.patches)

    def diamonds(ax):
        return [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "D"]

    assert diamonds(time) == [314.42, 58.71, 56.52]
    assert diamonds(memory) == []
    assert diamonds(speed) == [0.5, 2.6, 2.7]


def test_the_symposiums_figure_says_so_where_nothing_was_measured(one):
    figure = module("symposium").draw(one[0], "banking_that_nobody_measured")
    assert "none of the three strategies" in words(figure)


def test_overview_shows_single_conversations_only_below_twenty(one):
    summary, samples = one
    few = len(module("kv_overview").draw(summary, samples).axes[0].collections)
    again = [samples.assign(iteration=samples["iteration"] + 10 * n) for n in range(4)]
    crowd = pd.concat(again, ignore_index=True)
    many = len(module("kv_overview").draw(summary, crowd).axes[0].collections)
    assert few > 0
    assert many == 0


def test_points_are_the_conversations_that_the_medians_are_taken_over(one):
    _, samples = one
    own = samples[
        (samples["scenario"] == "banking_loan_application") & (samples["strategy"] == "none")
    ]
    table = metrics.conversations(own)
    first = own[(own["replicate"] == 1) & (own["iteration"] == 2)]
    assert len(table) == 12
    assert table.loc[(1, 2), "e2e_s"] == pytest.approx(first["e2e_s"].mean())
    assert table.loc[(1, 2), "output_tokens_per_s"] == pytest.approx(120 / first["e2e_s"].sum())
    assert table.index[table["disturbed"]].tolist() == [(2, 1)]
    assert table.loc[(1, 2), "tpot_s"] == pytest.approx(
        (first["e2e_s"].sum() - first["ttft_s"].sum()) / (120 - 3)
    )


def test_partly_failed_cell_is_drawn_with_its_numbers(one):
    summary, samples = one
    mixed = summary.assign(status=summary["status"].replace("ok", "mixed"))
    whole = module("kv_overview").draw(summary, samples)
    part = module("kv_overview").draw(mixed, samples)
    assert len(part.axes[0].lines) == len(whole.axes[0].lines) > 0


def test_speedup_marks_the_published_ratios(one):
    text = words(module("kv_speedup").draw(*one))
    assert all(ratio in text for ratio in ("5.36×", "5.56×", "1.04×"))


def test_speedup_draws_the_interval_of_the_table(one):
    summary, samples = one
    rows = selection.measured(summary)
    row = rows[(rows["scenario"] == "symposium_turn") & (rows["strategy"] == "static")].iloc[0]
    ends = [row["speedup_vs_none_ci_low"], row["speedup_vs_none_ci_high"]]
    lines = [
        list(line.get_xdata()) for line in module("kv_speedup").draw(summary, samples).axes[0].lines
    ]
    assert ends in lines


def test_speedup_takes_the_headline_from_the_model_nearest_to_the_published_one(one):
    text = words(module("kv_speedup").draw(*one))
    assert "the source's turn: Llama-3.2-1B geometry" in text


def test_several_machines_stand_in_one_figure():
    summary, samples = synthetic_kv.tables(("here", "h200-gpu"))
    for name in NAMES:
        text = words(module(name).draw(summary, samples))
        assert "this machine" in text and "h200-gpu" in text


def test_memory_figure_draws_measured_against_predicted(one):
    summary, samples = one
    off = samples.assign(kv_mib_predicted=samples["kv_mib_predicted"] * 2)
    ax = module("kv_memory").draw(summary, off).axes[0]
    predicted, observed = ax.lines[0].get_ydata(), ax.lines[1].get_ydata()
    np.testing.assert_allclose(predicted, 2 * observed)
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_every_strategy_has_its_own_colour_and_marker():
    shipped = looks.LOOKS.values()
    for sign in ("colour", "marker", "label", "label_pt"):
        assert len({getattr(look, sign) for look in shipped}) == len(looks.LOOKS)


def test_the_table_of_looks_names_no_strategy_that_does_not_exist():
    assert set(looks.LOOKS) <= set(strategies.names())


def test_unknown_strategy_gets_a_stable_look_of_its_own():
    new = style.look("my_new_cache")
    assert new == style.look("my_new_cache")
    assert new.label == "my new cache"
    assert new.marker not in {look.marker for look in looks.LOOKS.values()}


def test_a_strategy_that_was_added_without_a_look_has_one_and_so_have_its_variants(monkeypatch):
    # Another table, not one entry less: putting it back would move it to the end for the tests to come.
    others = {name: look for name, look in looks.LOOKS.items() if name != "sliding_window"}
    monkeypatch.setattr(looks, "LOOKS", others)
    added, variant = looks.look("sliding_window"), looks.look("sliding_window-w512")
    assert added.label == "sliding window"
    assert variant.label == "sliding window 512"
    assert variant.marker != added.marker
    assert looks.in_order(["sliding_window", "none"]) == ["none", "sliding_window"]


def test_label_of_a_static_cache_says_whether_it_was_compiled():
    assert style.label("static", True) == "static (compiled)"
    assert style.label("static", np.bool_(False)) == "static (eager)"
    assert style.label("static_reuse", False) == "static (reused, eager)"
    assert style.label("static", None) == "static"
    assert style.label("dynamic", False) == "dynamic"


# Rounds and the instrument ---------------------------------------------------------------------


def rounds_table(machine: str = "here", count: int = 20) -> pd.DataFrame:
    """A block on a machine that wanders by a tenth, whose ratios vary by a hundredth."""
    drift = np.exp(0.1 * np.sin(np.arange(count)))
    wobble = np.exp(0.01 * np.cos(3.0 * np.arange(count)))
    shared = {"machine": machine, "model": "embedded", "device": "cpu", "dtype": "float32"}
    shared |= {"scenario": "talk", "replicate": 1, "block": "talk/r1", "disturbed": False}
    cells = {"dynamic": (1.0, np.nan), "static": (0.9, 1 / 0.9), "control": (1.0, 1.0)}
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "round": np.arange(count),
                    "probe_s": 0.001 * drift,
                    "e2e_s": seconds * drift * wobble,
                    "ratio": ratio * wobble,
                }
            ).assign(**shared, strategy=name)
            for name, (seconds, ratio) in cells.items()
        ],
        ignore_index=True,
    )


def test_the_drift_of_the_machine_is_larger_than_what_pairing_leaves():
    left, right = module("kv_drift").draw(rounds_table()).axes
    course = left.lines[0].get_ydata()
    assert max(course) - min(course) > 15
    for joined in right.lines[::3]:
        ratio, alone = joined.get_xdata()
        assert ratio < alone / 3


def test_the_drift_of_two_rounds_is_no_course():
    assert "no block" in words(module("kv_drift").draw(rounds_table(count=2)))


def test_a_disturbed_round_is_crossed_out_and_not_in_the_spread():
    table = rounds_table()
    hit = (table["strategy"] == "static") & (table["round"] == 3)
    calm = module("kv_drift").draw(table).axes[1].lines[0].get_xdata()
    table.loc[hit, ["e2e_s", "ratio"]] *= 50
    table.loc[hit, "disturbed"] = True
    assert module("kv_drift").draw(table).axes[1].lines[0].get_xdata() == pytest.approx(
        calm, rel=0.2
    )


def aa_table() -> pd.DataFrame:
    rows = []
    for arm, slowdown in (("same", 0.0), ("slowed", 0.05)):
        for number, length in enumerate((10, 30, 120)):
            share = 0.04 if arm == "same" else (0.3, 0.6, 0.95)[number]
            rows.append(
                {"machine": "here", "arm": arm, "slowdown": slowdown, "blocks": 1}
                | {"rounds": length, "measuring_s": 0.4 * length, "share": share, "independent": 32}
                | {"share_ci_low": share - 0.03, "share_ci_high": share + 0.03}
                | {"smallest_slowdown": 0.2 / (number + 1) if arm == "same" else np.nan}
            )
    return pd.DataFrame(rows)


def test_the_instrument_shows_its_shares_and_the_curve_of_what_it_sees():
    figure = module("instrument").draw(aa_table())
    assert "slowdowns of 5 % found" in words(figure)
    assert "n = 32 independent pairs" in words(figure)
    curve = figure.axes[1].lines[0]
    assert list(curve.get_xdata()) == [4.0, 12.0, 48.0]
    assert list(curve.get_ydata()) == sorted(curve.get_ydata(), reverse=True)


@pytest.mark.parametrize("name", ["kv_drift", "instrument"])
def test_figures_of_rounds_say_when_there_is_nothing_to_see(name):
    tables = {"kv_drift": rounds_table(), "instrument": aa_table()}
    figure = module(name).draw(tables[name].iloc[:0])
    assert figure.get_suptitle() == module(name).QUESTION


def test_beside_the_reference_stands_its_second_run(one):
    summary, samples = one
    figure = module("kv_speedup").draw(summary.assign(control_ratio=1.07), samples)
    ratios = [x for line in figure.axes[1].lines for x in line.get_xdata()]
    assert 1.07 in ratios


def test_a_ratio_that_may_not_be_judged_is_drawn_without_an_interval(one):
    summary, samples = one
    whole = len(module("kv_speedup").draw(summary, samples).axes[0].lines)
    bare = module("kv_speedup").draw(summary.assign(not_judged_vs_none="one run"), samples)
    assert len(bare.axes[0].lines) < whole
    # Over the dynamic cache there were rounds enough.
    assert len(bare.axes[1].lines) == len(module("kv_speedup").draw(summary, samples).axes[1].lines)
    bare = module("kv_speedup").draw(summary.assign(not_judged="one run"), samples)
    assert len(bare.axes[0].lines) == whole
