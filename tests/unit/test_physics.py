"""Physics against transformers and torch: parameters, bytes and FLOPs without any difference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvbench import physics, strategies
from kvbench.errors import InputError
from kvbench.physics import Architecture, Ceilings
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

ROOT = Path(__file__).resolve().parents[2]

LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
QWEN2_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
LLAMA2_7B = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 101,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
}


def hf_config(config: dict):
    values = dict(config)
    return AutoConfig.for_model(values.pop("model_type", "llama"), **values)


def meta_model(config: dict):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config(config), attn_implementation="eager")


# ------------------------------------------------------------------ architecture and parameters


@pytest.mark.parametrize(
    ("config", "expected"),
    [(LLAMA_1B, 1_235_814_400), (SMOLLM2_135M, 134_515_008), (QWEN2_05B, 494_032_768)],
)
def test_parameters_of_published_models_are_exact(config, expected):
    assert physics.parameters(Architecture.from_config(config)) == expected


@pytest.mark.parametrize(
    "config",
    [
        LLAMA_1B,
        SMOLLM2_135M,
        QWEN2_05B,
        TINY,
        TINY | {"attention_bias": True, "mlp_bias": True},
        TINY | {"model_type": "mistral"},
        TINY | {"model_type": "qwen2", "head_dim": 16},
        TINY | {"model_type": "qwen3"},
        TINY | {"model_type": "qwen3", "attention_bias": True},
    ],
)
def test_parameters_equal_those_of_the_transformers_model(config):
    model = meta_model(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert physics.parameters(Architecture.from_config(config)) == counted


def test_a_config_read_by_transformers_gives_the_same_architecture():
    assert Architecture.from_config(hf_config(QWEN2_05B).to_dict()) == Architecture.from_config(
        QWEN2_05B
    )


def test_as_dict_rebuilds_the_architecture():
    arch = Architecture.from_config(LLAMA_1B)
    assert Architecture.from_dict(arch.as_dict()) == arch


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"model_type": "rwkv"}, "rwkv"),
    ],
)
def test_a_bad_size_is_named_in_one_line(change, words):
    with pytest.raises(InputError, match=words) as caught:
        Architecture.from_config(TINY | change, source="config/models/x.yaml")
    assert str(caught.value).startswith("config/models/x.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_size_is_named():
    config = {key: value for key, value in TINY.items() if key != "intermediate_size"}
    with pytest.raises(InputError, match="intermediate_size is missing"):
        Architecture.from_config(config)


# ------------------------------------------------------------------ stored bytes


def storage_bytes(thing) -> int:
    """Bytes of the plain tensors below a cache, whatever subclass wraps them."""
    if isinstance(thing, torch.Tensor):
        inner = [
            getattr(thing, name)
            for name in ("_data", "_scale", "_shift")
            if isinstance(getattr(thing, name, None), torch.Tensor)
            and type(thing) is not torch.Tensor
        ]
        return sum(map(storage_bytes, inner)) if inner else thing.untyped_storage().nbytes()
    if isinstance(thing, dict):
        return sum(map(storage_bytes, thing.values()))
    if isinstance(thing, list | tuple):
        return sum(map(storage_bytes, thing))
    return 0


def walk(cache) -> int:
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(storage_bytes(getattr(layer, n, None)) for layer in cache.layers for n in names)


def fill(cache, arch: Architecture, updates, dtype, batch=1):
    generator = torch.Generator().manual_seed(0)
    for tokens in updates:
        for index, layer in enumerate(arch.layers):
            shape = (batch, layer.kv_heads, tokens, layer.key_size)
            cache.update(
                torch.randn(shape, generator=generator).to(dtype),
                torch.randn(shape, generator=generator).to(dtype),
                index,
            )
    return cache


@pytest.fixture(autouse=True)
def plain_unpack(monkeypatch):
    """Unpack quanto's bytes in Python: the stored bytes are the same, no compiler is needed."""
    from optimum.quanto.tensor import packed

    def unpack(self):
        parts = [(self._data >> shift) & (2**self._bits - 1) for shift in range(0, 8, self._bits)]
        return torch.cat(parts)[: self.shape[0]]

    monkeypatch.setattr(packed.PackedTensor, "unpack", unpack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [TINY, SMOLLM2_135M | {"num_hidden_layers": 2}])
