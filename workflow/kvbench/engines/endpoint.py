"""Loads on an OpenAI-compatible endpoint, and what a client sees of it: times, reuse, goodput.

Two kinds of load. In a *closed loop* a fixed number of conversations is open; each asks its next
question when the last answer is complete. In an *open loop* conversations begin at moments drawn
from a Poisson process, whether or not the server keeps up: only this shows what a queue does
(Schroeder, Wierman and Harchol-Balter, "Open Versus Closed: A Cautionary Tale", NSDI 2006).

Nothing is asked of any address but the given one, and every wait has a limit.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

#: Counters of vLLM's server that tell prefix reuse, by vLLM's own names.
PREFIX_COUNTERS = ("vllm:prefix_cache_queries", "vllm:prefix_cache_hits")


@dataclass(frozen=True)
class Target:
    """Where to ask.

    Attributes
    ----------
    url:
        Base address, such as ``http://127.0.0.1:8000/v1``.
    model:
        Name of the model, as the server knows it.
    key:
        Bearer token, or None.
    max_tokens:
        Longest answer, in tokens.
    limit_s:
        Seconds after which one answer is given up.
    """

    url: str
    model: str
    key: str | None = None
    max_tokens: int = 32
    limit_s: float = 60.0

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass
class Sample:
    """One answer as a client saw it; times in seconds.

    Attributes
    ----------
    conversation, turn:
        Which question it was.
    due_s:
        When it was due, from the start of the load.
    ttft_s:
        From the request to the first piece of text; None when there was none.
    itl_s:
        Gaps between pieces. A server may put several tokens into one piece.
    e2e_s:
        From the request to the end of the answer.
    output_tokens, prompt_tokens, cached_tokens:
        As the server's ``usage`` says; None when it does not.
    pieces:
        Pieces of text that came.
    hit:
        Whether a proxy says that it had the answer (``x-cache``); None where nobody says.
    error:
        One line, or None for a complete answer.
    """

    conversation: int
    turn: int
    due_s: float
    ttft_s: float | None = None
    itl_s: list[float] = field(default_factory=list)
    e2e_s: float = 0.0
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    pieces: int = 0
    hit: bool | None = None
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (E2E - TTFT) / (tokens - 1); None below two."""
        tokens = self.output_tokens or self.pieces
        if self.ttft_s is None or tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (tokens - 1)

    def as_dict(self) -> dict[str, Any]:
        """Every field as plain values, for a record."""
        return asdict(self)


