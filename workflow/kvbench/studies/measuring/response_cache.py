"""What an exact response cache saves, what its key must contain, and what it does to sampling."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from kvbench.studies.measuring._rounds import SPARE, Log, with_controls
from kvbench.studies.measuring._servers import Insistent

if TYPE_CHECKING:
    pass

#: Life of an entry: nothing may stay on a server if this process dies without cleaning up.
_TTL_S = 3600.0
_PROMPT_TOKENS = 64
_COMPLETION_TOKENS = 150


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Run one cell: latencies of all backends in rounds, the key's fields, or sampling."""
    if factors["kind"] == "key":
        return Outcome(_measure_key(factors, context.seed))
    if factors["kind"] == "sampling":
        return Outcome(_measure_sampling(factors, context.seed))
    return _measure_latency(factors, context)


def _measure_latency(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Send short streams through every backend in rounds; each run begins with nothing stored."""
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    with ExitStack() as stack:
        makers, reasons = _open_backends(factors["backends"], context, factors["keys"], stack)
        for exponent in factors["exponents"]:
            for value_kib in factors["value_kib"]:
                name = f"a{exponent}-{value_kib}kib"
                runs: dict[str, list[_Run]] = {backend: [] for backend in makers}
                log, doing = Log(context.known), with_controls(makers, "none")
                rounds = factors["rounds"]
                for number, arm in log.turns(doing, rounds, context.seed, spare=rounds // SPARE):
                    backend = doing[arm]
                    # The same requests for every backend of a round, others in the next.
                    seed = context.seed * 1000 + number
                    stream = zipf(factors["requests"], factors["keys"], seed, exponent)
                    if backend == "none":
                        stream = stream[: factors["uncached_requests"]]
                    store = makers[backend](f"{name}-{number}")
                    run = _send(factors, stream, value_kib, store, number == rounds - 1)
                    if arm == backend:
                        runs[backend].append(run)
                    log.add(
                        arm,
                        number,
                        seconds=run.mean_s,
                        limit=len(stream) / len(run.miss_s),
                        hit_s=run.hit_s,
                        miss_s=run.miss_s,
                        overhead_s=run.overhead_s,
                    )
                samples[name] = log.arms()
                rows += [
                    {
                        "kind": "latency",
                        "backend": backend,
                        "exponent": exponent,
                        "value_kib": value_kib,
                        **_row(factors, found),
                    }
                    for backend, found in runs.items()
                ]
    return Outcome(rows, {"arms": samples, "not_measured": reasons})


#: Makes a store that is empty, by the name of the run; None is the run without a cache.
_Maker = Callable[[str], Backend | None]


def _open_backends(
    wanted: Sequence[str], context: Context, capacity: int, stack: ExitStack
) -> tuple[dict[str, _Maker], dict[str, str]]:
    """Return how to make each backend, and why some cannot be had.

    Raises
    ------
    Unsupported
        No backend but ``none`` can be had.
    """
    makers: dict[str, _Maker] = {}
    reasons: dict[str, str] = {}
    for backend in wanted:
        if backend == "none":
            makers[backend] = lambda _name: None
        elif backend == "memory":
            makers[backend] = lambda _name: MemoryBackend(capacity)
        elif backend == "sqlite":
            makers[backend] = lambda name: SQLiteBackend(context.scratch / f"{name}.sqlite")
        else:
            transport = backend.removeprefix("server_")
            try:
                server = stack.enter_context(
                    running(context.server_url, context.scratch, tcp=transport == "tcp")
                )
            except Unsupported as error:
                reasons[backend] = str(error)
                continue
            if server.transport != transport:
                reasons[backend] = f"the configured server is reached over {server.transport}"
                continue
            makers[backend] = lambda name, server=server: Insistent(
                RedisBackend(server.client(), f"{server.namespace}{name}:")
            )
    if not makers.keys() - {"none"} and reasons:
        raise Unsupported("; ".join(dict.fromkeys(reasons.values())))
    return makers, reasons


@dataclass
class _Run:
    """What a stream took, request by request, and what it left behind."""

    requests: int
    unique: int
    hit_s: list[float]
    miss_s: list[float]
    overhead_s: list[float]
    served_s: list[float]
    wrong: int
    cached: bool
    tokens_saved: int = 0
    entries: int = 0
    bytes: int = 0

    @property
    def mean_s(self) -> float:
        """Mean time of a request."""
        return (sum(self.hit_s) + sum(self.miss_s)) / self.requests


def _send(
    factors: Mapping[str, Any],
    stream: np.ndarray,
    value_kib: float,
    backend: Backend | None,
    sized: bool,
) -> _Run:
    """Send a stream through a cache, or straight to the source, and take the times apart.

    ``sized`` asks what its entries take, which on a server means to look at all its keys.
    """
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

    cache = None if backend is None else ResponseCache(backend, ttl_s=_TTL_S)
    run = _Run(len(stream), len(np.unique(stream)), [], [], [], served_s, 0, cache is not None)
    for key in stream:
        request = requests[key]
        started = time.perf_counter()
        if cache is None:
            answer, hit = source(request), False
        else:
            reply = cache.answer(request, source)
            answer, hit = reply.answer, reply.hit
        took_s = time.perf_counter() - started
        run.wrong += answer.text != texts[key]
        if hit:
            run.hit_s.append(took_s)
        else:
            run.miss_s.append(took_s)
            run.overhead_s.append(took_s - served_s[-1])
    if cache is not None:
        if sized:
            run.entries, run.bytes = backend.footprint()
        run.tokens_saved = cache.stats.prompt_tokens_saved + cache.stats.completion_tokens_saved
        backend.close()
    return run


def _row(factors: Mapping[str, Any], runs: Sequence[_Run]) -> dict[str, Any]:
    """Pool the runs of one backend."""
    hit_s, miss_s, overhead_s, served_s = (
        [one for run in runs for one in getattr(run, name)]
        for name in ("hit_s", "miss_s", "overhead_s", "served_s")
    )
    count = sum(run.requests for run in runs)
    unique = sum(run.unique for run in runs)
    cached = runs[0].cached
    row: dict[str, Any] = {
        "rounds": len(runs),
        "requests": count,
        "unique_requests": unique,
        "hits": len(hit_s),
        "hit_ratio": len(hit_s) / count,
        "hit_ratio_limit": 1 - unique / count if cached else 0.0,
        "wrong_answers": sum(run.wrong for run in runs),
        "service_s": float(np.mean(served_s)),
        "mean_s": float(np.mean([*hit_s, *miss_s])),
        **summary(hit_s, "hit"),
        **summary(miss_s, "miss"),
    }
    shares = [(len(part) / count, part) for part in (hit_s, miss_s) if part]
    row["mean_predicted_s"] = sum(share * float(np.median(part)) for share, part in shares)
    if cached:
        overhead = float(np.median(overhead_s))
        row["miss_overhead_s"] = overhead
        if hit_s:
            saved = row["service_s"] + overhead - row["hit_p50_s"]
            # Below zero: a hit is slower than the source, and no hit ratio pays.
            row["break_even_hit_ratio"] = overhead / saved if saved > 0 else math.inf
        row["bytes_per_entry"] = sum(run.bytes for run in runs) / sum(run.entries for run in runs)
        row["tokens_saved"] = sum(run.tokens_saved for run in runs)
        row["usd_saved"] = row["tokens_saved"] / 1e6 * factors["usd_per_million_tokens"]
    return row


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
        # The key of the caching guide: md5 of these three and nothing else.
        "guide md5": lambda _, request: _guide_key(request),
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


def _guide_key(request: Request) -> str:
    """Return the guide's key: md5 of prompt, temperature and max_tokens."""
    text = ":".join(
        str(part)
        for part in (
            request.prompt,
            request.parameters.get("temperature"),
            request.parameters.get("max_tokens"),
        )
    )
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


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
