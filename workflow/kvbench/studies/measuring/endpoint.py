"""How much load an OpenAI-compatible endpoint bears, seen from outside."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from kvbench import layout
from kvbench.engines import endpoint
from kvbench.errors import Unsupported
from kvbench.inputs import scenarios
from kvbench.studies import Context, Outcome
from kvbench.studies._estimates import quantile, summary
from kvbench.studies.measuring import _children as children
from kvbench.studies.measuring import _serving as serving

#: A load: its kind and its level.
Load = tuple[str, float]


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Put every load on one server, in rounds; each round draws the order of the loads anew."""
    loads: list[Load] = [("closed", level) for level in factors["open_conversations"]]
    loads += [("open", rate) for rate in factors["rates_per_s"]]
    # A line for every request would be written while the next answer is on the clock.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    generator = random.Random(context.seed)
    supply = _Conversations(factors["turns"], factors["repeated_share"], generator)
    found: dict[Load, list[dict[str, Any]]] = {load: [] for load in loads}
    with _server(factors, context) as target:
        _warm(target)
        for number in range(factors["rounds"]):
            order = generator.sample(loads, len(loads))
            for kind, level in order:
                talks = supply.take(factors["conversations"])
                found[(kind, level)].append(
                    {"round": number, **_put(target, kind, level, talks, generator)}
                )
    rows = [_row(factors, load, runs) for load, runs in found.items()]
    samples = {f"{kind}-{level:g}": runs for (kind, level), runs in found.items()}
    return Outcome(rows, samples)


def _put(
    target: endpoint.Target,
    kind: str,
    level: float,
    conversations: Sequence[Sequence[str]],
    generator: random.Random,
) -> dict[str, Any]:
    """Put one load on the server once."""
    before = endpoint.prefix_counters(target)
    if kind == "closed":
        samples, wall_s = asyncio.run(endpoint.closed_loop(target, conversations, int(level)))
    else:
        gaps = [generator.expovariate(level) for _ in conversations]
        starts = list(itertools.accumulate(gaps))
        samples, wall_s = asyncio.run(endpoint.open_loop(target, conversations, starts))
    after = endpoint.prefix_counters(target)
    counted = {name: after[name] - before[name] for name in before if name in after}
    return {
        "wall_s": wall_s,
        "counters": counted,
        "requests": [sample.as_dict() | {"tpot_s": sample.tpot_s} for sample in samples],
    }


def _row(factors: Mapping[str, Any], load: Load, runs: Sequence[Mapping[str, Any]]) -> dict:
    """One row of the table: all rounds of a load."""
    requests = [request for run in runs for request in run["requests"]]
    complete = [request for request in requests if request["error"] is None]
    wall_s = sum(run["wall_s"] for run in runs)
    good = [request for request in complete if _good(request, factors)]
    gaps = [gap for request in complete for gap in request["itl_s"]]
    prompt = [r["prompt_tokens"] for r in complete if r["prompt_tokens"] is not None]
    cached = [r["cached_tokens"] for r in complete if r["cached_tokens"] is not None]
    said = [r["hit"] for r in complete if r["hit"] is not None]
    tokens = sum(r["output_tokens"] or r["pieces"] for r in complete)
    share = len(good) / len(requests)
    return {
        "server": factors["server"],
        "load": load[0],
        "level": load[1],
        "requests": len(requests),
        "failed": len(requests) - len(complete),
        "rounds": len(runs),
        **summary([r["ttft_s"] for r in complete if r["ttft_s"] is not None], "ttft"),
        **summary([r["tpot_s"] for r in complete if r["tpot_s"] is not None], "tpot"),
        **summary([r["e2e_s"] for r in complete], "e2e"),
        "itl_p99_s": quantile(gaps, 0.99)[0],
        "output_tokens_per_s": tokens / wall_s,
        "requests_per_s": len(complete) / wall_s,
        "prompt_tokens": sum(prompt) if prompt else None,
        "cached_share": sum(cached) / sum(prompt) if cached and sum(prompt) else None,
        "hit_share": sum(said) / len(said) if said else None,
        "prefix_queries": _counted(runs, endpoint.PREFIX_COUNTERS[0]),
        "prefix_hits": _counted(runs, endpoint.PREFIX_COUNTERS[1]),
        "good_share": share,
        "good_per_s": len(good) / wall_s,
        "ttft_limit_s": factors["ttft_limit_s"],
        "tpot_limit_s": factors["tpot_limit_s"],
        "good_share_wanted": factors["good_share"],
        "borne": share >= factors["good_share"],
    }


