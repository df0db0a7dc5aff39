"""Quality of lossy caches: nothing is lost by an exact one, and what is measured is what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from kvbench import physics, strategies
from kvbench.errors import InputError
from kvbench.inputs import models, scenarios, tokens
from kvbench.measurement import quality as measured
from kvbench.strategies.window import AttentionSink, SlidingWindow

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "resources" / "embedded-llama"
TURNS, TOKENS = 2, 24


@pytest.fixture(scope="module")
def trained():
    """The model that ships with the repository: its distributions mean something."""
    import torch

    torch.set_num_threads(1)
    return models.load(EMBEDDED, "cpu", "float32")


@pytest.fixture(scope="module")
def document():
    scenario = scenarios.load(ROOT / "config/scenarios/banking_loan_application.yaml")
    return tokens.prompts(EMBEDDED, scenario)


@pytest.fixture(scope="module")
def found(trained, document):
    """Results by strategy; made once."""

    made: dict[str, dict] = {}

    def found(name, strategy=None):
        if name not in made:
            chosen = strategy or strategies.get(name)
            made[name] = measured.quality(trained, chosen, document, TURNS, TOKENS)
        return made[name]

    return found


@pytest.mark.parametrize("name", ["dynamic", "static", "dynamic_reuse"])
def test_an_exact_cache_loses_nothing(found, name):
    for turn in found(name)["turns"]:
        assert abs(turn["kl_nats"]) < 1e-8
        assert turn["top1_share"] == 1
        assert turn["nll"] == pytest.approx(turn["nll_exact"], abs=1e-5)
        assert turn["greedy_prefix"] == turn["generated_tokens"]


def test_a_window_that_holds_everything_loses_nothing(found):
    turns = found("wide", SlidingWindow(window=4096))["turns"]
    assert max(abs(turn["kl_nats"]) for turn in turns) < 1e-8


def test_the_trained_model_recites_its_references(found):
    assert found("dynamic")["summary"]["exact_reply_share"] == 1
    assert found("dynamic")["summary"]["perplexity_exact"] < 1.5


def test_fewer_bits_lose_more(found):
    int4, int2 = found("quantized_int4")["summary"], found("quantized_int2")["summary"]
    assert 0 < int4["kl_nats"] < int2["kl_nats"]


def test_a_short_window_loses_something_and_says_how_much(found):
    result = found("short", SlidingWindow(window=8))
    assert result["summary"]["kl_nats"] > 1e-3
    assert result["summary"]["nll"] > result["summary"]["nll_exact"]
    assert result["summary"]["exact_reply_share"] < 1


def test_the_divergence_is_the_textbook_sum(trained, document):
    """KL, likelihood and top-1 of one turn, from a mask over the whole sequence instead."""
    import torch

    strategy = AttentionSink(window=16)
    prompt, reply = document["first"], document["references"][0][:TOKENS]
    length = len(prompt) + len(reply)
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    kept = (query < len(prompt)) | (key < 4) | (query - key < 16)
    ids = torch.tensor([[*prompt, *reply]])

    def probabilities(mask):
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
        logits = trained.model(ids, attention_mask=mask, use_cache=False).logits
        return logits[0, len(prompt) : -1].double().softmax(-1)

    with torch.inference_mode():
        p, q = probabilities(key <= query), probabilities((key <= query) & kept)
    turn = measured.quality(trained, strategy, document, 1, TOKENS)["turns"][0]
    assert turn["kl_nats"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    right = q[torch.arange(len(reply) - 1), torch.tensor(reply[1:])]
    assert turn["nll"] == pytest.approx(float(-right.log().mean()), rel=1e-3)
    assert turn["top1_share"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())


@pytest.mark.parametrize("name", ["quantized_int4", "attention_sink"])
def test_the_bytes_of_a_lossy_cache_equal_the_prediction(found, trained, name):
    architecture = physics.Architecture.from_config(trained.architecture)
    traffic = strategies.get(name).traffic(4096)
    for turn in found(name)["turns"]:
        scored = turn["scored_tokens"]
        prompt = turn["cached_tokens"] - scored
        predicted = physics.predicted_kv_bytes(architecture, traffic, prompt, scored + 1, 4)
        assert turn["kv_bytes"] == predicted


def test_a_strategy_without_a_cache_is_unsupported_with_a_reason(found):
    result = found("none")
    assert (result["status"], result["turns"]) == ("unsupported", [])
    assert result["reason"] == "none keeps no cache of the library's"


def test_a_strategy_that_does_not_run_here_says_why(found):
    assert "cuda" in found("offloaded")["reason"]


def test_the_result_is_plain_json(found):
    assert json.loads(json.dumps(found("quantized_int4"), allow_nan=False))


def test_medians_have_intervals_from_six_turns_on(found):
    turn = found("short", SlidingWindow(window=8))["turns"][0]
    turns = [turn | {"kl_nats": value} for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    summary = measured._summary(turns)
    assert summary["kl_nats"] == 3.5
    assert (summary["kl_nats_ci_low"], summary["kl_nats_ci_high"]) == (1.0, 6.0)
    assert measured._summary(turns[:5])["kl_nats_ci_low"] is None
    assert summary["perplexity"] == pytest.approx(math.exp(turn["nll"]))


def test_random_weights_and_fixed_lengths_have_no_quality(tiny_folder, document):
    assert "random" in measured.without_meaning(tiny_folder, document)
    assert "no reference" in measured.without_meaning(EMBEDDED, {"kind": "fixed", "steps": []})
    assert measured.without_meaning(EMBEDDED, document) is None


def test_a_reply_of_one_token_cannot_be_scored(trained, document):
    with pytest.raises(InputError, match="max_tokens is 1"):
        measured.quality(trained, strategies.get("dynamic"), document, 1, 1)


# The figure -----------------------------------------------------------------------------------


def table(found):
    """The table that the figure takes, from real results."""
    import pandas as pd

    names = ("dynamic", "quantized_int4", "quantized_int2", "attention_sink")
    place = {"machine": "here", "model": "embedded", "device": "cpu", "dtype": "float32"}
    return pd.DataFrame(
        {**place, "strategy": name, "scenario": "a", "tpot_s": 0.01} | found(name)["summary"]
        for name in names
    )


def replies(rows):
    """The turns behind the rows, two each."""
    import pandas as pd

    return pd.concat([rows.assign(turn=turn) for turn in (0, 1)])


def test_the_figure_has_one_point_a_strategy_and_puts_rounding_at_the_edge(found):
    from kvbench.figures import kv_quality

    rows = table(found)
    (left,) = kv_quality.draw(rows, replies(rows)).axes
    points = [line.get_xdata()[0] for line in left.lines if line.get_marker() not in ("", "None")]
    assert len(points) == 4
    assert min(points) == kv_quality.ROUNDING_NATS
    assert left.get_ylabel() == "KV cache per token (KiB)"
    assert "n = 2 turns" in left.get_title(loc="left")


def test_the_figure_without_quality_says_why(found):
    from kvbench.figures import kv_quality

    rows = table(found).iloc[:0]
    empty = kv_quality.draw(rows, replies(rows))
    assert "needs a trained model" in " ".join(text.get_text() for text in empty.texts)
