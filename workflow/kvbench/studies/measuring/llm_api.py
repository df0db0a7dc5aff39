"""What a caching proxy in front of an OpenAI-compatible server does to the time of a call."""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbench.caching import paraphrases as paraphrase_set
from kvbench.errors import Unsupported
from kvbench.studies import Context, Outcome
from kvbench.studies._estimates import summary
from kvbench.studies.measuring import _children as children
from kvbench.studies.measuring import _serving as serving


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Ask a real server, directly and through the proxy.

    The server is the one of ``OPENAI_BASE_URL`` if that is set, else ``transformers serve`` with
    the local model, on a free port of 127.0.0.1.
    """
    if importlib.util.find_spec("openai") is None:
        raise Unsupported("the openai client is not installed")
    log = context.scratch / "proxy.log"
    with (
        serving.upstream(factors, context) as server,
        # Both children load at the same time.
        children.child(
            _proxy_command(server.base_url, factors),
            log,
            children.environment(offline=factors["encoder_revision"] is None),
        ) as proxy,
    ):
        children.await_ready(
            proxy, log, lambda: _listening(log), factors["startup_timeout_s"], "proxy"
        )
        server.wait()
        address = re.search(r"listening on (\S+)", log.read_text())[1]
        samples = _ask(server, f"{address}/v1", factors)
    rows = [_row(name, found, server.kind) for name, found in samples.items()]
    alike = [sample for sample in samples["paraphrased"] if sample["cache"] == "hit"]
    if alike:
        rows.append(_row("paraphrased_hit", alike, server.kind))
    return Outcome(rows, samples)


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
    server: serving.Upstream, proxied: str, factors: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Return one sample per call: seconds, what the cache said, and whether the answer is right."""
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

    samples: dict[str, list[dict[str, Any]]] = {}
    try:
        with (
            openai.OpenAI(base_url=server.base_url, **shared) as direct,
            openai.OpenAI(base_url=proxied, **shared) as proxy,
        ):
            # The first answer of a server is slower than any later one; it is nobody's result.
            call(direct, "Warm up, please.")
            call(proxy, "Warm up, please.", **{"Cache-Control": "no-store"})
            for question in _questions(factors["prompts"]):
                text = question["canonical"]
                found = {"direct": [call(direct, text)], "first": [call(proxy, text)]}
                found["repeated"] = [call(proxy, text) for _ in range(factors["repeats"])]
                found["paraphrased"] = [call(proxy, question["paraphrase"])]
                found["near_miss"] = [call(proxy, question["near_miss"])]
                found["no_store"] = [call(proxy, text, **{"Cache-Control": "no-store"})]
                # Both forms are served from one entry; streams of their own need a namespace.
                apart = {"x-cache-namespace": "streams"}
                found["stream_first"] = [call(proxy, text, stream=True, **apart)]
                found["stream_repeated"] = [call(proxy, text, stream=True, **apart)]
                expected = found["direct"][0]["answer"]
                for name, calls in found.items():
                    judged = [_judged(name, sample, expected) for sample in calls]
                    samples.setdefault(name, []).extend(judged)
    except openai.OpenAIError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unsupported(f"the server does not answer a chat request: {reason}") from error
    return samples


def _judged(name: str, sample: dict[str, Any], expected: str) -> dict[str, Any]:
    """Replace the answer of a sample by whether it is right; ``expected`` is the direct one."""
    answer = sample.pop("answer")
    if name == "near_miss":
        right = sample["cache"] != "hit"
    elif name == "paraphrased":
        right = sample["cache"] != "hit" or answer == expected
    else:
        right = answer == expected
    return sample | {"right": right}


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


def _row(name: str, found: list[dict[str, Any]], server: str) -> dict[str, Any]:
    seconds = [sample["seconds"] for sample in found]
    return {
        "call": name,
        "server": server,
        "calls": len(found),
        "hits": sum(sample["cache"] == "hit" for sample in found),
        "semantic_hits": sum(sample["kind"] == "semantic" for sample in found),
        "right": sum(sample["right"] for sample in found),
        "min_s": min(seconds),
        "max_s": max(seconds),
        **summary(seconds, "call"),
    }
