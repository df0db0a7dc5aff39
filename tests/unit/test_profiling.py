"""Where a token's time goes: windows with and without the profiler, parts, the table, the figure."""

from __future__ import annotations

import math
from types import SimpleNamespace

import families
import pandas as pd
import pytest
from kvbench import physics, records, strategies
from kvbench.analysis import tables
from kvbench.figures import _language, kv_profile
from kvbench.measurement import profiling
from kvbench.measurement.profiling import part_of

PROMPT = list(range(20, 60))


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::mm", "aten::matmul", "aten::linear"], "weights"),
        (["aten::t", "aten::linear"], "weights"),
        (["aten::addmm"], "weights"),
        (["aten::cat", "kvbench::cache"], "cache"),
        (["aten::mm", "kvbench::cache"], "cache"),
        (["aten::copy_", "aten::clone", "kvbench::attention"], "attention"),
        (["aten::bmm", "aten::scaled_dot_product_attention"], "attention"),
        (["aten::cat"], "other"),
        (["aten::mul"], "other"),
        (["quanto::unpack"], "other"),
        (["cpp_fused_cos_index_copy_sin_2"], "cache"),
        (["cpp_fused_mul_silu_5"], "other"),
        (["cpp_fused_bmm_cos_2"], "other"),
        (["cpp_fused_index_copy_mm_mul_7"], "weights"),
        (["kvbench::cache"], None),
        (["Torch-Compiled Region: 0/0"], None),
    ],
)
def test_an_operator_belongs_to_what_it_is_called_for(names, part):
    assert part_of(names, marked=True) == part


def test_products_of_batches_are_attention_only_where_attention_is_not_marked():
    assert part_of(["aten::bmm", "aten::matmul"], marked=False) == "attention"
    assert part_of(["aten::bmm", "aten::matmul"], marked=True) == "weights"


def profiled(name: str, tokens: int = profiling.TOKENS, family: str = "llama", **options):
    import torch

    strategy, model = strategies.get(name), families.build(family, **options)
    with torch.inference_mode():
        session = strategy.session(model, len(PROMPT) + tokens)
        found = profiling.profile(session, PROMPT, tokens, model.model, False)
        session.close()
    return found


def test_the_parts_of_a_token_add_up_to_its_time_without_the_profiler():
    found = profiled("dynamic")
    operators = sum(found["parts_s"].values()) - found["parts_s"]["outside"]
    assert set(found["parts_s"]) == set(profiling.PARTS)
    assert all(seconds > 0 for part, seconds in found["parts_s"].items() if part != "outside")
    assert found["parts_s"]["outside"] == max(0.0, found["token_s"] - operators)
    assert found["steps"] == profiling.WINDOW * profiling.WINDOWS
    assert found["context_tokens"] == len(PROMPT) + 1 + profiling.WARM + found["steps"]


@pytest.mark.parametrize("options", [{}, {"attn_implementation": "eager"}])
def test_operators_are_counted_once_per_layer_and_token(options, monkeypatch):
    """Two layers: each concatenates keys and values."""
    monkeypatch.setattr(profiling, "NAMED", 1000)
    calls = {
        (found["name"], found["part"]): found["calls"]
        for found in profiled("dynamic", **options)["operators"]
    }
    assert calls[("aten::cat", "cache")] == 4
    # Seven products in a layer, and the head.
    assert calls[("aten::mm", "weights")] == 15


def test_a_static_cache_concatenates_nothing():
    found = profiled("static")
    names = {one["name"] for one in found["operators"] if one["part"] == "cache"}
    assert "aten::cat" not in names
    assert found["parts_s"]["cache"] > 0


@pytest.mark.parametrize(("tokens", "steps"), [(profiling.FEWEST, 1), (5, 2), (9, 3)])
def test_a_short_conversation_has_fewer_steps(tokens, steps):
    assert profiled("dynamic", tokens)["steps"] == steps


