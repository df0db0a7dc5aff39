"""Compressed caches: unsupported with the reason, or right bytes and positions where kvpress fits."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType

import numpy as np
import pytest
from families import llama
from kvbench import physics, strategies
from kvbench.measurement.memory import cache_bytes
from kvbench.strategies import pressed

PROMPT = np.random.default_rng(5).integers(260, 2560, 80).tolist()
NAMES = ("kvpress_knorm", "kvpress_snapkv")


class Halving:
    """A press as kvpress has them: drops a share of the oldest tokens after a forward pass."""

    def __init__(self, compression_ratio: float) -> None:
        self.compression_ratio = compression_ratio

    @contextmanager
    def __call__(self, model):
        def hook(module, _arguments, given, _output):
            layer = given["past_key_values"].layers[module.layer_idx]
            kept = max(1, int(layer.keys.shape[-2] * (1 - self.compression_ratio)))
            layer.keys = layer.keys[..., -kept:, :].clone()
            layer.values = layer.values[..., -kept:, :].clone()

        hooks = [
            layer.self_attn.register_forward_hook(hook, with_kwargs=True)
            for layer in model.model.layers
        ]
        try:
            yield
        finally:
            for each in hooks:
                each.remove()


@pytest.fixture
def fitting(monkeypatch):
    """A package called kvpress that fits the installed transformers."""
    module = ModuleType("kvpress")
    module.__spec__ = type(sys.__spec__)("kvpress", None)
    module.KnormPress = module.SnapKVPress = Halving
    monkeypatch.setitem(sys.modules, "kvpress", module)
    installed = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.5.5" if name == "kvpress" else installed(name)
    )
    monkeypatch.setattr(metadata, "requires", lambda _: ["transformers>=4.56"])


@pytest.mark.parametrize("name", NAMES)
def test_without_the_package_the_reason_names_it(name, monkeypatch):
    monkeypatch.setattr(pressed.importlib.util, "find_spec", lambda _: None)
    assert "pip install kvpress" in strategies.get(name).available(None, "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_a_package_for_another_transformers_is_a_reason_with_both_versions(
    name, fitting, monkeypatch
):
    monkeypatch.setattr(metadata, "requires", lambda _: ["transformers<5.3,>=4.56.0", "pandas<3"])
    reason = strategies.get(name).available(None, "cpu")
    assert "<5.3" in reason and metadata.version("transformers") in reason and "0.5.5" in reason


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("prompt", "new"), [(80, 1), (80, 12), (65, 4), (64, 4), (7, 5), (1, 3)])
def test_the_bytes_equal_the_prediction(tiny, fitting, name, prompt, new):
    strategy = strategies.get(name)
    assert strategy.available(tiny, "cpu") is None
    found = strategy.session(tiny, 99).generate(PROMPT[:prompt], new, lambda: None)
    architecture = physics.Architecture.from_config(tiny.architecture)
    predicted = physics.predicted_kv_bytes(architecture, strategy.traffic(99), prompt, new, 4)
    assert cache_bytes(found.cache) == predicted
    assert len(found.tokens) == new


def test_a_press_that_drops_nothing_gives_the_tokens_of_recomputation(tiny, fitting):
    exact = strategies.get("none").session(tiny, 60).generate(PROMPT, 20, lambda: None)
    kept = pressed.KvpressKnorm(compression_ratio=0.0)
    assert kept.session(tiny, 60).generate(PROMPT, 20, lambda: None).tokens == exact.tokens


def test_what_is_left_keeps_its_position(tiny, fitting):
    """Recomputing with the dropped tokens masked gives the same next tokens."""
    import torch

    new = 6
    found = strategies.get("kvpress_knorm").session(tiny, 99).generate(PROMPT, new, lambda: None)
    dropped, ids = len(PROMPT) // 2, list(PROMPT)
    with torch.inference_mode():
        for _ in range(new):
            length = len(ids)
            row = torch.arange(length)
            visible = row[None, :] <= row[:, None]
            # Tokens of the prompt saw all of it; those after it see what was left.
            visible[len(PROMPT) :, :dropped] = False
            logits = tiny.model(
                torch.tensor([ids]), attention_mask=visible[None, None], use_cache=False
            ).logits
            ids.append(int(logits[0, -1].argmax()))
    assert found.tokens == ids[len(PROMPT) :]


def test_a_prompt_within_the_window_of_snapkv_stays_whole(tiny, fitting):
    strategy = strategies.get("kvpress_snapkv")
    exact = strategies.get("none").session(tiny, 99).generate(PROMPT[:64], 8, lambda: None)
    session = strategy.session(tiny, 99)
    whole = session.generate(PROMPT[:64], 8, lambda: None)
    assert whole.tokens == exact.tokens
    assert whole.cache.get_seq_length() == 64 + 7
    assert session.generate(PROMPT[:65], 8, lambda: None).cache.get_seq_length() == 32 + 7
    assert strategy.traffic(99).kept_tokens(64) == 64


def test_a_token_is_announced_once_and_hooks_are_gone_afterwards(tiny, fitting):
    announced = []
    session = strategies.get("kvpress_snapkv").session(tiny, 99)
    session.generate(PROMPT, 4, lambda: announced.append(1))
    session.generate(PROMPT[:9], 2, lambda: announced.append(1))
    assert len(announced) == 6
    assert not any(layer.self_attn._forward_hooks for layer in tiny.model.model.layers)


def test_pruning_lowers_the_predicted_time_of_decoding_and_not_of_reading():
    architecture = llama(4, 256, 4, 2, 64, 640, 2560, False, 65536)
    ceilings = physics.Ceilings(
        read_bytes_per_s=1e10, prefill_flops_per_s=1e11, decode_flops_per_s=1e10
    )
    traffic = {"kind": "pruned", "compression_ratio": 0.5}
    whole, half = (
        physics.predicted_generation(architecture, kind, 4096, 16, 4, ceilings)
        for kind in ({"kind": "dynamic"}, traffic)
    )
    assert half.ttft_s == whole.ttft_s
    assert half.tpot_s < whole.tpot_s
