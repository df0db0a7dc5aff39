"""The capacity planner: what fits, what it costs, and what it says about bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import families
import pandas as pd
import pytest
from families import llama
from kvbench import physics, strategies
from kvbench.analysis import capacity
from kvbench.errors import InputError
from kvbench.figures import capacity as capacity_figure
from kvbench.figures import roofline, style
from kvbench.measurement import crowd
from kvbench.physics import Architecture, Ceilings

ROOT = Path(__file__).parents[2]

LLAMA_1B = llama(16, 2048, 32, 8, 64, 8192, 128256, True, 131072)
GIB = 2**30
FAST = Ceilings(2e12, 1.8e12, 3e14, 3e13, 5e-6, 2.5e10, "lab")


def by_strategy(**changes):
    options = {"memory_bytes": 80 * GIB, "tokens": 8192, "ceilings": FAST} | changes
    return {row["strategy"]: row for row in capacity.plan(LLAMA_1B, **options)}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * GIB),
        ("80 GB", 80 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("512MiB", 2**29),
        ("1000 B", 1000),
        ("12b", 12),
        ("24gib", 24 * GIB),
    ],
)
def test_sizes_are_read(text, size):
    assert capacity.parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "80Gi", "GiB", "-3GiB", "1,5GiB", "0", "0.1B", "9" * 40 + "B"]
)
def test_bad_sizes_are_refused_in_one_line(text):
    with pytest.raises(InputError, match="write it like 80GiB") as caught:
        capacity.parse_bytes(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["24", " 24 ", "1.5", "80000000000"])
def test_a_size_without_a_unit_is_not_guessed_at(text):
    number = text.strip()
    with pytest.raises(InputError) as caught:
        capacity.parse_bytes(text, "host memory")
    assert str(caught.value) == (
        f"host memory {text!r} has no unit; write {number}GiB for gibibytes, {number}B for bytes"
    )


def test_a_bandwidth_is_a_size_per_second():
    assert capacity.parse_bandwidth("2TB/s") == 2e12


@pytest.mark.parametrize("text", ["2TB", "2/s", "2", "/s"])
def test_a_bandwidth_without_unit_or_time_is_refused(text):
    with pytest.raises(InputError, match="2TB/s" if text != "/s" else "80GiB"):
        capacity.parse_bandwidth(text)


def test_the_memory_is_filled_and_not_overfilled():
    for row in by_strategy(host_memory_bytes=10_000 * GIB).values():
        used = row["weight_bytes"] + row["concurrent"] * row["device_bytes"]
        assert used <= 80 * GIB < used + row["device_bytes"], row["strategy"]


def test_static_conversations_take_their_cache_and_dynamic_ones_a_layers_copy_more():
    rows = by_strategy()
    cache = physics.kv_bytes(LLAMA_1B, 8192, 2)
    assert rows["static"]["device_bytes"] == cache
    assert rows["dynamic"]["device_bytes"] == cache + cache // 16
    assert rows["static"]["concurrent"] == (80 * GIB - 2 * 1_235_814_400) // cache


def test_measured_work_space_is_taken_from_all_conversations_together():
    plain, beside = (by_strategy(workspace_bytes=size)["static"] for size in (0, 4 * GIB))
    assert (plain["workspace_bytes"], beside["workspace_bytes"]) == (0, 4 * GIB)
    free = 80 * GIB - beside["weight_bytes"] - 4 * GIB
    assert beside["concurrent"] == free // beside["device_bytes"] < plain["concurrent"]


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux")
@pytest.mark.parametrize("strategy", ["static", "dynamic"])
def test_as_many_conversations_fit_three_memories_as_are_predicted_give_or_take_one(strategy):
    pytest.importorskip("transformers")
    outcomes = crowd.check(strategy)
    assert [one.memory_bytes for one in outcomes] == list(crowd.LIMITS)
    assert all(one.right for one in outcomes), outcomes
    # The limits held: more memory, more conversations.
    assert outcomes[0].ran < outcomes[1].ran < outcomes[2].ran


# A token of LLAMA_1B holds 2 x 16 layers x 8 heads x 64 numbers x 2 bytes = 32 KiB, so that 8192
# tokens hold 256 MiB, 16 MiB a layer.


def test_offloaded_conversations_fill_the_hosts_memory():
    """Of 256 MiB each, a host of 1 GiB holds four, whatever 80 GiB of the device would serve."""
    rows = by_strategy(host_memory_bytes=GIB)
    for name, on_device in (("offloaded", 3 * 16), ("offloaded_static", 2 * 16)):
        row = rows[name]
        assert row["host_bytes"] == 256 * 2**20
        assert row["device_bytes"] == on_device * 2**20
        assert (row["concurrent"], row["machines"]) == (4, 250_000)
    assert rows["static"]["host_bytes"] == 0
    assert rows["static"]["concurrent"] == by_strategy()["static"]["concurrent"]


def test_a_host_without_room_for_one_cache_is_said():
    row = by_strategy(host_memory_bytes=255 * 2**20)["offloaded"]
    assert row["concurrent"] == 0 and row["machines"] is None
    assert row["reason"] == "no conversation's cache fits the host's memory"


def test_a_host_has_as_much_memory_as_the_machine_unless_it_is_said():
    """80 GiB hold 320 caches of 256 MiB; the device alone would serve 1657 (81,918 MiB less 2357 by 48)."""
    row = by_strategy()["offloaded"]
    assert row["host_memory_bytes"] == 80 * GIB
    assert row["concurrent"] == 320 < (80 * GIB - row["weight_bytes"]) // row["device_bytes"]


def test_what_the_library_never_offloads_stays_on_the_device():
    """Of two layers the first has a window of 64 tokens, and 302 tokens are kept.

    A token of a layer is 2 x 2 heads x 64 numbers x 4 bytes = 1 KiB: 64 KiB in the window, 302 KiB in the
    other. A growing cache offloads both layers and needs up to three of the larger (906 KiB); a
    preallocated one keeps its window on the device, and one layer beside it twice (64 + 604 KiB).
    """
    arch = Architecture.from_config({"model_type": "qwen2", **families.CONFIGS["qwen2"]})
    arch = replace(arch, layers=arch.layers[::-1])
    found = {
        row["strategy"]: (row["host_bytes"] // 1024, row["device_bytes"] // 1024)
        for row in capacity.plan(arch, GIB, 302, "float32", names=["offloaded", "offloaded_static"])
    }
    assert found == {"offloaded": (366, 906), "offloaded_static": (302, 668)}


@pytest.mark.parametrize("family", families.CONFIGS)
def test_the_plan_has_a_reason_exactly_where_measuring_would_refuse_the_model(family):
    model = families.build(family)
    arch = Architecture.from_config(model.architecture)
    rows = capacity.plan(arch, GIB, 100, "float32")
    planned = {row["strategy"]: row["reason"] or None for row in rows}
    # The engine has caches of its own, which are not the library's.
    planned.pop("vllm")
    assert planned == {name: strategies.get(name).misfit(model) for name in planned}
    assert all((row["concurrent"] is None) == bool(row["reason"]) for row in rows)


def test_a_model_with_latents_is_not_planned_on_blocks_nor_in_groups_of_64():
    """Of a token it keeps 64 latent and 32 rotary numbers of 4 bytes, in 2 layers: 768 bytes."""
    arch = Architecture.from_config(
        {"model_type": "deepseek_v3", **families.CONFIGS["deepseek_v3"]}
    )
    rows = {row["strategy"]: row for row in capacity.plan(arch, GIB, 301, "float32")}
    assert rows["paged"]["reason"] == (
        "paged has blocks for keys and values of one size; this model keeps latents"
    )
    assert rows["quantized_int4"]["reason"] == (
        "quantized_int4 groups 64 numbers under one scale, which does not divide the model's head "
        "size of 32"
    )
    assert rows["paged"]["kv_bytes"] is rows["quantized_int4"]["machines"] is None
    assert rows["dynamic"]["kv_bytes"] == 301 * 768


def test_a_window_bounds_what_a_conversation_is_planned_with():
    """Two layers keep 64 tokens of 1 KiB each, however long the conversation: 128 KiB."""
    arch = Architecture.from_config({"model_type": "mistral", **families.CONFIGS["mistral"]})
    for tokens in (302, 1024):
        rows = {row["strategy"]: row for row in capacity.plan(arch, GIB, tokens, "float32")}
        assert rows["dynamic"]["kv_bytes"] == rows["static"]["kv_bytes"] == 131_072
        # One layer's copy of 64 KiB beside the growing cache.
        assert rows["dynamic"]["device_bytes"] == 131_072 + 65_536
        assert "keep a sliding window" in rows["quantized_int4"]["reason"]


def test_smaller_caches_fit_more_conversations():
    rows = by_strategy()
    order = ["dynamic", "static", "quantized_hqq_int8", "quantized_int4", "quantized_int2"]
    counts = [rows[name]["concurrent"] for name in order]
    assert counts == sorted(counts) and len(set(counts)) == len(counts)


def test_a_quantised_cache_is_planned_at_its_largest():
    row = by_strategy(tokens=2000)["quantized_int4"]
    traffic = {"kind": "quantized", "bits": 4, "backend": "quanto"}
    sizes = [physics.predicted_kv_bytes(LLAMA_1B, traffic, 2000 - i, i + 1, 2) for i in range(300)]
    assert row["kv_bytes"] == max(sizes)


def test_the_fleet_is_the_conversations_over_those_of_one_machine():
    for row in by_strategy(conversations=1_000_000).values():
        assert (row["machines"] - 1) * row["concurrent"] < 1_000_000
        assert row["machines"] * row["concurrent"] >= 1_000_000


def test_a_full_machine_answers_more_tokens_than_a_lone_conversation():
    for row in by_strategy().values():
        assert row["tokens_per_s_full"] >= row["tokens_per_s_single"] > 0, row["strategy"]


def test_the_lone_rate_is_bytes_over_bandwidth():
    row = by_strategy(ceilings=Ceilings(read_bytes_per_s=2e12))["dynamic"]
    moved = physics.decode_bytes(LLAMA_1B, 8192, {"kind": "dynamic"}, 2)
    assert row["tokens_per_s_single"] == pytest.approx(2e12 / moved)


def test_recomputing_needs_an_arithmetic_rate():
    assert (
        by_strategy(ceilings=Ceilings(read_bytes_per_s=2e12))["none"]["tokens_per_s_single"] is None
    )
    flops = physics.prefill_flops(LLAMA_1B, 8192)
    assert by_strategy()["none"]["tokens_per_s_single"] == pytest.approx(3e14 / flops)


def test_offloading_waits_for_the_link():
    row = by_strategy()["offloaded"]
    assert row["tokens_per_s_single"] == pytest.approx(2.5e10 / (2 * row["kv_bytes"]))
    blind = by_strategy(ceilings=Ceilings(read_bytes_per_s=2e12))["offloaded"]
    assert blind["tokens_per_s_single"] is None


def test_without_ceilings_only_the_rates_are_missing():
    for row in by_strategy(ceilings=None).values():
        assert row["tokens_per_s_single"] is None and row["machines"] > 0


def test_weights_that_do_not_fit_are_said():
    for row in by_strategy(memory_bytes=2 * GIB).values():
        assert row["concurrent"] == 0 and row["machines"] is None
        assert row["reason"] == "the weights do not fit"


def test_a_conversation_that_does_not_fit_is_said():
    row = by_strategy(memory_bytes=2_471_628_800 + 2**20)["static"]
    assert row["reason"] == "no conversation fits beside the weights"


def test_a_cache_that_cannot_exist_is_a_row_with_a_reason():
    # A token of three heads gives an odd number of groups, which hqq cannot pack into bytes.
    arch = llama(2, 576, 9, 3, 64, 96, 100, True, 512)
    rows = {r["strategy"]: r for r in capacity.plan(arch, GIB, 1, names=["quantized_hqq_int4"])}
    row = rows["quantized_hqq_int4"]
    assert row["concurrent"] is None and "has 3 of 64 numbers" in row["reason"]
    assert "has 3 of 64 numbers" in capacity.table(list(rows.values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": 131073}, "at most 131072"),
        ({"memory_bytes": 0}, "memory is 0"),
        ({"host_memory_bytes": 0}, "host memory is 0"),
        ({"conversations": 0}, "conversations is 0"),
        ({"dtype": "int3"}, "int3"),
        ({"names": ["magic"]}, "unknown strategy 'magic'"),
    ],
)
def test_bad_plans_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        by_strategy(**change)


def test_rows_have_exactly_the_documented_columns():
    assert all(list(row) == list(capacity.COLUMNS) for row in by_strategy().values())


# ------------------------------------------------------------------ models


def test_a_shipped_model_is_found_by_name():
    assert physics.parameters(capacity.architecture("llama-3.2-1b")) == 1_235_814_400


def test_a_folder_with_a_config_is_a_model(tmp_path):
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert capacity.architecture(str(tmp_path)).layers[0].key_size == 16


def test_an_unknown_model_names_the_known_ones():
    with pytest.raises(InputError, match=r"config/models: .*llama-3\.2-1b"):
        capacity.architecture("gpt-9")


def test_a_model_file_without_sizes_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\nsource: local\n")
    with pytest.raises(InputError, match=r"x\.yaml: architecture is missing"):
        capacity.architecture(str(tmp_path / "x.yaml"))
    (tmp_path / "y.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="not a mapping"):
        capacity.architecture(str(tmp_path / "y.yaml"))


# ------------------------------------------------------------------ the command


def run(capsys, *arguments):
    code = capacity.main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


ONE = ("--model", "llama-3.2-1b", "--memory", "80GiB", "--tokens", "8192")


def test_the_command_prints_a_row_per_strategy(capsys):
    code, out, err = run(capsys, *ONE, "--bandwidth", "2TB/s")
    assert code == 0 and err == ""
    assert "machines for 1,000,000" in out
    assert any(line.startswith("static ") and "256 MiB" in line for line in out.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "llama-3.2-1b", "--memory", "80GiB", "--tokens", "many"),
        ("--model", "llama-3.2-1b", "--memory", "24", "--tokens", "1"),
        ("--model", "llama-3.2-1b", "--memory", "much", "--tokens", "1"),
        ("--model", "nope", "--memory", "8GiB", "--tokens", "1"),
        (*ONE, "--bandwidth", "fast"),
        (*ONE, "--host-memory", "some"),
        (*ONE, "--host-memory", "256"),
        (*ONE, "--workspace", "300"),
        (*ONE, "--ceilings", "absent.json"),
        (*ONE, "--dtype", "int3"),
    ],
)
def test_bad_arguments_end_in_one_line_and_code_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("kvbench: ") and err.count("\n") == 1


def test_measured_ceilings_are_read_from_their_file(capsys, tmp_path):
    entry = {"median": 2e12, "samples": [2e12], "reason": None}
    names = ("read_bytes_per_s", "prefill_flops_per_s", "decode_flops_per_s")
    record = {"dtype": "bfloat16", "machine": "lab", "ceilings": dict.fromkeys(names, entry)}
    path = tmp_path / "ceilings.json"
    path.write_text(json.dumps(record))
    assert run(capsys, *ONE, "--ceilings", str(path))[0] == 0
    path.write_text(json.dumps(record | {"dtype": "float32"}))
    assert "measured at float32" in run(capsys, *ONE, "--ceilings", str(path))[2]


def test_the_module_runs_without_torch():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from kvbench.analysis import capacity; sys.exit(capacity.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *ONE],
        env=os.environ | {"PYTHONPATH": str(ROOT / "workflow")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ figures


def test_the_capacity_figure_draws_a_line_for_each_need(tmp_path):
    table = pd.DataFrame(capacity.sweep(LLAMA_1B, 8192, model="llama-3.2-1b"))
    figure = capacity_figure.draw(table)
    counts = table.groupby("strategy")["concurrent"].agg(lambda c: tuple(c.fillna(-1)))
    assert 5 <= len(figure.axes[0].lines) <= counts.nunique()
    named = " ".join(text.get_text() for text in figure.legends[0].get_texts())
    assert all(style.label(name) in named for name in table["strategy"].unique())
    written = style.save(figure, tmp_path / "capacity")
    assert all(path.stat().st_size > 0 for path in written)


def test_strategies_of_which_as_many_fit_share_a_line_of_the_capacity_figure():
    table = pd.DataFrame(capacity.sweep(LLAMA_1B, 8192, model="llama-3.2-1b"))
    figure = capacity_figure.draw(table)
    named = [text.get_text().split(", ") for text in figure.legends[0].get_texts()]
    (shared,) = [names for names in named if style.label("offloaded") in names]
    # Both are as many as the host holds; beside the weights fewer fit the device.
    assert style.label("offloaded_static") in shared and style.label("static") not in shared


def test_a_capacity_figure_without_anything_that_fits_says_so():
    table = pd.DataFrame(capacity.sweep(LLAMA_1B, 8192, memory_sizes=[GIB]))
    figure = capacity_figure.draw(table)
    assert any("no conversation fits" in text.get_text() for text in figure.texts)


def roofline_tables():
    summary = pd.DataFrame(
        {
            "machine": ["lab"] * 4 + ["gpu"] * 2,
            "scenario": ["short", "long"] * 3,
            "strategy": ["none", "none", "dynamic", "dynamic", "dynamic", "dynamic"],
            "e2e_s_median": [3.0, 12.0, 1.0, 2.0, 0.1, None],
        }
    )
    predictions = summary.drop(columns="e2e_s_median").assign(
        predicted_e2e_s=[2.0, 6.0, 0.5, 1.0, 0.02, 0.05],
        bound=["compute", "compute", "memory", "memory", "memory", "memory"],
    )
    return summary, predictions


def test_the_roofline_names_the_distance_of_each_strategy():
    figure = roofline.draw(*roofline_tables())
    # Machines stand in the order of every other figure, whatever the table's.
    assert [ax.get_title() for ax in figure.axes] == ["gpu · n = 1 cell", "lab · n = 4 cells"]
    distances = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert distances == [["5.0×"], ["1.7×", "2.0×"]]


def test_the_roofline_reads_a_summary_that_holds_its_predictions():
    summary, predictions = roofline_tables()
    joined = summary.merge(predictions, on=["machine", "scenario", "strategy"])
    assert len(roofline.draw(joined).axes) == 2


def test_a_roofline_without_ceilings_says_so():
    summary, predictions = roofline_tables()
    figure = roofline.draw(summary, predictions.assign(predicted_e2e_s=None))
    assert any("ceilings" in text.get_text() for text in figure.texts)
