"""What a lossy cache costs in quality: its distributions and replies beside the exact cache's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench import strategies
from kvbench.analysis import intervals
from kvbench.errors import InputError
from kvbench.inputs import models
from kvbench.measurement.memory import cache_bytes
from kvbench.strategies.base import Strategy, common_prefix

if TYPE_CHECKING:
    import torch

    from kvbench.inputs.models import LoadedModel

#: What is measured per turn and has an interval over turns.
PER_TURN = ("kl_nats", "top1_share", "nll", "nll_exact", "greedy_prefix")


def without_meaning(folder: Path, document: Mapping[str, Any]) -> str | None:
    """Return why quality says nothing here, in one sentence, or None when it does.

    Parameters
    ----------
    folder:
        The prepared model (:func:`kvbench.inputs.models.prepare`).
    document:
        The scenario's token ids (:func:`kvbench.inputs.tokens.prompts`).
    """
    if (folder / models.RECIPE).exists():
        return "the model's weights are random, so that no continuation is better than another"
    if not document.get("references"):
        return "the scenario has fixed lengths and no reference replies"
    return None


def quality(
    model: LoadedModel,
    strategy: Strategy,
    document: Mapping[str, Any],
    turns: int | None,
    max_tokens: int,
) -> dict[str, Any]:
    """Compare a strategy's cache with the exact one, teacher-forced over the reference replies.

    The history of a turn holds the reference replies, whatever was generated. A turn's prompt is
    read into a fresh cache; then the reference goes through the cache token by token, as decoding
    does, so that what was packed or dropped is missed. The first token of a reply comes from the
    pass over the prompt, which reads no cache, and is not scored. A strategy that keeps its cache
    across turns is started afresh at every turn here.

    Parameters
    ----------
    model:
        A model that was trained; see :func:`without_meaning`.
    strategy:
        Any strategy whose cache is one of the library's.
    document:
        A conversation as token ids, with ``references``.
    turns:
        Turns to score, or None for all.
    max_tokens:
        Tokens of a reference that are scored, and tokens generated to compare replies, at most.

    Returns
    -------
    dict
        ``status`` and ``reason`` (``unsupported`` when the strategy has no such cache); per turn
        under ``turns``: ``kl_nats`` (mean ``KL(exact || lossy)`` of next-token distributions),
        ``top1_share`` (equal most likely tokens), ``nll`` and ``nll_exact`` (mean negative
        log-likelihood of a reference token, nats), ``greedy_prefix`` (leading tokens that greedy
        replies share), ``reply_exact`` (whether the lossy greedy reply is the reference, as far as
        ``max_tokens`` goes), ``scored_tokens``, ``kv_bytes`` and ``cached_tokens``. Under
        ``summary`` the median of each with its 95 % interval over turns, ``perplexity``,
        ``perplexity_exact``, ``exact_reply_share`` and ``kv_bytes_per_token`` (of the last turn).

    Raises
    ------
    InputError
        ``max_tokens`` leaves no token to score.
    """
    import torch

    if max_tokens < 2:
        raise InputError(f"max_tokens is {max_tokens}; scoring a reply needs 2 or more")
    reason = strategy.available(model, model.model.device.type)
    if reason:
        return _unsupported(reason)
    references = document["references"][:turns]
    prompts = _prompts(document, references)
    room = max(len(prompt) for prompt in prompts) + max_tokens + 1
    exact, lossy = (
        strategies.get(strategies.REFERENCE).session(model, room),
        strategy.session(model, room),
    )
    found = []
    try:
        with torch.inference_mode():
            for number, (prompt, reference) in enumerate(zip(prompts, references, strict=True), 1):
                scored = reference[:max_tokens]
                expected, _ = _distributions(model, exact, prompt, scored)
                given, cache = _distributions(model, lossy, prompt, scored)
                if expected is None or given is None:
                    return _unsupported(f"{strategy.id} keeps no cache of the library's")
                turn = {"turn": number, "scored_tokens": len(scored) - 1}
                turn |= _compared(expected, given, scored[1:])
                turn["kv_bytes"] = cache_bytes(cache)
                turn["cached_tokens"] = len(prompt) + len(scored) - 1
                found.append(turn | _replies(model, exact, lossy, prompt, reference, max_tokens))
    finally:
        exact.close()
        lossy.close()
    return {"status": "ok", "reason": None, "turns": found, "summary": _summary(found)}


def _unsupported(reason: str) -> dict[str, Any]:
    return {"status": "unsupported", "reason": reason, "turns": [], "summary": {}}


def _prompts(document: Mapping[str, Any], references: Sequence[Sequence[int]]) -> list[list[int]]:
    """The whole prompt of every turn, with the reference replies as history."""
    prompts = [list(document["first"])]
    for reference, between in zip(references, document["next"], strict=False):
        prompts.append([*prompts[-1], *reference, *between])
    return prompts[: len(references)]


def _distributions(
    model: LoadedModel, session: strategies.Session, prompt: Sequence[int], reply: Sequence[int]
) -> tuple[torch.Tensor | None, Any]:
    """Log-probabilities after each token of ``reply`` but the last, in float64, and the cache.

    Returns
    -------
    tensor:
        ``(len(reply) - 1, vocabulary)``, or None where there is no cache to go on with.
    """
    import torch

    session.restart()
    # One new token leaves exactly the prompt in the cache.
    cache = session.generate(prompt, 1, lambda: None).cache
    if not hasattr(cache, "get_seq_length"):
        return None, cache
    device, rows = model.model.device, []
    for offset, token in enumerate(reply[:-1]):
        logits = model.model(
            torch.tensor([[token]], device=device),
            position_ids=torch.tensor([[len(prompt) + offset]], device=device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        rows.append(torch.log_softmax(logits[0, -1].double(), -1))
    return torch.stack(rows), cache


def _compared(exact: torch.Tensor, lossy: torch.Tensor, targets: Sequence[int]) -> dict[str, float]:
    """Means over the positions of one turn."""
    import torch

    # Terms of probability zero are zero, not NaN.
    divergence = torch.where(exact.isneginf(), 0.0, exact.exp() * (exact - lossy)).sum(-1)
    rows = torch.arange(len(targets), device=exact.device)
    wanted = torch.tensor(list(targets), device=exact.device)
    return {
        "kl_nats": float(divergence.mean()),
        "top1_share": float((exact.argmax(-1) == lossy.argmax(-1)).double().mean()),
        "nll": float(-lossy[rows, wanted].mean()),
        "nll_exact": float(-exact[rows, wanted].mean()),
    }


def _replies(
    model: LoadedModel,
    exact: strategies.Session,
    lossy: strategies.Session,
    prompt: Sequence[int],
    reference: Sequence[int],
    max_tokens: int,
) -> dict[str, Any]:
    """Greedy replies of both caches to one prompt, and the reference."""
    # One token more than the reference has, so that a reply that does not end shows.
    count = min(max_tokens, len(reference) + 1)
    replies = []
    for session in (exact, lossy):
        session.restart()
        replies.append(session.generate(prompt, count, lambda: None).tokens)
    shown = model.reply(replies[1])
    return {
        "greedy_prefix": common_prefix(*replies),
        "generated_tokens": count,
        "reply_exact": shown == list(reference[:count]),
    }


def _summary(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over turns with intervals, and the shares and sizes of the whole conversation."""
    found: dict[str, Any] = {}
    for name in PER_TURN:
        centre, ends = intervals.median([turn[name] for turn in turns])
        found[name] = centre
        found[f"{name}_ci_low"], found[f"{name}_ci_high"] = ends or (None, None)
    tokens = sum(turn["scored_tokens"] for turn in turns)
    for name, source in (("perplexity", "nll"), ("perplexity_exact", "nll_exact")):
        total = sum(turn[source] * turn["scored_tokens"] for turn in turns)
        found[name] = math.exp(total / tokens)
    found["exact_reply_share"] = sum(turn["reply_exact"] for turn in turns) / len(turns)
    found["kv_bytes_per_token"] = turns[-1]["kv_bytes"] / turns[-1]["cached_tokens"]
    return found