def test_dynamic_and_static_storage_is_predicted_to_the_byte(config, dtype):
    arch = Architecture.from_config(config)
    dynamic = fill(DynamicCache(config=hf_config(config)), arch, [7, 1, 1, 1], dtype)
    static = fill(StaticCache(config=hf_config(config), max_cache_len=23), arch, [7, 1], dtype)
    size = dtype.itemsize
    assert physics.predicted_kv_bytes(arch, {"kind": "dynamic"}, 7, 4, size) == walk(dynamic)
    traffic = {"kind": "static", "max_length": 23}
    assert physics.predicted_kv_bytes(arch, traffic, 7, 2, size) == walk(static)


#: Newer releases count the tokens that come in, so their full-precision rest is emptied earlier.
COUNTS_NEW = bool(strategies.get("quantized_int4").traffic(99).counts_new)

QUANTISED = [
    ("quanto", 4, 0, [9] + [1] * 3),
    ("quanto", 4, 0, [9] + [1] * 4),
    ("quanto", 4, 0, [9] + [1] * 5),
    ("quanto", 2, 0, [9] + [1] * 11),
    ("quanto", 2, 0, [3]),
    ("quanto", 4, 0, [5, 1, 1, 7, 1, 1]),
    ("quanto", 4, 0, [5, 1, 7, 1, 1]),
    ("hqq", 8, 1, [9] + [1] * 6),
    ("hqq", 4, 1, [8] + [1] * 8),
    ("hqq", 4, 1, [8] + [1] * 5),
    ("hqq", 2, 1, [8] + [1] * 4),
    # hqq 0.2.8 packs three bits of a four-dimensional tensor, and then cannot unpack them.
    ("hqq", 3, 1, [9]),
    ("hqq", 1, 1, [8] + [1] * 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "bits", "axis", "updates"), QUANTISED)
def test_quantised_storage_is_predicted_to_the_byte(backend, bits, axis, updates, dtype):
    config = TINY | {"head_dim": 64}
    arch = Architecture.from_config(config)
    cache = QuantizedCache(
        backend, hf_config(config), bits, axis, axis, q_group_size=64, residual_length=4
    )
    fill(cache, arch, updates, dtype)
    predicted = physics.quantized_kv_bytes(
        arch,
        updates[0],
        len(updates) - 1,
        bits,
        backend,
        64,
        4,
        dtype.itemsize,
        updates=updates,
        counts_new=COUNTS_NEW,
    )
    assert predicted == walk(cache)


@pytest.mark.parametrize(("backend", "bits", "axis"), [("quanto", 4, 0), ("hqq", 4, 1)])
def test_every_step_of_a_generation_is_predicted_to_the_byte(backend, bits, axis):
    config = TINY | {"head_dim": 64, "num_hidden_layers": 1}
    arch = Architecture.from_config(config)
    cache = QuantizedCache(backend, hf_config(config), bits, axis, axis, 64, 5)
    traffic = {
        "kind": "quantized",
        "bits": bits,
        "backend": backend,
        "group_size": 64,
        "residual_length": 5,
    }
    fill(cache, arch, [6], torch.float32)
    for new_tokens in range(1, 14):
        assert physics.predicted_kv_bytes(arch, traffic, 6, new_tokens, 4) == walk(cache)
        fill(cache, arch, [1], torch.float32)