async def ask(
    client: httpx.AsyncClient, target: Target, messages: Sequence[dict[str, str]], sample: Sample
) -> str:
    """Stream one answer and fill in its sample; returns the text, "" when it failed."""
    body = {
        "model": target.model,
        "messages": list(messages),
        "max_tokens": target.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = last = time.perf_counter()
    text, ended = [], False
    try:
        async with (
            asyncio.timeout(target.limit_s),
            client.stream(
                "POST", f"{target.url}/chat/completions", json=body, headers=target.headers
            ) as response,
        ):
            if "x-cache" in response.headers:
                sample.hit = response.headers["x-cache"] == "hit"
            if response.status_code != 200:
                await response.aread()
                sample.error = f"status {response.status_code}: {_one_line(response.text)}"
            else:
                async for line in response.aiter_lines():
                    if not line.startswith("data:"):
                        continue
                    data = line[5:].strip()
                    if data == "[DONE]":
                        ended = True
                        break
                    chunk = json.loads(data)
                    # Some servers end with a reason and no mark of their own.
                    ended |= any(c.get("finish_reason") for c in chunk.get("choices") or ())
                    piece = _piece(chunk, sample)
                    if piece:
                        now = time.perf_counter()
                        if sample.ttft_s is None:
                            sample.ttft_s = now - begin
                        else:
                            sample.itl_s.append(now - last)
                        last = now
                        sample.pieces += 1
                        text.append(piece)
                if not ended:
                    sample.error = "the stream ended before its end mark"
    except TimeoutError:
        sample.error = f"no complete answer within {target.limit_s:g} s"
    except UnicodeEncodeError:
        sample.error = "the key or the model has a character that no request may have"
    except httpx.HTTPError as error:
        sample.error = _one_line(f"{type(error).__name__}: {error}")
    except (ValueError, KeyError, TypeError, AttributeError):
        sample.error = "the stream is not one of chat completion chunks"
    sample.e2e_s = time.perf_counter() - begin
    return "" if sample.error else "".join(text)


def _piece(chunk: dict[str, Any], sample: Sample) -> str:
    """Text of a chunk; notes the usage that the last chunk carries."""
    if isinstance(chunk.get("error"), dict | str):
        raise ValueError("the server sent an error inside the stream")
    usage = chunk.get("usage")
    if usage:
        sample.output_tokens = _count(usage, "completion_tokens")
        sample.prompt_tokens = _count(usage, "prompt_tokens")
        sample.cached_tokens = _count(usage.get("prompt_tokens_details"), "cached_tokens")
    choices = chunk.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def _count(usage: Any, name: str) -> int | None:
    """A number of tokens, or None where a server says none or nonsense."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


async def _converse(
    client: httpx.AsyncClient,
    target: Target,
    number: int,
    questions: Sequence[str],
    begin: float,
    samples: list[Sample],
) -> None:
    """Ask the questions of one conversation, each with its whole history; stops at a failure."""
    history: list[dict[str, str]] = []
    for turn, question in enumerate(questions):
        history.append({"role": "user", "content": question})
        sample = Sample(number, turn, due_s=time.perf_counter() - begin)
        samples.append(sample)
        answer = await ask(client, target, history, sample)
        if sample.error:
            return
        history.append({"role": "assistant", "content": answer})


async def closed_loop(
    target: Target, conversations: Sequence[Sequence[str]], open_at_once: int
) -> tuple[list[Sample], float]:
    """Keep a number of conversations open until all are done.

    Parameters
    ----------
    target:
        Where to ask.
    conversations:
        Questions of each conversation.
    open_at_once:
        Conversations that are open at a time.

    Returns
    -------
    samples:
        One per question that was asked.
    wall_s:
        From the first request to the last answer.
    """
    waiting = list(enumerate(conversations))
    waiting.reverse()
    samples: list[Sample] = []
    begin = time.perf_counter()

    async def worker() -> None:
        while waiting:
            number, questions = waiting.pop()
            await _converse(client, target, number, questions, begin, samples)

    async with _client() as client:
        await asyncio.gather(*(worker() for _ in range(open_at_once)))
    return samples, time.perf_counter() - begin


async def open_loop(
    target: Target, conversations: Sequence[Sequence[str]], starts_s: Sequence[float]
) -> tuple[list[Sample], float]:
    """Begin each conversation at its moment, whether or not earlier ones are done.

    Parameters
    ----------
    target, conversations:
        As for :func:`closed_loop`.
    starts_s:
        Moment of each conversation's first question, from the start of the load.

    Returns
    -------
    As :func:`closed_loop`.
    """
    samples: list[Sample] = []
    begin = time.perf_counter()

    async def later(number: int, questions: Sequence[str], start_s: float) -> None:
        await asyncio.sleep(max(0.0, start_s - (time.perf_counter() - begin)))
        await _converse(client, target, number, questions, begin, samples)

    async with _client() as client:
        jobs = zip(range(len(conversations)), conversations, starts_s, strict=True)
        await asyncio.gather(*(later(*job) for job in jobs))
    return samples, time.perf_counter() - begin


def _client() -> httpx.AsyncClient:
    # The limit of a whole answer is kept by ask(); no environment variable sends it elsewhere.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
    return httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)


def prefix_counters(target: Target) -> dict[str, float]:
    """vLLM's counters of prefix reuse from the server's ``/metrics``; {} where it has none."""
    root = target.url.removesuffix("/").removesuffix("/v1")
    try:
        answer = httpx.get(f"{root}/metrics", timeout=5, trust_env=False)
    except httpx.HTTPError:
        return {}
    if answer.status_code != 200:
        return {}
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(answer.text):
            if family.name in PREFIX_COUNTERS:
                totals = [s.value for s in family.samples if not s.name.endswith("_created")]
                found[family.name] = sum(totals)
    except ValueError:
        return {}
    return found
