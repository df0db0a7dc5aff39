"""What an exact response cache saves, what its key must contain, and what it does to sampling."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching.keys import FIELDS, Request, digest, request_key
from kvbench.caching.response_cache import (
    Answer,
    Backend,
    MemoryBackend,
    RedisBackend,
    ResponseCache,
    SQLiteBackend,
)
from kvbench.caching.server import running
from kvbench.caching.workload import zipf
from kvbench.errors import Unsupported
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study
from kvbench.studies._latency import first, milliseconds, number, summary, summary_columns

if TYPE_CHECKING:
    import pandas as pd

BACKENDS = ("none", "memory", "sqlite", "server_unix", "server_tcp")
POLICIES = ("off", "skip", "seed", "pool", "freeze")

#: Requests of the run without a cache: each takes the service time, and nothing else varies.
_UNCACHED_REQUESTS = 100
_PROMPT_TOKENS = 64
_COMPLETION_TOKENS = 150

_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "backends": {
            "description": "Where answers are stored; none is the run without a cache.",
            "type": "array",
            "items": {"enum": list(BACKENDS)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(BACKENDS),
        },
        "exponents": {
            "description": "Zipf exponents of the popularity of requests; 0 is uniform.",
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 3},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0, 0.9],
        },
        "value_kib": {
            "description": "Sizes of an answer's text, in KiB.",
            "type": "array",
            "items": {"type": "number", "minimum": 0.0625, "maximum": 1024},
            "minItems": 1,
            "uniqueItems": True,
            "default": [2],
        },
        "requests": {
            "description": "Requests of one stream.",
            "type": "integer",
            "minimum": 50,
            "default": 1000,
        },
        "keys": {
            "description": "Different requests that a stream draws from.",
            "type": "integer",
            "minimum": 2,
            "default": 200,
        },
        "service_ms": {
            "description": "Fixed service time of the source of answers, in ms; not a model.",
            "type": "number",
            "minimum": 0.1,
            "maximum": 10000,
            "default": 5,
        },
        "key_prompts": {
            "description": "Prompts of the test of key fields, each asked in every variant.",
            "type": "integer",
            "minimum": 1,
            "default": 25,
        },
        "key_repeats": {
            "description": "How often each request of the test of key fields is asked.",
            "type": "integer",
            "minimum": 2,
            "default": 2,
        },
        "sampling_prompts": {
            "description": "Prompts of the test of sampling.",
            "type": "integer",
            "minimum": 1,
            "default": 10,
        },
        "sampling_repeats": {
            "description": "How often each prompt of the test of sampling is asked.",
            "type": "integer",
            "minimum": 2,
            "default": 20,
        },
        "temperatures": {
            "description": "Temperatures of the test of sampling.",
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 5},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0, 0.7, 1],
        },
        "pool": {
            "description": "Draws kept per prompt by the policy pool.",
            "type": "integer",
            "minimum": 2,
            "default": 5,
        },
        "usd_per_million_tokens": {
            "description": "Price by which saved tokens become saved money; scales linearly.",
            "type": "number",
            "exclusiveMinimum": 0,
            "default": 1,
        },
    },
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell per backend, and one untimed cell each for the key and for sampling."""
    shared = ("exponents", "value_kib", "requests", "keys", "service_ms", "usd_per_million_tokens")
    cells = {
        f"latency-{backend}": Cell(
            {"kind": "latency", "backend": backend, **{name: options[name] for name in shared}}
        )
        for backend in options["backends"]
    }
    cells["key"] = Cell(
        {"kind": "key", "prompts": options["key_prompts"], "repeats": options["key_repeats"]},
        timed=False,
    )
    cells["sampling"] = Cell(
        {
            "kind": "sampling",
            "prompts": options["sampling_prompts"],
            "repeats": options["sampling_repeats"],
            "temperatures": options["temperatures"],
            "pool": options["pool"],
        },
        timed=False,
    )
    return cells


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run one cell; see :func:`plan`."""
    if factors["kind"] == "key":
        return Outcome(_measure_key(factors, context.seed))
    if factors["kind"] == "sampling":
        return Outcome(_measure_sampling(factors, context.seed))
    backend = factors["backend"]
    if backend == "none":
        return _measure_latency(factors, context, None)
    if backend == "memory":
        return _measure_latency(factors, context, lambda _: MemoryBackend(factors["keys"]))
    if backend == "sqlite":
        return _measure_latency(
            factors, context, lambda name: SQLiteBackend(context.scratch / f"{name}.sqlite")
        )
    transport = backend.removeprefix("server_")
    with running(context.server_url, context.scratch, tcp=transport == "tcp") as server:
        if server.transport != transport:
            raise Unsupported(f"the configured server is reached over {server.transport}")
        return _measure_latency(
            factors,
            context,
            lambda name: RedisBackend(server.client(), f"{server.namespace}{name}:"),
        )


def _measure_latency(
    factors: Mapping[str, Any], context: Context, backend: Callable[[str], Backend] | None
) -> Outcome:
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    for exponent in factors["exponents"]:
        stream = zipf(factors["requests"], factors["keys"], context.seed, exponent)
        for value_kib in factors["value_kib"]:
            name = f"a{exponent}-{value_kib}kib"
            row, samples[name] = _one_stream(
                factors,
                stream if backend is not None else stream[:_UNCACHED_REQUESTS],
                value_kib,
                None if backend is None else backend(name),
            )
            rows.append({"exponent": exponent, "value_kib": value_kib, **row})
    return Outcome(
        [{"kind": "latency", "backend": factors["backend"], **row} for row in rows], samples
    )


def _one_stream(
    factors: Mapping[str, Any], stream: np.ndarray, value_kib: float, backend: Backend | None
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Send a stream through a cache (or straight to the source) and take the times apart."""
    service_s = factors["service_ms"] / 1000
    served_s: list[float] = []
    length = round(value_kib * 1024)
    texts = [(f"answer {key} " * (length // 8 + 1))[:length] for key in range(factors["keys"])]
    requests = [_request(key) for key in range(factors["keys"])]
    position = {request.prompt: key for key, request in enumerate(requests)}

    def source(request: Request) -> Answer:
        started = time.perf_counter()
        time.sleep(service_s)
        served_s.append(time.perf_counter() - started)
        return Answer(
            texts[position[request.prompt]],
            prompt_tokens=_PROMPT_TOKENS,
            completion_tokens=_COMPLETION_TOKENS,
        )

    cache = None if backend is None else ResponseCache(backend)
    hit_s: list[float] = []
    miss_s: list[float] = []
    overhead_s: list[float] = []
    wrong = 0
    for key in stream:
        request = requests[key]
        started = time.perf_counter()
        if cache is None:
            answer, hit = source(request), False
        else:
            reply = cache.answer(request, source)
            answer, hit = reply.answer, reply.hit
        took_s = time.perf_counter() - started
        wrong += answer.text != texts[key]
        if hit:
            hit_s.append(took_s)
        else:
            miss_s.append(took_s)
            overhead_s.append(took_s - served_s[-1])

    count = len(stream)
    unique = len(np.unique(stream))
    row: dict[str, Any] = {
        "requests": count,
        "unique_requests": unique,
        "hits": len(hit_s),
        "hit_ratio": len(hit_s) / count,
        "hit_ratio_limit": 1 - unique / count if cache is not None else 0.0,
        "wrong_answers": wrong,
        "service_s": float(np.mean(served_s)),
        "mean_s": float(np.mean([*hit_s, *miss_s])),
        **summary(hit_s, "hit"),
        **summary(miss_s, "miss"),
    }
    shares = [(len(part) / count, part) for part in (hit_s, miss_s) if part]
    row["mean_predicted_s"] = sum(share * float(np.median(part)) for share, part in shares)
    row["speedup"] = row["service_s"] / row["mean_s"]
    row["speedup_limit"] = count / len(miss_s)
    if cache is not None:
        overhead = float(np.median(overhead_s))
        row["miss_overhead_s"] = overhead
        if hit_s:
            saved = row["service_s"] + overhead - row["hit_p50_s"]
            # Below zero: a hit is slower than the source, and no hit ratio pays.
            row["break_even_hit_ratio"] = overhead / saved if saved > 0 else math.inf
        entries, size = backend.footprint()
        row["bytes_per_entry"] = size / entries
        stats = cache.stats
        row["tokens_saved"] = stats.prompt_tokens_saved + stats.completion_tokens_saved
        row["usd_saved"] = row["tokens_saved"] / 1e6 * factors["usd_per_million_tokens"]
        backend.close()
    return row, {"hit_s": hit_s, "miss_s": miss_s, "service_s": served_s}


def _request(key: int) -> Request:
    """A request of realistic shape; what varies is the question."""
    return Request(
        model="fixed-service-time",
        revision="1",
        prompt=f"What does paragraph {key} of the contract say about notice periods?",
        system="You answer questions about contracts in one paragraph.",
        parameters={"temperature": 0, "max_tokens": _COMPLETION_TOKENS},
        versions={"template": "1"},
    )


#: For each field of the key, a second value that changes the right answer.
_VARIANTS: dict[str, Any] = {
    "model": "other-model",
    "revision": "2",
    "system": "You answer questions about contracts in one word.",
    "history": [{"role": "user", "content": "We speak about the second contract."}],
    "tools": [{"type": "function", "function": {"name": "lookup"}}],
    "parameters": {"temperature": 0, "max_tokens": 1},
    "versions": {"template": "2"},
    "namespace": "another tenant",
}


def _measure_key(factors: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    """Ask every prompt in every variant, under keys that leave something out or add something.

    The right answer is a function of the whole request, so an answer is wrong if and only if it
    was given to a different request.
    """
    asked = [
        variant
        for number in range(factors["prompts"])
        for variant in (
            _request(number),
            *(replace(_request(number), **{name: value}) for name, value in _VARIANTS.items()),
        )
    ] * factors["repeats"]
    random.Random(seed).shuffle(asked)
    everything = frozenset(FIELDS)
    definitions: dict[str, Callable[[int, Request], str]] = {
        "every field": lambda _, request: request_key(request),
        "prompt only": lambda _, request: request_key(request, {"prompt"}),
        **{
            f"without {name}": lambda _, request, name=name: request_key(
                request, everything - {name}
            )
            for name in _VARIANTS
        },
        "with timestamp": lambda number, request: digest([request_key(request), number]),
        "with user": lambda number, request: digest([request_key(request), f"user {number % 10}"]),
    }
    unique = len({request_key(request) for request in asked})
    rows = []
    for definition, key_of in definitions.items():
        stored: dict[str, str] = {}
        hits = wrong = 0
        for position, request in enumerate(asked):
            right = request_key(request)
            key = key_of(position, request)
            if key in stored:
                hits += 1
                wrong += stored[key] != right
            else:
                stored[key] = right
        rows.append(
            {
                "kind": "key",
                "key_fields": definition,
                "requests": len(asked),
                "unique_requests": unique,
                "hits": hits,
                "hit_ratio": hits / len(asked),
                "hit_ratio_limit": 1 - unique / len(asked),
                "wrong_answers": wrong,
                "hits_lost": max(0, len(asked) - unique - hits),
            }
        )
    return rows


class SeededSampler:
    """A source of sampled answers that is no model: draws from a fixed softmax over eight texts.

    At temperature 0 it returns the likeliest; a request that carries a seed gets the draw of that
    seed, any other the next draw of the sampler's own generator.
    """

    CHOICES = 8

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._random = random.Random(seed)
        self.calls = 0

    def __call__(self, request: Request) -> Answer:
        """Return a draw."""
        self.calls += 1
        scores = random.Random(f"{self._seed}/{request.prompt}")
        logits = np.array([scores.gauss(0, 1) for _ in range(self.CHOICES)])
        temperature = request.parameters["temperature"]
        if temperature == 0:
            choice = int(np.argmax(logits))
        else:
            seed = request.parameters.get("seed")
            dice = self._random if seed is None else random.Random(f"{seed}/{request.prompt}")
            weights = np.exp((logits - logits.max()) / temperature)
            choice = dice.choices(range(self.CHOICES), weights=weights)[0]
        return Answer(f"{request.prompt} answer {choice}")


def _measure_sampling(factors: Mapping[str, Any], seed: int) -> list[dict[str, Any]]:
    rows = []
    for temperature in factors["temperatures"]:
        for policy in POLICIES:
            sampler = SeededSampler(seed)
            cache = _sampling_cache(policy, factors["pool"], seed)
            distinct: list[int] = []
            entropy: list[float] = []
            matches = hits = 0
            for prompt in range(factors["prompts"]):
                texts = []
                for repeat in range(factors["repeats"]):
                    parameters: dict[str, Any] = {"temperature": temperature}
                    if policy == "seed":
                        parameters["seed"] = repeat % factors["pool"]
                    request = Request("seeded-sampler", f"prompt {prompt}", parameters=parameters)
                    if cache is None:
                        text, hit = sampler(request).text, False
                    else:
                        reply = cache.answer(request, sampler)
                        text, hit = reply.answer.text, reply.hit
                    texts.append(text)
                    hits += hit
                    # What the source says without a cache is only one thing if it is not random.
                    if temperature == 0 or policy == "seed":
                        matches += text == SeededSampler(seed)(request).text
                shares = np.unique(texts, return_counts=True)[1] / len(texts)
                distinct.append(len(shares))
                entropy.append(float(-(shares * np.log2(shares)).sum()) + 0.0)
            asked = factors["prompts"] * factors["repeats"]
            rows.append(
                {
                    "kind": "sampling",
                    "policy": policy,
                    "temperature": temperature,
                    "requests": asked,
                    "hits": hits,
                    "hit_ratio": hits / asked,
                    "generations": sampler.calls,
                    "distinct_answers": float(np.mean(distinct)),
                    "entropy_bits": float(np.mean(entropy)),
                    "same_as_uncached": (
                        matches / asked if temperature == 0 or policy == "seed" else math.nan
                    ),
                }
            )
    return rows


def _sampling_cache(policy: str, pool: int, seed: int) -> ResponseCache | None:
    if policy == "off":
        return None
    return ResponseCache(
        MemoryBackend(10_000),
        sampled="freeze" if policy == "pool" else policy,
        draws=pool if policy == "pool" else 1,
        seed=seed,
    )


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return latencies per backend, the break-even, and the counts of wrong answers."""
    named: dict[str, Value] = {}
    latency = table[table["kind"] == "latency"]
    cached = latency[latency["backend"] != "none"]
    for backend in BACKENDS[1:]:
        rows = cached[(cached["backend"] == backend) & (cached["hits"] > 0)]
        prefix = f"response_cache_{backend}"
        # The hardest stream for a latency bound is the one whose tail is slowest.
        worst = None if rows.empty else rows.loc[rows["hit_p99_s"].idxmax()]
        typical = None if rows.empty else rows.sort_values(["value_kib", "exponent"]).iloc[-1]
        named[f"{prefix}_hit_p50_ms"] = milliseconds(typical, "hit_p50_s")
        named[f"{prefix}_hit_p99_ms"] = milliseconds(worst, "hit_p99_s")
        named[f"{prefix}_miss_overhead_ms"] = number(typical, "miss_overhead_s", "ms", 3, 1000)
        named[f"{prefix}_break_even"] = number(
            None if rows.empty else rows.loc[rows["break_even_hit_ratio"].idxmax()],
            "break_even_hit_ratio",
            "%",
            2,
            100,
        )
        named[f"{prefix}_bytes_per_entry"] = number(typical, "bytes_per_entry", "B", 0)
        named[f"{prefix}_speedup"] = number(typical, "speedup", "x", 1)
    hits = cached[cached["hits"] > 0]
    slowest = None if hits.empty else hits.loc[hits["hit_p99_s"].idxmax()]
    dearest = None if hits.empty else hits.loc[hits["break_even_hit_ratio"].idxmax()]
    named["response_cache_hit_p99_worst_ms"] = milliseconds(slowest, "hit_p99_s")
    named["response_cache_hit_slowest_backend"] = Value(
        None if slowest is None else slowest["backend"]
    )
    named["response_cache_break_even_worst"] = number(dearest, "break_even_hit_ratio", "%", 2, 100)
    named["response_cache_speedup_at_30"] = Value(
        None if hits.empty else float(min(_speedup_at(row, 0.3) for _, row in hits.iterrows())),
        unit="x",
        digits=2,
    )
    best = None if hits.empty else hits.loc[hits["hit_ratio"].idxmax()]
    named["response_cache_hit_ratio_best"] = number(best, "hit_ratio", "%", 1, 100)
    named["response_cache_exponent_best"] = number(best, "exponent", "", 1)
    named["response_cache_tokens_saved_best"] = number(best, "tokens_saved", "", 0)
    named["response_cache_usd_saved_best"] = number(best, "usd_saved", "USD", 3)
    named["response_cache_requests"] = number(best, "requests", "", 0)
    named["response_cache_service_ms"] = number(best, "service_s", "ms", 2, 1000)
    named["response_cache_wrong_answers"] = Value(
        None if cached.empty else int(cached["wrong_answers"].sum()), digits=0
    )
    named["response_cache_mean_prediction_error"] = Value(
        None
        if cached.empty
        else float((cached["mean_predicted_s"] / cached["mean_s"] - 1).abs().max() * 100),
        unit="%",
        digits=1,
    )

    keys = table[table["kind"] == "key"]
    for definition in ("every field", "prompt only", "with timestamp", "with user"):
        row = first(keys[keys["key_fields"] == definition])
        name = f"response_cache_key_{definition.replace(' ', '_')}"
        named[f"{name}_wrong"] = number(row, "wrong_answers", "", 0)
        named[f"{name}_hits_lost"] = number(row, "hits_lost", "", 0)
    omitted = keys[keys["key_fields"].astype(str).str.startswith("without ")]
    named["response_cache_key_requests"] = number(first(keys), "requests", "", 0)
    for name, pick in (("min", "min"), ("max", "max")):
        named[f"response_cache_key_one_field_wrong_{name}"] = Value(
            None if omitted.empty else int(getattr(omitted["wrong_answers"], pick)()), digits=0
        )

    sampling = table[table["kind"] == "sampling"]
    warm = sampling[sampling["temperature"] > 0]
    top = warm[warm["temperature"] == warm["temperature"].max()] if len(warm) else warm
    named["response_cache_sampling_temperature"] = number(first(top), "temperature", "", 1)
    for policy in POLICIES:
        row = first(top[top["policy"] == policy])
        named[f"response_cache_sampling_{policy}_distinct"] = number(row, "distinct_answers", "", 1)
        named[f"response_cache_sampling_{policy}_hit_ratio"] = number(row, "hit_ratio", "%", 0, 100)
    greedy = sampling[sampling["temperature"] == 0]
    named["response_cache_greedy_same"] = Value(
        None if greedy.empty else float(greedy["same_as_uncached"].min() * 100), unit="%", digits=0
    )
    return named


def _speedup_at(row: Any, hit_ratio: float) -> float:
    """Mean without a cache over mean with one, at another hit ratio than the measured one."""
    miss_s = row["service_s"] + row["miss_overhead_s"]
    return row["service_s"] / (hit_ratio * row["hit_p50_s"] + (1 - hit_ratio) * miss_s)


STUDY = Study(
    name="response_cache",
    question="What does an exact response cache save, and what must its key contain?",
    options=_OPTIONS,
    plan=plan,
    measure=measure,
    columns={
        "kind": "latency (a stream through a backend), key (fields of the key) or sampling",
        "backend": "where answers are stored; none: no cache",
        "exponent": "Zipf exponent of the requests' popularity",
        "value_kib": "size of an answer's text (KiB)",
        "key_fields": "which fields of a request make its key",
        "policy": "what is done with sampled answers; off: no cache",
        "temperature": "sampling temperature",
        "requests": "requests sent",
        "unique_requests": "different requests among them",
        "hits": "requests answered from the cache",
        "hit_ratio": "hits per request",
        "hit_ratio_limit": "1 - unique/requests: no exact cache that starts empty can do better",
        "wrong_answers": "answers that belong to a different request",
        "hits_lost": "hits that the full key has and this one has not",
        "service_s": "mean measured service time of the source (s)",
        "mean_s": "mean time of a request (s)",
        "mean_predicted_s": "sum of share times median over hits and misses (s)",
        "speedup": "service time over mean time of a request",
        "speedup_limit": "requests per miss, 1/(1 - hit ratio): a hit that costs nothing",
        **summary_columns("hit", "time of a hit, key computation and check included"),
        **summary_columns("miss", "time of a miss, service time included"),
        "miss_overhead_s": "median time of a miss beyond the service time (s)",
        "break_even_hit_ratio": "hit ratio above which the cache is faster than none",
        "bytes_per_entry": "bytes of an entry, key and bookkeeping included as the backend counts",
        "tokens_saved": "prompt and completion tokens of the answers served from the cache",
        "usd_saved": "tokens saved at the price of option usd_per_million_tokens (USD)",
        "generations": "calls of the source",
        "distinct_answers": "different answers per prompt, mean over prompts",
        "entropy_bits": "entropy of the answers to one prompt, mean over prompts (bit)",
        "same_as_uncached": "share of answers equal to the uncached source's, where that is fixed",
    },
    values=values,
)
