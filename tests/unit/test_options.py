"""Options of strategies: checked in a configuration, swept, and readable back from a variant's id."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import families
import pytest
from kvbench import physics, strategies
from kvbench.errors import InputError
from kvbench.inputs import configuration
from kvbench.measurement.memory import cache_bytes
from kvbench.records import digests
from kvbench.strategies import looks, options

CONFIG = Path(__file__).resolve().parents[2] / "config"
SOURCE = "config/mine.yaml"
EXPERIMENT = {
    "name": "swept",
    "models": ["embedded"],
    "scenarios": ["banking_open_account"],
    "turns": 1,
    "max_new_tokens": 4,
}


def filled(entries: Any, **more: Any) -> dict[str, Any]:
    experiment = {**copy.deepcopy(EXPERIMENT), "strategies": entries, **more}
    return configuration.fill({"kv": {"experiments": [experiment]}}, SOURCE)


def planned(entries: Any, **more: Any) -> list[str]:
    return filled(entries, **more)["kv"]["experiments"][0]["strategies"]


def refusal(entries: Any, **more: Any) -> str:
    with pytest.raises(InputError) as error:
        filled(entries, **more)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"{SOURCE}: kv.experiments[0].")
    return text


# Ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"name": "sliding_window", "window": 512}, "sliding_window-w512"),
        ({"name": "sliding_window", "window": 256}, "sliding_window"),
        ({"name": "attention_sink", "window": 64, "sinks": 0}, "attention_sink-w64-s0"),
        ({"name": "paged", "block_sharing": True}, "paged-sharing"),
        ({"name": "kvpress_knorm", "compression_ratio": 0.25}, "kvpress_knorm-c0.25"),
        ({"name": "quantized", "residual": 32}, "quantized-quanto-b4-r32"),
        ({"name": "quantized", "backend": "hqq", "bits": 3}, "quantized-hqq-b3"),
        ({"name": "dynamic", "attention": "eager"}, "dynamic-eager"),
        ({"name": "sliding_window", "attention": "eager", "window": 8}, "sliding_window-eager-w8"),
    ],
)
def test_an_id_names_the_options_that_are_not_the_usual_ones(given, expected):
    assert planned([given]) == [expected]


@pytest.mark.parametrize(
    ("old", "backend", "bits"),
    [
        ("quantized_int4", "quanto", 4),
        ("quantized_int2", "quanto", 2),
        ("quantized_hqq_int8", "hqq", 8),
        ("quantized_hqq_int4", "hqq", 4),
        ("quantized_fp8", "fp8", 8),
    ],
)
def test_an_earlier_name_is_the_id_of_its_options(old, backend, bits):
    strategy = strategies.get(old)
    assert (strategy.backend, strategy.bits) == (backend, bits)
    assert planned([{"name": "quantized", "backend": backend, "bits": bits}]) == [old]


def test_an_earlier_name_takes_further_options():
    assert planned([{"name": "quantized_int2", "residual": 16}]) == ["quantized-quanto-b2-r16"]


@pytest.mark.parametrize("name", list(strategies.classes()))
def test_every_value_of_every_option_is_read_back_from_the_id(name):
    cls = strategies.classes()[name]
    for one in options.of(cls).values():
        values = one.choices or ((True, False) if isinstance(one.default, bool) else (9, 1000))
        if isinstance(one.default, float):
            values = (0.0, 0.25, 0.9)
        for value in values:
            strategy = cls(**{one.name: value})
            if strategy.contradiction() is None:
                assert strategies.get(strategy.id) == strategy


def test_an_id_that_spells_usual_values_is_the_plain_strategy():
    assert strategies.get("sliding_window-w256").id == "sliding_window"
    assert strategies.get("quantized-quanto-b4-r128").id == "quantized_int4"


def test_a_reusing_variant_is_compared_with_the_same_options_without_reuse():
    assert strategies.without_reuse("quantized_int4_reuse") == "quantized_int4"
    assert strategies.without_reuse("quantized_reuse-hqq-b3-r16") == "quantized-hqq-b3-r16"
    assert strategies.without_reuse("vllm_prefix_caching-b64") == "vllm-b64"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("sliding_window-x3", "w256 (window)"),
        ("sliding_window-w0", "at least 1"),
        ("sliding_window-w5-w6", "'w6' is no option"),
        ("none-w3", "'w3' is no option of none"),
        ("quantized-quanto-b8", "set bits to 2 or 4"),
        ("window-w3", "unknown strategy"),
    ],
)
def test_an_id_that_stands_for_nothing_is_refused_with_what_there_is(wrong, told):
    with pytest.raises(InputError, match="strategy") as error:
        strategies.get(wrong)
    assert told in str(error.value)


def test_a_variant_is_out_of_date_when_its_plain_strategy_is():
    assert digests.of_strategy("sliding_window-w512") == digests.of_strategy("sliding_window")


# Configurations -------------------------------------------------------------------------------


def test_lists_of_options_are_swept_as_a_full_cross():
    swept = {"name": "quantized", "backend": "hqq", "bits": [2, 3], "residual": [16, 128]}
    assert planned(["dynamic", swept]) == [
        "dynamic",
        "quantized-hqq-b2-r16",
        "quantized-hqq-b2",
        "quantized-hqq-b3-r16",
        "quantized-hqq-b3",
    ]


def test_variants_are_cells_with_records_of_their_own():
    known = configuration.load_scenarios_and_models(CONFIG)
    config = filled(["dynamic", {"name": "sliding_window", "window": [64, 256]}])
    cells = configuration.cells_of(configuration.plan_kv(config, *known, SOURCE).values())
    start = "cpu/embedded/banking_open_account"
    assert set(cells) == {
        f"{start}/{name}/r1"
        for name in ("dynamic", "control", "sliding_window-w64", "sliding_window")
    }
    assert cells[f"{start}/sliding_window-w64/r1"].quality


def test_all_stands_for_every_named_strategy_of_the_engine():
    found = planned("all")
    assert {"none", "dynamic", "sliding_window", "quantized_int4"} <= set(found)
    assert {strategies.get(name).engine for name in found} == {"transformers"}
    assert set(planned("all", engine="vllm")) == set(strategies.names())


def test_once_and_rounds_take_the_ids_of_variants():
    window = {"name": "sliding_window", "window": 64}
    known = configuration.load_scenarios_and_models(CONFIG)
    config = filled(["dynamic", window], once=["sliding_window-w64"])
    (block,) = configuration.plan_kv(config, *known, SOURCE).values()
    assert block.once == ("sliding_window-w64",)
    config = filled(["dynamic", window], rounds={"sliding_window-w64": 12})
    (block,) = configuration.plan_kv(config, *known, SOURCE).values()
    assert block.rounds == {"sliding_window-w64": 12}


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"name": "sliding_windw"}, "did you mean 'sliding_window'"),
        ({"name": "sliding_window", "windw": 3}, "did you mean 'window'"),
        ({"name": "sliding_window", "window": 0}, "a whole number at least 1"),
        ({"name": "sliding_window", "window": 2.5}, "window is 2.5"),
        ({"name": "sliding_window", "window": True}, "window is true"),
        ({"name": "sliding_window", "window": []}, "empty list"),
        ({"name": "paged", "block_sharing": "yes"}, "true or false"),
        ({"name": "none", "window": 3}, "unknown option of none 'window'"),
        ({"name": "quantized", "backend": "gguf"}, "quanto or hqq or fp8"),
        ({"name": "quantized", "bits": [2, 8]}, "set bits to 2 or 4"),
        ({"name": "quantized", "backend": "fp8"}, "set bits to 8"),
        ({"name": "quantized", "backend": "fp8", "bits": 8, "residual": 4}, "has no residual"),
        ({"window": 3}, "name"),
        ({"name": "paged", "attention": "eager"}, "brings its own attention"),
        ({"name": "none", "prefill_chunk": 8}, "none keeps nothing from one chunk"),
        ({"name": "paged", "prefill_chunk": 8}, "leave prefill_chunk out"),
        ({"name": "vllm", "prefill_chunk": 8}, "leave prefill_chunk out"),
        (
            {"name": "kvpress_knorm", "prefill_chunk": 8},
            "read in one pass; leave prefill_chunk out",
        ),
        ({"name": "dynamic", "prefill_chunk": -1}, "a whole number at least 0"),
        ({"name": "dynamic", "attention": "fast"}, "sdpa or eager"),
        ("sliding_window-x3", "'x3' is no option"),
        (3, "strategies[1]"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(entry, told):
    text = refusal(["dynamic", entry])
    assert "strategies[1]" in text
    assert told in text


def test_one_variant_under_two_names_is_refused():
    text = refusal(["quantized_int4", {"name": "quantized", "bits": 4}])
    assert "strategies[1] names quantized_int4, as does strategies[0]" in text


def test_a_word_that_is_not_all_is_refused():
    assert "strategies" in refusal("every")


# Looks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "english", "portuguese"),
    [
        ("sliding_window-w512", "sliding window 512", "janela deslizante 512"),
        ("quantized-quanto-b2-r16", "int2 (quanto), rest of 16", "int2 (quanto), resto de 16"),
        ("quantized-hqq-b3", "quantised hqq, 3 bits", "quantizado hqq, 3 bits"),
        (
            "kvpress_knorm-c0.25",
            "key norms (kvpress), 0.25 dropped",
            "normas das chaves (kvpress), 0,25 descartados",
        ),
    ],
)
def test_the_label_of_a_variant_says_its_options(strategy, english, portuguese):
    assert looks.look(strategy).label == english
    assert looks.labels([], "pt")[strategy] == portuguese


def test_variants_of_one_strategy_are_told_apart_and_stand_together():
    names = [f"sliding_window-w{window}" for window in (16, 32, 64, 128, 512, 1024)]
    found = [looks.look(name) for name in ["sliding_window", *names]]
    assert len({look.marker for look in found}) == len(found)
    assert len({look.colour for look in found}) == len(found)
    mixed = looks.in_order([*reversed(names), "attention_sink", "sliding_window", "none"])
    assert mixed == ["none", "sliding_window", *names, "attention_sink"]


# Attention ------------------------------------------------------------------------------------


def test_a_variant_gives_the_model_its_attention_and_keeps_the_tokens():
    model = families.build("llama")
    ids, found = list(range(5, 30)), {}
    for name in ("dynamic", "dynamic-eager", "static-eager"):
        strategy = strategies.get(name)
        assert strategy.available(model, "cpu") is None
        assert strategy.adapt(model) is None
        found[name] = strategy.session(model, 40).generate(ids, 6, lambda: None).tokens
        usual = "sdpa" if name == "dynamic" else "eager"
        assert model.model.config._attn_implementation == usual
    assert found["dynamic-eager"] == found["static-eager"] == found["dynamic"]


@pytest.mark.parametrize("name", ["sliding_window-w8", "attention_sink-w8-s2", "static_reuse"])
def test_attention_changes_no_token_of_a_bounded_or_kept_cache(name):
    model = families.build("llama")
    found = []
    for attention in ("sdpa", "eager"):
        strategy = dataclasses.replace(strategies.get(name), attention=attention)
        assert strategy.adapt(model) is None
        session = strategy.session(model, 60)
        first = session.generate(list(range(5, 30)), 6, lambda: None).tokens
        longer = [*range(5, 30), *first, *range(40, 50)]
        found.append((first, session.generate(longer, 6, lambda: None).tokens))
    assert found[0] == found[1]


def test_flash_attention_is_unsupported_on_a_cpu_with_one_reason():
    reason = strategies.get("dynamic-flash_attention_2").available(None, "cpu")
    assert reason == (
        "dynamic-flash_attention_2 needs a cuda device: flash_attention_2 has no other kernels"
    )


# Prefill --------------------------------------------------------------------------------------


def turns(model, name, chunk, rows=1):
    """Tokens, bytes held and reused tokens of two turns, and the widths of all forward passes."""
    strategy = dataclasses.replace(strategies.get(name), prefill_chunk=chunk)
    assert strategy.available(model, "cpu") is None
    # A row of a batch is shorter by two chunks and more: its first chunks are padding alone.
    asked = [list(range(5 + 17 * row, 30)) for row in range(rows)]
    widths, found = [], []
    hook = model.model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: widths.append(given[0].shape[-1])
    )
    try:
        session = strategy.session(model, 60, rows)
        for _ in range(2):
            turn = session.generate_batch(asked, 4, lambda: None)
            found.append((turn.rows, cache_bytes(turn.cache), turn.reused_tokens))
            asked = [
                [*row, *tokens, *range(40, 53)]
                for row, tokens in zip(asked, turn.rows, strict=True)
            ]
    finally:
        hook.remove()
    return strategy, found, widths


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("name", ["dynamic", "static", "dynamic_reuse", "static_reuse"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_prompt_read_in_chunks_gives_the_same_tokens_from_smaller_passes(family, name, rows):
    model = families.build(family)
    whole, chunked = (turns(model, name, chunk, rows) for chunk in (0, 8))
    assert [turn[0] for turn in chunked[1]] == [turn[0] for turn in whole[1]]
    assert [turn[2] for turn in chunked[1]] == [turn[2] for turn in whole[1]]
    second = [8, 6] if "reuse" in name else [8, 8, 8, 8, 8, 2]
    assert chunked[2] == [8, 8, 8, 1, 1, 1, 1, *second, 1, 1, 1]


HELD_IN_CHUNKS = [
    *itertools.product(
        ["llama", "mistral"],
        [
            "dynamic",
            "static",
            "dynamic_reuse",
            "static_reuse",
            "sliding_window-w12",
            "attention_sink-w12-s3",
        ],
    ),
    ("llama", "quantized-quanto-b4-r12"),
    ("llama", "quantized_reuse-quanto-b4-r12"),
]


@pytest.mark.parametrize(("family", "name"), HELD_IN_CHUNKS)
@pytest.mark.parametrize("chunk", [1, 8, 100])
def test_a_prompt_read_in_chunks_holds_the_predicted_bytes(family, name, chunk):
    model = families.build(family)
    strategy, found, widths = turns(model, name, chunk)
    arch = physics.Architecture.from_config(model.architecture)
    prompts, added = (25, 42), []
    for prompt, (_, held, reused) in zip(prompts, found, strict=True):
        added = [*(added if reused else []), prompt - reused, 1, 1, 1]
        assert strategy.traffic(60).held_bytes(arch, added, 4) == held
    fresh = [25, 1, 1, 1, 42 - found[1][2], 1, 1, 1]
    assert widths == strategy.traffic(60).passes(fresh)


def test_a_window_bounds_what_a_chunk_attends_to_and_a_wide_one_changes_no_token():
    model = families.build("llama")
    found = {
        window: turns(model, f"sliding_window-w{window}", chunk)[1][0][0]
        for window, chunk in ((12, 8), (200, 8))
    }
    assert found[200] == turns(model, "dynamic", 0)[1][0][0]
    assert found[12] != found[200]


def test_the_loop_of_the_captured_step_reads_prompts_in_chunks_too():
    from kvbench.strategies.graph import StaticLoopSession

    model, ids = families.build("llama"), list(range(5, 30))
    found = [
        StaticLoopSession(model, 40, capture=False, prefill_chunk=chunk)
        .generate(ids, 6, lambda: None)
        .tokens
        for chunk in (None, 8)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("name", ["dynamic", "static", "sliding_window-w12"])
def test_the_flops_of_chunks_are_those_torch_counts(family, name):
    """Without the kernels that skip what is masked: the physics counts that apart."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = families.build(family, attn_implementation="eager")
    strategy = dataclasses.replace(strategies.get(name), prefill_chunk=10)
    session = strategy.session(model, 90)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        session.generate(list(range(5, 85)), 1, lambda: None)
    arch = physics.Architecture.from_config(model.architecture)
    traffic, past, expected = strategy.traffic(90), 0, 0
    for new in traffic.passes([80]):
        expected += physics.forward_flops(
            arch, new, past, 1, 1, lambda layer, n=new, p=past: traffic.attended(layer, n, p)
        )
        # From transformers 5.19 on angles are multiplied without a matrix product, which nobody counts.
        expected -= arch.angles * new if families.library_at_least(5, 19) else 0
        past += new
    assert counter.get_total_flops() == expected


def test_a_state_is_not_read_in_chunks():
    reason = strategies.get("dynamic-chunk8").available(families.build("mamba"), "cpu")
    assert reason == (
        "dynamic-chunk8: the library reads prompts in chunks only where no layer keeps a state"
    )
