"""Caches kept across turns: same tokens as recomputing, and only what is new is read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw
from kvbench import physics, strategies
from kvbench.measurement.memory import cache_bytes
from kvbench.strategies.reuse import ReusingSession, common_prefix

EXACT = ("dynamic_reuse", "static_reuse")
MAX_LENGTH = 400
#: Token ids per turn, and new tokens per turn.
TALK = ((range(300, 340), 9), (range(700, 720), 5), (range(900, 905), 7))

#: Questions as seeds and lengths: ids are drawn from them, so that shrinking stays fast.
turns = draw.lists(
    draw.tuples(draw.integers(0, 10_000), draw.integers(1, 40), draw.integers(1, 8)),
    min_size=1,
    max_size=4,
)


def question(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(260, 2560, length).tolist()


def converse(session, questions, restart: bool = True):
    """Every turn's generation, and its whole prompt."""
    if restart:
        session.restart()
    history: list[int] = []
    found = []
    for ids, new in questions:
        history = [*history, *ids]
        generation = session.generate(history, new, lambda: None)
        found.append((list(history), generation))
        history = [*history, *generation.tokens]
    return found


def tokens(found) -> list[list[int]]:
    return [generation.tokens for _, generation in found]


@pytest.fixture(scope="module")
def opened(tiny):
    """One session per strategy for all examples: what leaks between conversations shows."""
    names = ("none", "dynamic", "quantized_int4", "quantized_int4_reuse", *EXACT)
    return {name: strategies.get(name).session(tiny, MAX_LENGTH) for name in names}


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=6)
@given(conversation=turns)
def test_reuse_gives_the_tokens_of_recomputation(opened, name, conversation):
    questions = [(question(seed, length), new) for seed, length, new in conversation]
    assert tokens(converse(opened[name], questions)) == tokens(converse(opened["none"], questions))


@pytest.mark.parametrize("name", (*EXACT, "quantized_int4_reuse"))
def test_all_but_the_last_reply_token_of_the_history_is_reused(opened, name):
    found = converse(opened[name], TALK)
    assert found[0][1].reused_tokens == 0
    for (history, generation), (_, after) in itertools.pairwise(found):
        assert after.reused_tokens == len(history) + len(generation.tokens) - 1


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=4)
@given(conversation=turns, cut=draw.integers(0, 60), seed=draw.integers(0, 99))
def test_a_history_that_changed_is_read_again_from_where_it_changed(
    opened, name, conversation, cut, seed
):
    questions = [(question(number, length), new) for number, length, new in conversation]
    history, last = converse(opened[name], questions)[-1]
    other = [*(history + last.tokens)[:cut], *question(seed, 7)]
    found = opened[name].generate(other, 6, lambda: None)
    opened["none"].restart()
    assert found.tokens == opened["none"].generate(other, 6, lambda: None).tokens
    assert found.reused_tokens <= common_prefix(history + last.tokens, other)


def test_the_dynamic_cache_keeps_the_prefix_of_a_changed_history(opened):
    history, _ = converse(opened["dynamic_reuse"], TALK)[-1]
    changed = [*history[:50], 2000, 2001]
    assert opened["dynamic_reuse"].generate(changed, 3, lambda: None).reused_tokens == 50


@pytest.mark.parametrize("name", ("static_reuse", "quantized_int4_reuse"))
def test_a_cache_that_cannot_be_cut_starts_over(opened, name):
    history, _ = converse(opened[name], TALK)[-1]
    changed = [*history[:50], 2000, 2001]
    assert opened[name].generate(changed, 3, lambda: None).reused_tokens == 0


@pytest.mark.parametrize("name", EXACT)
def test_the_same_prompt_again_gives_the_same_tokens(opened, name):
    opened[name].restart()
    prompt = question(5, 30)
    first = opened[name].generate(prompt, 8, lambda: None).tokens
    assert opened[name].generate(prompt, 8, lambda: None).tokens == first


@pytest.mark.parametrize("name", (*EXACT, "quantized_int4_reuse"))
def test_a_restarted_session_reuses_nothing_of_the_conversation_before(opened, name):
    first = converse(opened[name], TALK)
    again = converse(opened[name], TALK)
    assert again[0][1].reused_tokens == 0
    assert tokens(again) == tokens(first)


def test_a_cache_that_somebody_else_has_fed_is_not_reused(tiny, opened):
    import torch

    history, generation = converse(opened["dynamic_reuse"], TALK)[-1]
    with torch.inference_mode():
        tiny.model(torch.tensor([[999]]), past_key_values=generation.cache, use_cache=True)
    after = [*history, *generation.tokens, 700]
    found = opened["dynamic_reuse"].generate(after, 4, lambda: None)
    opened["none"].restart()
    assert found.reused_tokens == 0
    assert found.tokens == opened["none"].generate(after, 4, lambda: None).tokens


