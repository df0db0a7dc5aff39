"""What a caching proxy in front of an OpenAI-compatible server does to the time of a call."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvbench.caching import paraphrases as paraphrase_set
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome, control_of
from kvbench.studies._estimates import summary
from kvbench.studies.measuring import _children as children
from kvbench.studies.measuring import _serving as serving
from kvbench.studies.measuring._rounds import Log

#: Calls and what they took, in the order in which they were made.
Calls = Iterator[tuple[str, dict[str, Any]]]


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Ask a real server, directly and through the proxy.

    The server is the one of ``OPENAI_BASE_URL`` if that is set, else ``transformers serve`` with
    the local model, on a free port of 127.0.0.1.
    """
    if importlib.util.find_spec("openai") is None:
        raise Unsupported("the openai client is not installed")
    spoken = context.scratch / "proxy.log"
    with (
        serving.upstream(factors, context) as server,
        # Both children load at the same time.
        children.child(
            _proxy_command(server.base_url, factors),
            spoken,
            children.environment(offline=factors["encoder_revision"] is None),
        ) as proxy,
    ):
        children.await_ready(
            proxy, spoken, lambda: _listening(spoken), factors["startup_timeout_s"], "proxy"
        )
        server.wait()
        address = re.search(r"listening on (\S+)", spoken.read_text())[1]
        arms = _ask(server, f"{address}/v1", factors, context)
    controls = {control_of(name) for name in arms}
    rows = [_row(name, taken, server.kind) for name, taken in arms.items() if name not in controls]
    return Outcome(rows, {"arms": arms})


def _proxy_command(upstream: str, factors: Mapping[str, Any]) -> list[str]:
    command = [sys.executable, "-m", "kvbench.caching.proxy", "--upstream", upstream]
    command += ["--listen", "127.0.0.1:0", "--threshold", str(factors["threshold"])]
    command += ["--total-timeout", str(factors["call_timeout_s"])]
    # The length is part of the key, and answers of the local model end at it.
    command += ["--cache-length-limited", "--encoder", factors["encoder"]]
    if factors["encoder_revision"]:
        command += ["--encoder-revision", factors["encoder_revision"]]
    return command


def _listening(log: Path) -> bool:
    return log.exists() and "listening on " in log.read_text(errors="replace")