def test_the_residual_of_the_library_default_is_predicted_at_its_edges():
    config = SMOLLM2_135M | {"num_hidden_layers": 1}
    arch = Architecture.from_config(config)
    cache = QuantizedCache("quanto", hf_config(config), 4, 0, 0, 64, 128)
    fill(cache, arch, [10] + [1] * 127, torch.bfloat16)
    assert physics.quantized_kv_bytes(arch, 10, 127, 4, "quanto") == walk(cache)
    fill(cache, arch, [1], torch.bfloat16)
    assert physics.quantized_kv_bytes(arch, 10, 128, 4, "quanto") == walk(cache)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_short_residual_lengths_behave_as_in_the_library(length):
    config = TINY | {"num_hidden_layers": 1, "head_dim": 64}
    cache = QuantizedCache("quanto", hf_config(config), 4, 0, 0, 64, length)
    arch = Architecture.from_config(config)
    updates = [4]
    fill(cache, arch, updates, torch.float32)
    for _ in range(7):
        fill(cache, arch, [1], torch.float32)
        updates.append(1)
        kept = cache.layers[0].keys
        held = kept.shape[-2] if kept.dim() == 4 else 0
        assert physics.residual_tokens(updates, length, COUNTS_NEW) == held


def test_one_group_keeps_a_scale_per_number_in_quanto():
    config = TINY | {"num_key_value_heads": 1, "head_dim": 64}
    arch = Architecture.from_config(config)
    cache = fill(QuantizedCache("quanto", hf_config(config), 4, 0, 0), arch, [1], torch.float32)
    assert physics.quantized_kv_bytes(arch, 1, 0, 4, "quanto", bytes_per_element=4) == walk(cache)


def test_fp8_holds_one_byte_per_number_and_two_scales_per_layer():
    arch = Architecture.from_config(LLAMA_1B)
    numbers = physics.kv_bytes(arch, 301, 2) // 2
    assert (
        physics.quantized_kv_bytes(arch, 200, 101, 8, "fp8") == numbers + len(arch.layers) * 2 * 4
    )


@pytest.mark.parametrize(
    ("bits", "backend", "group", "prompt", "words"),
    [
        (8, "quanto", 64, 4, "quanto backend has 2 and 4"),
        (5, "hqq", 64, 4, "hqq backend has"),
        (4, "fp8", 64, 4, "fp8 backend has 8"),
        (4, "gguf", 64, 4, "not quanto, hqq or fp8"),
        (4, "quanto", 40, 4, "group_size 40"),
        (4, "hqq", 64, 3, "multiple of 2"),
    ],
)
def test_a_quantised_cache_that_cannot_exist_is_refused(bits, backend, group, prompt, words):
    arch = Architecture.from_config(SMOLLM2_135M)
    with pytest.raises(InputError, match=words):
        physics.quantized_kv_bytes(arch, prompt, 0, bits, backend, group)


def test_llama_3_2_1b_keeps_32_kib_per_token_in_bfloat16():
    assert physics.kv_bytes(Architecture.from_config(LLAMA_1B), 1, 2) == 32768


def test_llama_2_7b_keeps_half_a_mib_per_token_in_bfloat16():
    arch = Architecture.from_config(LLAMA2_7B)
    assert physics.kv_bytes(arch, 512, 2) == 256 * 2**20
    assert physics.kv_bytes(arch, 2048, 4) == 2 * 2**30


def test_a_cache_holds_all_but_the_last_token():
    arch = Architecture.from_config(LLAMA_1B)
    assert physics.predicted_kv_bytes(arch, {"kind": "dynamic"}, 152, 150, 2) == 301 * 32768


def test_no_cache_holds_nothing():
    arch = Architecture.from_config(LLAMA_1B)
    assert physics.predicted_kv_bytes(arch, {"kind": "none"}, 152, 150, 2) == 0


@given(tokens=st.integers(1, 10_000), sinks=st.integers(0, 8), window=st.integers(1, 512))
def test_a_window_never_holds_more_than_sinks_and_window(tokens, sinks, window):
    arch = Architecture.from_config(TINY)
    traffic = {"kind": "window", "sinks": sinks, "window": window}
    held = physics.predicted_kv_bytes(arch, traffic, tokens, 1, 2)
    assert held == physics.kv_bytes(arch, min(tokens, sinks + window), 2)


def test_paged_storage_is_whole_pages():
    arch = Architecture.from_config(TINY)
    traffic = {"kind": "paged", "page_size": 16}
    assert physics.predicted_kv_bytes(arch, traffic, 17, 1, 2) == physics.kv_bytes(arch, 32, 2)


