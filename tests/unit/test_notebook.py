"""The notebook interface: the source's names and shapes, with numbers from the measurement core."""

from __future__ import annotations

import math
import re

import pytest
from kvbench import KVCacheBenchmark
from kvbench.errors import InputError, Unsupported
from kvbench.notebook import FIELDS

pytestmark = pytest.mark.usefixtures("private_lock")

TURNS, NEW = 2, 6


@pytest.fixture(scope="module")
def bench(tiny_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)
    return KVCacheBenchmark(model, tokenizer, "cpu", "Tiny")


@pytest.fixture(scope="module")
def results(bench, tmp_path_factory):
    from functools import partial

    from kvbench.measurement import lock

    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("lock") / "lock"
        patch.setattr(lock, "machine", partial(lock.machine, path))
        return bench.run_conversational_benchmark(
            ["none", "dynamic", "static"], "banking_open_account", TURNS, NEW
        )


def test_every_strategy_has_the_nine_lists_with_one_item_per_turn(results):
    assert list(results) == ["none", "dynamic", "static"]
    for result in results.values():
        assert tuple(result) == FIELDS
        assert len(FIELDS) == 9
        assert {len(items) for items in result.values()} == {TURNS}


def test_counts_of_tokens_add_up_and_prompts_grow(results):
    for result in results.values():
        assert result["output_tokens"] == [NEW] * TURNS
        for given, total in zip(result["input_tokens"], result["total_tokens"], strict=True):
            assert total == given + NEW
        assert result["context_lengths"] == result["total_tokens"]
        assert result["input_tokens"][1] > result["context_lengths"][0]


def test_throughput_is_tokens_over_seconds(results):
    for result in results.values():
        for seconds, rate in zip(
            result["generation_times"], result["tokens_per_second"], strict=True
        ):
            assert rate == pytest.approx(NEW / seconds)


def test_exact_strategies_answer_alike(results):
    assert results["none"]["responses"] == results["dynamic"]["responses"]
    assert results["none"]["responses"] == results["static"]["responses"]


def test_the_history_pairs_the_scenarios_questions_with_the_replies(bench, results):
    asked = [turn.user for turn in bench.scenarios["banking_open_account"].turns[:TURNS]]
    history = results["dynamic"]["conversation_history"]
    assert [entry["user"] for entry in history] == asked
    assert [entry["assistant"] for entry in history] == results["dynamic"]["responses"]


def test_memory_is_never_negative(results):
    sizes = [size for result in results.values() for size in result["memory_usage"]]
    assert all(math.isfinite(size) and size >= 0 for size in sizes)


def test_none_in_the_list_means_no_cache(bench):
    found = bench.run_conversational_benchmark([None], "banking_open_account", 1, 2)
    assert list(found) == ["none"]


# Analysis -------------------------------------------------------------------------------------


def made(times: list[float], memory: list[float]) -> dict[str, list]:
    return {
        **{name: [] for name in FIELDS},
        "generation_times": times,
        "memory_usage": memory,
        "output_tokens": [10] * len(times),
    }


def test_the_analysis_averages_totals_and_compares(bench):
    given = {"none": made([4.0, 8.0], [1.0, 3.0]), "dynamic": made([1.0, 2.0], [2.0, 6.0])}
    summary = bench.analyze_results(given)
    assert summary["dynamic"] == {
        "avg_generation_time": 1.5,
        "total_time": 3.0,
        "avg_memory_usage": 4.0,
        "max_memory_usage": 6.0,
        "avg_tokens_per_second": pytest.approx(20 / 3),
        "total_tokens_generated": 20,
        "success_rate": 1.0,
        "speedup_vs_none": pytest.approx(4.0),
    }
    assert summary["none"]["speedup_vs_none"] == 1.0
    uneven = {"none": made([2.0, 8.0], [1.0, 1.0]), "dynamic": made([1.0, 2.0], [1.0, 1.0])}
    # The geometric mean over turns, as in the tables; the ratio of the totals would be 10/3.
    found = bench.analyze_results(uneven)["dynamic"]["speedup_vs_none"]
    assert found == pytest.approx(math.sqrt(2 * 4))