def test_the_library_is_left_as_it_was():
    from transformers import Cache
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = (Cache.update, ALL_ATTENTION_FUNCTIONS["sdpa"])
    profiled("dynamic", 5)
    assert (Cache.update, ALL_ATTENTION_FUNCTIONS["sdpa"]) == before


def test_an_engine_that_generates_elsewhere_is_unsupported():
    session = SimpleNamespace(restart=lambda: None, generate=lambda *_: None)
    found = profiling.profile(session, PROMPT, 5, families.build("llama").model, False)
    assert found["status"] == "unsupported"
    assert "outside of the thread" in found["reason"]


# Table and figure ------------------------------------------------------------------------------

SECONDS = {"weights": 0.05, "attention": 0.01, "cache": 0.02, "other": 0.005, "outside": 0.015}


def record(strategy: str, **changes):
    """What the table reads of a record."""
    profile = {
        "status": "ok",
        "reason": None,
        "context_tokens": 100,
        "steps": 9,
        "token_s": 0.1,
        "profiled_token_s": 0.12,
        "parts_s": SECONDS,
        "operators": [],
    }
    cell = {"model": "m", "device": "cpu", "dtype": "float32", "scenario": "s"}
    arch = families.llama(2, 64, 4, 2, 16, 128, 500, False, 256)
    return {
        "cell": {**cell, "strategy": strategy},
        "strategy_info": {"traffic": strategies.get(strategy).traffic(200).as_dict()},
        "model": {"architecture": arch.as_dict()},
        "profile": profile | changes,
    }


def table(*found) -> pd.DataFrame:
    ceilings = {("here", "cpu", "float32"): physics.Ceilings(read_bytes_per_s=1e7)}
    return tables.profile_table({"here": list(found)}, ceilings)


def test_the_table_holds_a_token_against_the_bytes_it_reads():
    row = table(record("static")).iloc[0]
    assert row["profiler_s"] == pytest.approx(0.02)
    arch = families.llama(2, 64, 4, 2, 16, 128, 500, False, 256)
    # A static cache of 200 tokens is read whole; of the embedding one row.
    held = 2 * 2 * 2 * 16 * 4 * 200
    moved = physics.weight_bytes_read(arch, 4) + held
    assert row["roof_s"] == pytest.approx(moved / 1e7, rel=0.02)
    assert row["roof_share"] == pytest.approx(row["roof_s"] / 0.1)


def test_recomputation_has_no_roof_of_bytes():
    assert math.isnan(table(record("none")).iloc[0]["roof_s"])


def test_a_cell_that_could_not_be_taken_apart_says_why():
    found = table(record("static"), record("paged", status="unsupported", reason="elsewhere"))
    assert found[found["token_s"].isna()]["reason"].tolist() == ["elsewhere"]
    assert found[found["reason"].isna()]["strategy"].tolist() == ["static"]


def test_the_figure_has_a_bar_of_five_parts_per_strategy_and_a_roof():
    (ax,) = kv_profile.draw(table(record("static"), record("dynamic"), record("none"))).axes
    assert len(ax.patches) == 3 * 5
    ends = {round(bar.get_x() + bar.get_width(), 6) for bar in ax.patches[-3:]}
    assert ends == {100.0}
    assert len(ax.lines) == 2


def test_without_a_profile_the_figure_says_so():
    texts = [text.get_text() for text in kv_profile.draw(table()).texts]
    assert "no experiment asked for a profile" in texts


def test_the_figure_speaks_portuguese():
    figure = kv_profile.draw(table(record("static"), record("dynamic")))
    assert set(_language.localise(figure, "pt")) <= {"here", "m", "s"}


def test_a_record_with_a_profile_is_written_and_read(tmp_path, make_record):
    whole = make_record() | {"profile": record("static")["profile"]}
    records.write(tmp_path / "r1.json", whole)
    assert records.read(tmp_path / "r1.json")["profile"]["parts_s"] == SECONDS