def test_a_pool_of_pages_is_stored_whole_but_read_only_where_it_is_filled():
    arch = Architecture.from_config(TINY)
    pool = {"kind": "paged", "page_size": 16, "max_length": 160}
    assert physics.predicted_kv_bytes(arch, pool, 17, 1, 2) == physics.kv_bytes(arch, 160, 2)
    grown = {"kind": "paged", "page_size": 16}
    assert physics.decode_bytes(arch, 17, pool, 2) == physics.decode_bytes(arch, 17, grown, 2)


def test_a_preallocated_offloaded_cache_crosses_the_link_whole():
    arch = Architecture.from_config(TINY)
    traffic = {"kind": "offloaded", "max_length": 64}
    assert physics.link_bytes(arch, 10, traffic, 2) == 2 * physics.kv_bytes(arch, 64, 2)


@pytest.mark.parametrize(
    ("traffic", "words"),
    [
        ({"kind": "magic"}, "unknown traffic kind 'magic'"),
        ({}, "unknown traffic kind None"),
        ({"kind": "static"}, "lacks 'max_length'"),
        ({"kind": "window"}, "lacks 'window'"),
        ({"kind": "quantized", "backend": "hqq"}, "lacks 'bits'"),
    ],
)
def test_bad_traffic_is_refused_in_one_line(traffic, words):
    arch = Architecture.from_config(TINY)
    with pytest.raises(InputError, match=words):
        physics.predicted_kv_bytes(arch, traffic, 4, 4, 2)


# ------------------------------------------------------------------ FLOPs


def counted_flops(config: dict, q: int, p: int, kept: int, batch: int = 1, static: int = 0) -> int:
    model = meta_model(config)
    hf = hf_config(config)
    cache = StaticCache(config=hf, max_cache_len=static) if static else DynamicCache(config=hf)
    with torch.device("meta"), torch.no_grad():
        past = torch.zeros((batch, p), dtype=torch.long)
        new = torch.zeros((batch, q), dtype=torch.long)
        if p:
            model(past, past_key_values=cache, logits_to_keep=1)
        with FlopCounterMode(display=False) as counter:
            model(new, past_key_values=cache, logits_to_keep=kept)
        # Newer releases (5.23) multiply the rotary angles out without a matrix product, which is not
        # counted then; the model says how many of its FLOPs they are.
        with FlopCounterMode(display=False) as angles:
            model.model.rotary_emb(torch.zeros(1), torch.arange(q)[None])
    head_dim = Architecture.from_config(config).layers[0].key_size
    return counter.get_total_flops() - angles.get_total_flops() + head_dim * q


@pytest.mark.parametrize(
    ("config", "q", "p", "kept", "batch"),
    [
        (LLAMA_1B, 152, 0, 1, 1),
        (LLAMA_1B, 1, 152, 1, 1),
        (LLAMA_1B, 1, 300, 1, 1),
        (LLAMA_1B, 152, 0, 152, 1),
        (SMOLLM2_135M, 33, 64, 1, 1),
        (SMOLLM2_135M, 1, 1000, 1, 4),
        (QWEN2_05B, 77, 5, 3, 2),
        (TINY, 1, 1, 1, 1),
    ],
)
def test_flops_equal_those_torch_counts(config, q, p, kept, batch):
    arch = Architecture.from_config(config)
    assert physics.forward_flops(arch, q, p, kept, batch) == counted_flops(
        config, q, p, kept, batch
    )


@pytest.mark.parametrize("q", [1, 2, 17])
def test_masked_flops_are_those_of_attention_to_later_tokens(q):
    arch = Architecture.from_config(TINY)
    # Every pair of a query and a key costs the same: what one more attended key adds.
    pair = physics.forward_flops(arch, 1, 0, attended_tokens=2) - physics.forward_flops(
        arch, 1, 0, attended_tokens=1
    )
    later = sum(1 for query in range(q) for key in range(q) if key > query)
    assert physics.masked_flops(arch, q) == later * pair