def test_a_turn_that_fails_leaves_nothing_to_reuse(opened):
    session: ReusingSession = opened["dynamic_reuse"]
    history, generation = converse(session, TALK)[-1]

    def fail() -> None:
        raise RuntimeError("the turn is interrupted")

    after = [*history, *generation.tokens, 700]
    with pytest.raises(RuntimeError, match="interrupted"):
        session.generate(after, 4, fail)
    assert session.generate(after, 4, lambda: None).reused_tokens == 0


def test_static_reuse_goes_on_in_the_memory_it_allocated_at_the_start(opened):
    found = converse(opened["static_reuse"], TALK)
    assert len({cache_bytes(generation.cache) for _, generation in found}) == 1
    assert found[0][1].cache is found[-1][1].cache


# The quantised cache --------------------------------------------------------------------------


def updates(found) -> list[int]:
    """Tokens of each forward pass of the cache behind a conversation, from what turns report."""
    passes: list[int] = []
    for history, generation in found:
        passes = passes if generation.reused_tokens else []
        passes += [len(history) - generation.reused_tokens] + [1] * (len(generation.tokens) - 1)
    return passes


@settings(max_examples=4, suppress_health_check=list(HealthCheck))
@given(conversation=turns, longer=draw.integers(90, 130))
def test_quantised_bytes_over_turns_equal_the_prediction(tiny, opened, conversation, longer):
    # The first question is long enough for the full-precision rest to fill up on some examples.
    questions = [(question(1, 30), longer)]
    questions += [(question(seed, length), new) for seed, length, new in conversation]
    found = converse(opened["quantized_int4_reuse"], questions)
    traffic = strategies.get("quantized_int4_reuse").traffic(MAX_LENGTH)
    architecture = physics.Architecture.from_config(tiny.architecture)
    history, last = found[-1]
    predicted = physics.predicted_kv_bytes(
        architecture,
        traffic,
        len(history),
        len(last.tokens),
        4,
        updates=updates(found),
    )
    assert cache_bytes(last.cache) == predicted
    assert last.cache.get_seq_length() == len(history) + len(last.tokens) - 1


def test_the_quantised_cache_gives_what_feeding_it_by_hand_gives(tiny, opened):
    """What generate feeds is exactly the new part of each prompt, then token by token."""
    import torch

    found = converse(opened["quantized_int4_reuse"], TALK)
    cache = strategies.get("quantized_int4_reuse").cache(tiny)
    fed = 0
    with torch.inference_mode():
        for history, generation in found:
            fresh = history[fed:]
            reply = []
            for _ in generation.tokens:
                positions = torch.arange(fed, fed + len(fresh))[None]
                logits = tiny.model(
                    torch.tensor([fresh]), position_ids=positions, past_key_values=cache
                ).logits
                fed += len(fresh)
                fresh = [int(logits[0, -1].argmax())]
                reply += fresh
            assert reply == generation.tokens


def test_the_first_turn_with_a_quantised_cache_is_that_without_reuse(opened):
    with_reuse = tokens(converse(opened["quantized_int4_reuse"], TALK[:1]))
    assert with_reuse == tokens(converse(opened["quantized_int4"], TALK[:1]))


# The library's cut of a quantised cache -------------------------------------------------------


def test_cutting_the_librarys_quantised_cache_loses_count_which_is_why_it_starts_over(tiny):
    import torch

    cache = strategies.get("quantized_int4_reuse").cache(tiny)
    with torch.inference_mode():
        for ids in ([question(1, 20)], [[700]], [[701]], [[702]]):
            tiny.model(torch.tensor(ids), past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() != 21


@pytest.mark.parametrize(
    ("left", "right", "shared"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 9, 3], [1, 2, 3], 1), ([4], [5], 0)],
)
def test_the_common_prefix_ends_at_the_first_difference(left, right, shared):
    assert common_prefix(left, right) == shared


# The figure -----------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Summary and samples in which ``dynamic_reuse`` reused and ``dynamic`` did not."""
    import synthetic_kv

    monkeypatch.setitem(synthetic_kv.STRATEGIES, "dynamic_reuse", (1.0, 1.0, True))
    summary, samples = synthetic_kv.tables()
    reusing = samples["strategy"] == "dynamic_reuse"
    samples.loc[reusing & (samples["turn"] > 1), "reused_tokens"] = 100
    return summary, samples


def test_the_figure_shows_ttft_share_and_memory_of_what_was_reused(measured):
    from kvbench.figures import kv_reuse

    times, shares, memory = kv_reuse.draw(*measured).axes
    assert [ax.get_ylabel() for ax in (times, shares, memory)] == [
        "TTFT (s)",
        "prompt not read (%)",
        "cache held (MiB)",
    ]
    drawn = shares.lines[0].get_ydata()
    assert drawn[0] == 0 < drawn[1] < 100


def test_the_figure_says_that_nothing_was_reused(measured):
    from kvbench.figures import kv_reuse

    summary, samples = measured
    for tables in (
        (summary.iloc[:0], samples.iloc[:0]),
        (summary, samples.assign(reused_tokens=0)),
    ):
        assert "no strategy" in " ".join(text.get_text() for text in kv_reuse.draw(*tables).texts)
