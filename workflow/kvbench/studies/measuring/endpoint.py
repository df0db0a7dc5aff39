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
from contextlib import ExitStack, contextmanager
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
from kvbench.studies.measuring._rounds import Log, with_controls

#: A load: its kind and its level.
Load = tuple[str, float]

#: Servers behind a proxy: what it does is told by their times.
_REFERENCES = ("transformers_serve", "vllm_serve")


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Put every load on every server of one engine, in rounds, in an order drawn anew for each.

    A load is put on all servers before the next one, with the same questions and the same pauses;
    on the one behind a proxy twice, as the control.
    """
    loads: list[Load] = [("closed", level) for level in factors["open_conversations"]]
    loads += [("open", rate) for rate in factors["rates_per_s"]]
    # A line for every request would be written while the next answer is on the clock.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    generator = random.Random(context.seed)
    servers = list(factors["servers"])
    # One server alone is compared with nothing.
    arms = with_controls(servers, *(_REFERENCES if len(servers) > 1 else ()))
    supply = _Conversations(
        factors["turns"], factors["repeated_share"], generator, copies=len(arms)
    )
    schedule = [
        load for _ in range(factors["rounds"]) for load in generator.sample(loads, len(loads))
    ]
    log = Log(context.known)
    with _targets(factors, context) as targets:
        for target in targets.values():
            _warm(target)
        current, talks, starts_s = -1, {}, []
        for place, server in log.turns(arms, len(schedule), context.seed):
            load = schedule[place]
            if place != current:
                current = place
                talks = dict(zip(arms, supply.take(factors["conversations"]), strict=True))
                starts_s = _starts(load, factors["conversations"], generator)
            run = _put(targets[arms[server]], load, talks[server], starts_s)
            log.add(_arm(server, load), place // len(loads), **_means(run), **run)
    taken = log.arms()
    rows = [
        _row(server, factors, load, _runs(taken[_arm(server, load)]))
        for load in loads
        for server in servers
    ]
    return Outcome(rows, {"arms": taken})


def _arm(server: str, load: Load) -> str:
    return f"{server}-{load[0]}-{load[1]:g}"


def _starts(load: Load, count: int, generator: random.Random) -> list[float]:
    """Moments at which the conversations of an open loop begin (s); of a closed one none."""
    kind, level = load
    gaps = [generator.expovariate(level) for _ in range(count if kind == "open" else 0)]
    return list(itertools.accumulate(gaps))


def _means(run: Mapping[str, Any]) -> dict[str, float | None]:
    """Mean times over the complete answers of one turn; None where there is none."""
    complete = [request for request in run["requests"] if request["error"] is None]
    means: dict[str, float | None] = {}
    for name in ("ttft", "tpot", "e2e"):
        known = [r[f"{name}_s"] for r in complete if r[f"{name}_s"] is not None]
        means[f"{name}_mean_s"] = sum(known) / len(known) if known else None
    return means


def _runs(arm: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The turns of an arm, one by one."""
    return [dict(zip(arm, turn, strict=True)) for turn in zip(*arm.values(), strict=True)]


def _put(
    target: endpoint.Target,
    load: Load,
    conversations: Sequence[Sequence[str]],
    starts_s: Sequence[float],
) -> dict[str, Any]:
    """Put one load on the server once."""
    before = endpoint.prefix_counters(target)
    kind, level = load
    if kind == "closed":
        samples, wall_s = asyncio.run(endpoint.closed_loop(target, conversations, int(level)))
    else:
        samples, wall_s = asyncio.run(endpoint.open_loop(target, conversations, starts_s))
    after = endpoint.prefix_counters(target)
    counted = {name: after[name] - before[name] for name in before if name in after}
    return {
        "wall_s": wall_s,
        "counters": counted,
        "requests": [sample.as_dict() | {"tpot_s": sample.tpot_s} for sample in samples],
    }


def _row(
    server: str, factors: Mapping[str, Any], load: Load, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One row of the table: all rounds of a load on one server."""
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
        "server": server,
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
    copies:
        How many servers get the same questions. Each has numbers of its own, so that none finds warm
        what a server before it or behind it was asked.
    """

    def __init__(
        self, turns: int, repeated_share: float, generator: random.Random, copies: int = 1
    ) -> None:
        known = scenarios.load_all(layout.shipped("config") / "scenarios")
        questions = [
            [turn.user for turn in scenario.turns[:turns]]
            for _, scenario in sorted(known.items())
            if scenario.turns
        ]
        self._fresh = enumerate(itertools.cycle(questions), start=1)
        self._repeated_share, self._generator = repeated_share, generator
        self._copies = copies

    def take(self, count: int) -> list[list[list[str]]]:
        """The conversations of one load for each of the copies, the first always a new one."""
        repeats = min(round(count * self._repeated_share), count - 1)
        fresh = [next(self._fresh) for _ in range(count - repeats)]
        order = [
            *range(len(fresh)),
            *(self._generator.randrange(len(fresh)) for _ in range(repeats)),
        ]
        copies = []
        for copy in range(self._copies):
            # The number stands first: nothing of an earlier prompt is a prefix of this one.
            talks = [
                [f"Case {number * self._copies - copy}. {questions[0]}", *questions[1:]]
                for number, questions in fresh
            ]
            copies.append([talks[place] for place in order])
        return copies


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
def _targets(factors: Mapping[str, Any], context: Context) -> Iterator[dict[str, endpoint.Target]]:
    """The servers that are asked, all alive; what is started here stops with the block."""
    limits = {"max_tokens": factors["max_tokens"], "limit_s": factors["call_timeout_s"]}
    startup_s = factors["startup_timeout_s"]
    if "configured" in factors["servers"]:
        if not factors["url"] or not factors["model"]:
            raise Unsupported("no server is configured: set url and model in app.studies.endpoint")
        _check_address(factors["url"])
        key = os.environ.get(factors["key_variable"] or "")
        target = endpoint.Target(factors["url"].rstrip("/"), factors["model"], key, **limits)
        yield {"configured": target}
        return
    from_vllm = any(server.startswith("vllm") for server in factors["servers"])
    start = serving.vllm_serve if from_vllm else serving.transformers_serve
    with ExitStack() as held:
        server = held.enter_context(start(context, startup_s))
        server.wait()
        targets = {}
        for name in factors["servers"]:
            url = server.base_url
            if name in ("proxy", "vllm_proxy"):
                url = held.enter_context(_proxy(url, context, startup_s))
            targets[name] = endpoint.Target(url, server.model, server.key, **limits)
        yield targets


@contextmanager
def _proxy(upstream_url: str, context: Context, startup_s: float) -> Iterator[str]:
    """Start our proxy in front of a server; give its address."""
    log = context.scratch / "proxy.log"
    command = [sys.executable, "-m", "kvbench.caching.proxy", "--upstream", upstream_url]
    command += ["--listen", "127.0.0.1:0", "--cache-length-limited"]
    with children.child(command, log, children.environment()) as proxy:
        children.await_ready(
            proxy, log, lambda: "listening on " in log.read_text(), startup_s, "proxy"
        )
        address = re.search(r"listening on (\S+)", log.read_text())[1]
        yield f"{address}/v1"