def test_a_static_cache_multiplies_with_its_whole_length():
    arch = Architecture.from_config(TINY)
    modelled = physics.forward_flops(arch, 1, 0, attended_tokens=64)
    assert modelled == counted_flops(TINY, 1, 0, 1, static=64)


@settings(max_examples=30)
@given(prompt=st.integers(1, 40), new=st.integers(1, 40))
def test_generation_is_the_sum_of_its_forward_passes(prompt, new):
    arch = Architecture.from_config(TINY)
    cached = physics.prefill_flops(arch, prompt)
    uncached = 0
    for index in range(new):
        uncached += physics.forward_flops(arch, prompt + index, 0)
        if index:
            cached += physics.forward_flops(arch, 1, prompt + index - 1)
    assert physics.generation_flops(arch, prompt, new, cached=True) == cached
    assert physics.generation_flops(arch, prompt, new, cached=False) == uncached


def test_recomputing_the_headline_cell_costs_a_hundred_times_the_flops():
    arch = Architecture.from_config(LLAMA_1B)
    ratio = physics.generation_flops(arch, 152, 150, cached=False) / physics.generation_flops(
        arch, 152, 150
    )
    assert ratio == pytest.approx(100.06, abs=0.01)


# ------------------------------------------------------------------ bytes moved and the roof


def test_an_untied_embedding_table_is_not_read_whole():
    tied = Architecture.from_config(TINY | {"tie_word_embeddings": True})
    untied = Architecture.from_config(TINY)
    row = TINY["hidden_size"] * 2
    assert physics.weight_bytes_read(untied, 2) - physics.weight_bytes_read(tied, 2) == row


def test_decoded_bytes_follow_the_strategy():
    arch = Architecture.from_config(LLAMA_1B)
    weights, token = physics.weight_bytes(arch, 2), 32768
    moved = {
        kind: physics.decode_bytes(arch, 300, {"kind": kind, "max_length": 512}, 2)
        if kind == "static"
        else physics.decode_bytes(arch, 300, {"kind": kind}, 2)
        for kind in ("none", "dynamic", "static", "paged", "offloaded")
    }
    assert moved["dynamic"] == weights + (299 + 300 + 300) * token
    assert moved["static"] == weights + 513 * token
    assert moved["none"] == weights + 600 * token
    assert moved["paged"] == weights + 901 * token
    assert moved["offloaded"] == moved["dynamic"]


def test_only_an_offloaded_cache_crosses_the_link():
    arch = Architecture.from_config(LLAMA_1B)
    assert physics.link_bytes(arch, 100, {"kind": "offloaded"}, 2) == 200 * 32768
    assert physics.link_bytes(arch, 100, {"kind": "dynamic"}, 2) == 0


def test_a_quantised_cache_moves_more_than_it_stores():
    arch = Architecture.from_config(LLAMA_1B)
    traffic = {"kind": "quantized", "bits": 4, "backend": "quanto", "residual_length": 4}
    steps = [physics.decode_bytes(arch, 300 + i, traffic, 2, decoded=i) for i in range(1, 9)]
    dynamic = [physics.decode_bytes(arch, 300 + i, {"kind": "dynamic"}, 2) for i in range(1, 9)]
    assert all(q > d for q, d in zip(steps, dynamic, strict=True))
    # The fourth and the eighth token find a full residual and pack the history again.
    assert steps[3] > max(steps[:3]) and steps[7] > max(steps[4:7])


def test_an_fp8_cache_pays_for_its_way_through_float32():
    arch = Architecture.from_config(LLAMA_1B)
    traffic = {"kind": "quantized", "bits": 8, "backend": "fp8"}
    moved = physics.decode_bytes(arch, 300, traffic, 2, decoded=100)
    # Per number: appended by a copy (read 1, write 1), read 1, float32 out and in 8, bfloat16 4.
    expected = physics.kv_elements(arch, 1) * (299 + 300 * 14)
    assert moved - physics.weight_bytes(arch, 2) == expected