def _ask(
    server: serving.Upstream, proxied: str, factors: Mapping[str, Any], context: Context
) -> dict[str, dict[str, list]]:
    """Ask every question in every way: a question is a round, whose ways come in an order drawn anew.

    What is stored comes before what is served from it; otherwise any way may come first.
    """
    import openai

    shared = {"api_key": server.key, "max_retries": 0, "timeout": factors["call_timeout_s"]}

    def call(client: openai.OpenAI, text: str, stream: bool = False, **headers: str) -> dict:
        started = time.perf_counter()
        response = client.chat.completions.with_raw_response.create(
            model=server.model,
            messages=[{"role": "user", "content": text}],
            temperature=0,
            max_tokens=factors["max_tokens"],
            extra_headers=headers,
            **({"stream": True} if stream else {}),
        )
        if stream:
            choices = (choice for chunk in response.parse() for choice in chunk.choices)
            answer = "".join(choice.delta.content or "" for choice in choices)
        else:
            answer = response.parse().choices[0].message.content
        return {
            "seconds": time.perf_counter() - started,
            "cache": response.headers.get("x-cache", ""),
            "kind": response.headers.get("x-cache-kind", ""),
            "answer": answer,
        }

    log = Log(context.known)
    questions = _questions(factors["prompts"])
    try:
        with (
            openai.OpenAI(base_url=server.base_url, **shared) as direct,
            openai.OpenAI(base_url=proxied, **shared) as proxy,
        ):
            # The first answer of a server is slower than any later one; it is nobody's result.
            call(direct, "Warm up, please.")
            call(proxy, "Warm up, please.", **{"Cache-Control": "no-store"})

            def own(question: dict[str, str]) -> Calls:
                # A first call again, where nothing of the others is stored.
                apart = {"x-cache-namespace": "control"}
                yield control_of("first"), call(proxy, question["canonical"], **apart)

            def own_stream(question: dict[str, str]) -> Calls:
                apart = {"x-cache-namespace": "control-streams"}
                text = question["canonical"]
                yield control_of("stream_first"), call(proxy, text, stream=True, **apart)

            def alone_again(question: dict[str, str]) -> Calls:
                yield control_of("direct"), call(direct, question["canonical"])

            def cached(question: dict[str, str]) -> Calls:
                text = question["canonical"]
                yield "first", call(proxy, text)
                for _ in range(factors["repeats"]):
                    yield "repeated", call(proxy, text)
                yield "paraphrased", call(proxy, question["paraphrase"])
                yield "near_miss", call(proxy, question["near_miss"])

            def streamed(question: dict[str, str]) -> Calls:
                # Both forms are served from one entry; streams of their own need a namespace.
                apart = {"x-cache-namespace": "streams"}
                for name in ("stream_first", "stream_repeated"):
                    yield name, call(proxy, question["canonical"], stream=True, **apart)

            def alone(question: dict[str, str]) -> Calls:
                yield "direct", call(direct, question["canonical"])

            def unstored(question: dict[str, str]) -> Calls:
                headers = {"Cache-Control": "no-store"}
                yield "no_store", call(proxy, question["canonical"], **headers)

            ways = {"direct": alone, "cached": cached, "no_store": unstored, "streamed": streamed}
            ways |= {"again": alone_again, "first_again": own, "stream_again": own_stream}
            for number, way in log.turns(list(ways), len(questions), context.seed):
                for name, sample in ways[way](questions[number]):
                    log.add(name, number, **sample)
    except openai.OpenAIError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unsupported(f"the server does not answer a chat request: {reason}") from error
    return _judged(log.arms())


def _judged(arms: Mapping[str, Mapping[str, list]]) -> dict[str, dict[str, list]]:
    """Put in place of every answer whether it is right: the direct one to its question says so."""
    direct = arms["direct"]
    expected = dict(zip(direct["round"], direct["answer"], strict=True))
    judged = {}
    for name, arm in arms.items():
        turn = zip(arm["round"], arm["cache"], arm["answer"], strict=True)
        right = [_right(name, cache, answer, expected[n]) for n, cache, answer in turn]
        judged[name] = {key: held for key, held in arm.items() if key != "answer"}
        judged[name]["right"] = right
    return judged


def _right(name: str, cache: str, answer: str, expected: str) -> bool:
    if name == "near_miss":
        return cache != "hit"
    return answer == expected or (name == "paraphrased" and cache != "hit")


def _questions(count: int) -> list[dict[str, str]]:
    """Return canonical question, syntactic paraphrase and first near miss of ``count`` intents."""
    texts = paraphrase_set.load()
    paraphrases = {t.intent: t.text for t in texts.select("paraphrase") if t.form == "syntactic"}
    near = {t.intent: t.text for t in reversed(texts.select("near_miss"))}
    chosen = [
        {"canonical": t.text, "paraphrase": paraphrases[t.intent], "near_miss": near[t.intent]}
        for t in texts.select("canonical", "report")
        if t.intent in paraphrases and t.intent in near
    ]
    # From all domains rather than from the first ones in the file.
    step = max(1, len(chosen) // count)
    return chosen[::step][:count]


def _row(name: str, turns_taken: Mapping[str, list], server: str) -> dict[str, Any]:
    seconds = turns_taken["seconds"]
    return {
        "call": name,
        "server": server,
        "calls": len(seconds),
        "hits": turns_taken["cache"].count("hit"),
        "semantic_hits": turns_taken["kind"].count("semantic"),
        "right": turns_taken["right"].count(True),
        "min_s": min(seconds),
        "max_s": max(seconds),
        **summary(seconds, "call"),
    }