def test_without_none_there_is_no_speed_up(bench):
    assert (
        "speedup_vs_none" not in bench.analyze_results({"dynamic": made([1.0], [1.0])})["dynamic"]
    )


def test_the_summary_plot_has_the_three_panels_of_the_source(bench, results):
    import matplotlib.pyplot as plt

    figure = bench.resumo_plot(results)
    try:
        axes = figure.get_axes()
        assert [len(ax.patches) for ax in axes] == [3, 3, 3]
        assert [ax.get_title() for ax in axes] == [
            "Mean generation time (s)",
            "Mean memory used (MB)",
            "Tokens/second (avg)",
        ]
        summary = bench.analyze_results(results)
        heights = [patch.get_height() for patch in axes[0].patches]
        assert heights == [entry["avg_generation_time"] for entry in summary.values()]
    finally:
        plt.close(figure)


# What is refused ------------------------------------------------------------------------------


def test_an_unknown_scenario_is_refused_with_the_known_ones(bench):
    with pytest.raises(InputError, match="unknown scenario 'bank'") as error:
        bench.run_conversational_benchmark(["none"], "bank", 1, 4)
    assert "banking_open_account" in str(error.value)
    assert "symposium_turn" not in str(error.value)


def test_an_unknown_strategy_is_refused_with_the_known_ones(bench):
    with pytest.raises(InputError, match="unknown strategy 'dinamic'"):
        bench.run_conversational_benchmark(["dinamic"], "banking_open_account", 1, 4)


@pytest.mark.parametrize(
    ("turns", "new", "iterations", "word"),
    [
        (0, 4, 1, "num_turns is 0"),
        (16, 4, 1, "num_turns is 16"),
        (1, 1, 1, "max_new_tokens is 1"),
        (1, 4, 0, "iterations is 0"),
    ],
)
def test_a_bad_count_is_named(bench, turns, new, iterations, word):
    with pytest.raises(InputError, match=word):
        bench.run_conversational_benchmark(["none"], "banking_open_account", turns, new, iterations)


def test_a_strategy_that_cannot_run_here_says_why(bench):
    with pytest.raises(Unsupported, match="cuda"):
        bench.run_conversational_benchmark(["offloaded"], "banking_open_account", 1, 4)


def test_the_plot_in_portuguese_has_the_titles_of_the_source(bench, results):
    import matplotlib.pyplot as plt

    bench.language = "pt"
    figure = bench.resumo_plot(results)
    try:
        assert [ax.get_title() for ax in figure.get_axes()] == [
            "Tempo médio de geração (s)",
            "Memória média usada (MB)",
            "Tokens/segundo (avg)",
        ]
    finally:
        bench.language = "en"
        plt.close(figure)


def test_a_dollar_sign_in_the_models_name_is_printed_literally(bench, results):
    import matplotlib.pyplot as plt

    name, bench.model_name = bench.model_name, "Llama (US$$)"
    figure = bench.resumo_plot(results)
    try:
        figure.canvas.draw()
        assert figure.get_suptitle() == "Llama (US$$)"
        assert not figure._suptitle.get_parse_math()
    finally:
        bench.model_name = name
        plt.close(figure)


# What the source's class offers and prints ----------------------------------------------------


def test_one_prompt_can_be_continued_under_one_strategy(bench):
    found = bench.generate_with_cache_strategy("When do you open?", "dynamic", 4)
    assert (found["output_tokens"], found["input_tokens"] > 1) == (4, True)
    assert found["tokens_per_second"] == pytest.approx(4 / found["generation_time"])
    with pytest.raises(InputError, match="the prompt is empty"):
        bench.generate_with_cache_strategy("", "dynamic", 4)


def test_memory_in_use_is_told_and_cleared(bench):
    bench.clear_memory()
    assert bench.get_memory_usage() > 1


def test_it_prints_what_the_source_prints(bench, capsys):
    results = bench.run_conversational_benchmark(["none"], "banking_open_account", 1, 2)
    bench.analyze_results(results)
    told = capsys.readouterr().out
    assert "Testing NONE cache:" in told
    assert re.search(r"Metrics: \d+\.\d\ds \| \d+\.\d tok/s \| Input: \d+ \| Output: 2\n", told)
    assert "BENCHMARK RESULTS" in told and "Success: 100% (1/1)" in told