def test_batches_share_the_weights():
    arch = Architecture.from_config(LLAMA_1B)
    one = physics.decode_bytes(arch, 300, {"kind": "dynamic"}, 2)
    eight = physics.decode_bytes(arch, 300, {"kind": "dynamic"}, 2, batch=8)
    weights = physics.weight_bytes(arch, 2)
    assert eight - weights == 8 * (one - weights)


H200 = Ceilings(4.8e12, 4.2e12, 8e14, 1e14, 5e-6, 5e10, "data sheet")


def test_the_first_token_of_a_long_prompt_waits_for_compute_and_the_rest_for_memory():
    arch = Architecture.from_config(LLAMA_1B)
    found = physics.predicted_generation(arch, {"kind": "dynamic"}, 8192, 2, 2, H200)
    seen = physics.prefill_flops(arch, 8192) - physics.masked_flops(arch, 8192)
    assert found.ttft_s == pytest.approx(seen / 8e14)
    expected = physics.decode_bytes(arch, 8193, {"kind": "dynamic"}, 2) / 4.8e12
    assert found.tpot_s == pytest.approx(expected)
    assert found.e2e_s == pytest.approx(found.ttft_s + found.tpot_s)
    assert found.bound == "compute"


def test_decoding_at_batch_one_is_bound_by_memory():
    arch = Architecture.from_config(LLAMA_1B)
    found = physics.predicted_generation(arch, {"kind": "dynamic"}, 152, 150, 2, H200)
    assert found.bound == "memory"
    assert 1 / found.tpot_s == pytest.approx(1920, rel=0.02)


def test_recomputing_takes_longer_than_caching():
    arch = Architecture.from_config(LLAMA_1B)
    laptop = Ceilings(37e9, 30e9, 115e9, 115e9)
    none, dynamic = (
        physics.predicted_generation(arch, {"kind": kind}, 152, 150, 4, laptop)
        for kind in ("none", "dynamic")
    )
    assert none.bound == "compute"
    masked = sum(physics.masked_flops(arch, 152 + index) for index in range(150))
    seen = physics.generation_flops(arch, 152, 150, cached=False) - masked
    assert none.e2e_s == pytest.approx(seen / 115e9)
    assert none.e2e_s > 10 * dynamic.e2e_s


def test_reuse_shortens_only_the_first_token():
    arch = Architecture.from_config(LLAMA_1B)
    fresh = physics.predicted_generation(arch, {"kind": "dynamic"}, 4096, 8, 2, H200)
    reused = physics.predicted_generation(
        arch, {"kind": "dynamic"}, 4096, 8, 2, H200, reused_tokens=4000
    )
    assert reused.ttft_s < fresh.ttft_s / 5
    assert reused.tpot_s == fresh.tpot_s


def test_one_new_token_has_no_time_per_further_token():
    arch = Architecture.from_config(TINY)
    found = physics.predicted_generation(arch, {"kind": "dynamic"}, 5, 1, 4, H200)
    assert found.tpot_s is None and found.e2e_s == found.ttft_s


def test_an_offloaded_cache_waits_for_the_link():
    arch = Architecture.from_config(LLAMA_1B)
    found = physics.predicted_generation(arch, {"kind": "offloaded"}, 8192, 2, 2, H200)
    assert found.tpot_s == pytest.approx(2 * 8193 * 32768 / 5e10)


@pytest.mark.parametrize(
    "traffic",
    [
        {"kind": "none"},
        {"kind": "dynamic"},
        {"kind": "static", "max_length": 301},
        {"kind": "quantized", "bits": 4, "backend": "quanto", "group_size": 64},
        {"kind": "offloaded"},
        {"kind": "paged"},
        {"kind": "window", "sinks": 4, "window": 256},
    ],
)
def test_every_kind_has_a_prediction(traffic):
    arch = Architecture.from_config(LLAMA_1B)
    found = physics.predicted_generation(arch, traffic, 152, 150, 4, H200)
    assert 0 < found.ttft_s < found.e2e_s and math.isfinite(found.e2e_s)