def _good(request: Mapping[str, Any], factors: Mapping[str, Any]) -> bool:
    """Whether a complete answer kept both limits of the service level."""
    if request["ttft_s"] is None or request["ttft_s"] > factors["ttft_limit_s"]:
        return False
    return request["tpot_s"] is None or request["tpot_s"] <= factors["tpot_limit_s"]


def _counted(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    counts = [run["counters"][name] for run in runs if name in run["counters"]]
    return sum(counts) if counts else None


class _Conversations:
    """Questions of the shipped conversations, some asked again and the others made unlike any before.

    A server or proxy keeps what it was asked in earlier loads and rounds. If all of them asked the
    same, every load but the first would meet a warm cache, and which one is first is a lot.

    Parameters
    ----------
    turns:
        Questions of each conversation.
    repeated_share:
        Share of the conversations that are one of the same load, word for word.
    generator:
        Where the choice of the repeated ones comes from.
    """

    def __init__(self, turns: int, repeated_share: float, generator: random.Random) -> None:
        known = scenarios.load_all(layout.shipped("config") / "scenarios")
        questions = [
            [turn.user for turn in scenario.turns[:turns]]
            for _, scenario in sorted(known.items())
            if scenario.turns
        ]
        self._fresh = enumerate(itertools.cycle(questions), start=1)
        self._repeated_share, self._generator = repeated_share, generator

    def take(self, count: int) -> list[list[str]]:
        """The conversations of one load, the first of them always a new one."""
        repeats = min(round(count * self._repeated_share), count - 1)
        talks = []
        for _ in range(count - repeats):
            number, questions = next(self._fresh)
            # The number stands first: nothing of an earlier prompt is a prefix of this one.
            talks.append([f"Case {number}. {questions[0]}", *questions[1:]])
        again = [talks[self._generator.randrange(len(talks))] for _ in range(repeats)]
        return talks + again


def _warm(target: endpoint.Target) -> None:
    """Ask once: the first answer of a server is slower than any later one, and is nobody's result.

    Raises
    ------
    Unsupported
        The server does not answer a chat request; its reason.
    """
    samples, _ = asyncio.run(endpoint.closed_loop(target, [["Warm up, please."]], 1))
    if samples[0].error:
        raise Unsupported(f"the server does not answer a chat request: {samples[0].error}")


def _check_address(url: str) -> None:
    """Refuse what no client can reach, before a load is put on it.

    Raises
    ------
    Unsupported
        It is no address of a server that speaks HTTP.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise Unsupported(
            f"app.studies.endpoint.url: {url!r} is no address of a server; write it like "
            "http://127.0.0.1:8000/v1"
        )


@contextmanager
def _server(factors: Mapping[str, Any], context: Context) -> Iterator[endpoint.Target]:
    """The server that is asked; one that is started here stops with the block."""
    limits = {"max_tokens": factors["max_tokens"], "limit_s": factors["call_timeout_s"]}
    startup_s = factors["startup_timeout_s"]
    if factors["server"] == "configured":
        if not factors["url"] or not factors["model"]:
            raise Unsupported("no server is configured: set url and model in app.studies.endpoint")
        _check_address(factors["url"])
        key = os.environ.get(factors["key_variable"] or "")
        yield endpoint.Target(factors["url"].rstrip("/"), factors["model"], key, **limits)
        return
    ours = factors["server"] in ("proxy", "vllm_proxy")
    from_vllm = factors["server"].startswith("vllm")
    start = serving.vllm_serve if from_vllm else serving.transformers_serve
    with start(context, startup_s) as server:
        server.wait()
        target = endpoint.Target(server.base_url, server.model, server.key, **limits)
        if not ours:
            yield target
            return
        log = context.scratch / "proxy.log"
        command = [sys.executable, "-m", "kvbench.caching.proxy", "--upstream", server.base_url]
        command += ["--listen", "127.0.0.1:0", "--cache-length-limited"]
        with children.child(command, log, children.environment()) as proxy:
            children.await_ready(
                proxy, log, lambda: "listening on " in log.read_text(), startup_s, "proxy"
            )
            address = re.search(r"listening on (\S+)", log.read_text())[1]
            yield endpoint.Target(f"{address}/v1", server.model, server.key, **limits)
