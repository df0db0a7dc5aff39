"""Windowed caches: what is kept, at which positions, and how many bytes it takes."""

from __future__ import annotations

import numpy as np
import pytest
from kvbench import physics, strategies
from kvbench.measurement.memory import cache_bytes
from kvbench.strategies.window import AttentionSink, SlidingWindow

PROMPT = np.random.default_rng(3).integers(260, 2560, 40).tolist()
SMALL = {"sliding_window": SlidingWindow(window=12), "attention_sink": AttentionSink(window=12)}


def generate(tiny, strategy, prompt=PROMPT, new=20):
    return strategy.session(tiny, len(prompt) + new).generate(prompt, new, lambda: None)


@pytest.fixture(params=SMALL)
def small(request):
    """A windowed strategy whose window the prompt overflows."""
    return SMALL[request.param]


def test_the_registry_knows_both_and_neither_promises_exact_tokens():
    for name in SMALL:
        assert not strategies.get(name).exact
        assert not strategies.get(name).reuses_turns


@pytest.mark.parametrize("new", [1, 2, 20])
@pytest.mark.parametrize("prompt", [1, 11, 12, 13, 16, 17, 40])
def test_the_bytes_equal_the_prediction(tiny, small, prompt, new):
    found = generate(tiny, small, PROMPT[:prompt], new)
    architecture = physics.Architecture.from_config(tiny.architecture)
    predicted = physics.predicted_kv_bytes(architecture, small.traffic(99), prompt, new, 4)
    assert cache_bytes(found.cache) == predicted


def test_a_window_longer_than_the_context_gives_the_tokens_of_recomputation(tiny):
    exact = generate(tiny, strategies.get("none")).tokens
    assert generate(tiny, SlidingWindow(window=100)).tokens == exact
    assert generate(tiny, AttentionSink(window=100)).tokens == exact


def test_a_short_window_gives_other_tokens(tiny, small):
    assert generate(tiny, small).tokens != generate(tiny, strategies.get("none")).tokens


def masked(tiny, strategy, prompt, new):
    """The same by recomputation: a decoded token attends to sinks and window through a mask.

    Keys and values of a token are made once, with what it could see then. So row ``t`` of the mask
    of the whole sequence is what token ``t`` attended to: everything before it in the prompt, and
    sinks and window afterwards. One pass over the sequence per new token gives the tokens.
    """
    import torch

    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(new):
            length = len(ids)
            query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
            kept = (query < len(prompt)) | (key < strategy.sinks) | (query - key < strategy.window)
            mask = torch.where((key <= query) & kept, 0.0, torch.finfo(torch.float32).min)
            logits = tiny.model(
                torch.tensor([ids]), attention_mask=mask[None, None], use_cache=False
            ).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_decoding_attends_to_sinks_and_window_at_the_original_positions(tiny, small):
    assert generate(tiny, small).tokens == masked(tiny, small, PROMPT, 20)


def test_several_tokens_at_once_attend_to_what_is_kept_and_to_each_other_in_order(tiny, small):
    import torch

    after = [700, 701, 702]
    cache = generate(tiny, small, PROMPT, 1).cache
    kept = [*range(small.sinks), *range(len(PROMPT) - small.window, len(PROMPT))]
    positions = torch.arange(len(PROMPT), len(PROMPT) + len(after))[None]
    with torch.inference_mode():
        found = tiny.model(
            torch.tensor([after]), position_ids=positions, past_key_values=cache
        ).logits
        length = len(PROMPT) + len(after)
        query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
        seen = torch.isin(key, torch.tensor(kept)) | (key >= len(PROMPT))
        mask = (key <= query) & ((query < len(PROMPT)) | seen)
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        expected = tiny.model(
            torch.tensor([[*PROMPT, *after]]), attention_mask=mask[None, None], use_cache=False
        ).logits[:, len(PROMPT) :]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_next_position_counts_dropped_tokens_too(tiny, small):
    cache = generate(tiny, small).cache
    assert cache.get_seq_length() == len(PROMPT) + 19
    assert cache.layers[0].keys.shape[-2] == small.sinks + small.window


def test_the_first_tokens_stay_exactly_as_they_were(tiny):
    import torch

    sinks = generate(tiny, SMALL["attention_sink"]).cache.layers[1].keys[..., :4, :]
    whole = generate(tiny, strategies.get("dynamic")).cache.layers[1].keys[..., :4, :]
    torch.testing.assert_close(sinks, whole, rtol=0, atol=0)


def test_a_cache_that_was_emptied_is_as_new(tiny, small):
    cache = generate(tiny, small).cache
    cache.reset()
    assert (cache.get_seq_length(), cache_bytes(cache)) == (0, 0)


def test_dropped_tokens_cannot_come_back(tiny, small):
    with pytest.raises(NotImplementedError, match="cannot take back"):
        generate(tiny, small).cache.crop(-1)