def test_a_ceiling_that_was_not_measured_is_refused_with_its_reason():
    arch = Architecture.from_config(TINY)
    blind = Ceilings(
        None, 1e9, 1e9, 1e9, machine="lab", reasons=(("read_bytes_per_s", "no memory"),)
    )
    with pytest.raises(InputError, match=r"lab: read_bytes_per_s was not measured \(no memory\)"):
        physics.predicted_generation(arch, {"kind": "dynamic"}, 5, 5, 4, blind)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ceiling_must_be_positive(value):
    with pytest.raises(InputError, match="must be positive"):
        Ceilings(read_bytes_per_s=value).need("read_bytes_per_s")


@pytest.mark.parametrize(("kind", "reused"), [("none", 3), ("dynamic", 5), ("dynamic", -1)])
def test_impossible_reuse_is_refused(kind, reused):
    arch = Architecture.from_config(TINY)
    with pytest.raises(InputError, match="reused_tokens"):
        physics.predicted_generation(arch, {"kind": kind}, 5, 5, 4, H200, reused_tokens=reused)


@pytest.mark.parametrize("strategy", ["dynamic", "static"])
def test_a_recorded_prompt_is_not_read_faster_than_its_roof(strategy):
    # An allocation of 8,208 tokens is not multiplied with for a prompt of 256: the library does not either.
    folder = ROOT / "results" / "recorded" / "epyc-turin-2core"
    ceilings = Ceilings.from_record(json.loads((folder / "ceilings" / "cpu.json").read_text()))
    path = folder / f"cells/kv/cpu/embedded/context_growth/{strategy}/r1.json"
    record = json.loads(path.read_text())
    arch = Architecture.from_dict(record["model"]["architecture"])
    traffic = record["strategy_info"]["traffic"]
    assert len(record["turns"]) == 6
    for turn in record["turns"]:
        lengths = (turn["prompt_tokens"], turn["new_tokens"])
        roof = physics.predicted_generation(arch, traffic, *lengths, 4, ceilings)
        assert roof.ttft_s < min(sample["ttft_s"] for sample in turn["samples"]), lengths


def test_a_record_measured_at_another_dtype_is_refused():
    record = {"dtype": "float32", "machine": "lab", "ceilings": {}}
    with pytest.raises(InputError, match="measured at float32"):
        Ceilings.from_record(record, "bfloat16")


def test_a_record_of_ceilings_keeps_reasons():
    record = {
        "dtype": "float32",
        "machine": "lab",
        "ceilings": {
            "read_bytes_per_s": {"median": 2e10, "samples": [2e10]},
            "link_bytes_per_s": {"median": None, "samples": [], "reason": "no accelerator"},
        },
    }
    ceilings = Ceilings.from_record(record, "torch.float32")
    assert ceilings.need("read_bytes_per_s") == 2e10
    with pytest.raises(InputError, match="no accelerator"):
        ceilings.need("link_bytes_per_s")


@pytest.mark.parametrize("machine", ["h100-16core", "h200-16core"])
def test_no_strategy_of_a_recorded_gpu_is_faster_than_its_roof(machine):
    # A product of one row takes mostly its start there: with that as its ceiling, generated kernels were.
    folder = ROOT / "results" / "recorded" / machine
    ceilings = Ceilings.from_record(json.loads((folder / "ceilings" / "cuda.json").read_text()))
    cells = sorted(folder.glob("cells/kv/cuda/llama-3.2-1b-geometry/symposium_turn/*/r1.json"))
    assert len(cells) >= 7
    for path in cells:
        record = json.loads(path.read_text())
        arch = Architecture.from_dict(record["model"]["architecture"])
        (turn,) = record["turns"]
        traffic = record["strategy_info"]["traffic"]
        roof = physics.predicted_generation(
            arch, traffic, turn["prompt_tokens"], turn["new_tokens"], 2, ceilings
        )
        assert roof.e2e_s < min(sample["e2e_s"] for sample in turn["samples"]), path.parent.name


def test_an_unknown_dtype_is_refused():
    with pytest.raises(InputError, match="int4"):
        physics.bytes_per_element("int4")
    assert physics.bytes_per_element("torch.bfloat16") == 2
