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
from kvbench.studies import Context, Outcome
from kvbench.studies._estimates import summary

if TYPE_CHECKING:
    pass

#: Requests of the run without a cache: each takes the service time, and nothing else varies.
_UNCACHED_REQUESTS = 100
_PROMPT_TOKENS = 64
_COMPLETION_TOKENS = 150


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
        for policy in factors["policies"]:
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
