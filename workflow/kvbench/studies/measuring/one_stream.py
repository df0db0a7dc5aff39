"""All caches in front of one model on one stream of repeats, paraphrases and near misses."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.caching import paraphrases as paraphrase_set
from kvbench.caching.guards import GUARDS
from kvbench.caching.keys import Request, request_key
from kvbench.caching.layered import LayeredCache
from kvbench.caching.paraphrases import Paraphrases, Text
from kvbench.caching.resilience import impatient
from kvbench.caching.response_cache import MISS, Answer, MemoryBackend, RedisBackend, ResponseCache
from kvbench.caching.semantic_cache import SemanticCache
from kvbench.caching.server import ServerRefused, running
from kvbench.errors import Unsupported
from kvbench.measurement import startup
from kvbench.studies import Context, Outcome, control_of
from kvbench.studies._estimates import summary
from kvbench.studies.measuring._rounds import Log, with_controls

if TYPE_CHECKING:
    pass
_WARM_UP = 3
_SERVER_TIMEOUT_S = 0.5
_TTL_S = 3600.0
#: Rounds in which the control takes part at least: as many as an interval needs.
_CONTROLS = 10
#: Latencies are also written as these shares, for the figure.
_SHARES = tuple(round(0.02 * step, 2) for step in range(51))


@dataclass(frozen=True)
class Asked:
    """One request of the stream.

    Attributes
    ----------
    text:
        The question.
    answer:
        What names its right answer: the intent of a canonical question or paraphrase, else the
        text itself. Two questions with the same name may share an answer.
    kind:
        ``repeat``, ``paraphrase``, ``near_miss`` or ``new``.
    """

    text: str
    answer: str
    kind: str


def stream(texts: Paraphrases, requests: int, mix: Mapping[str, float], seed: int) -> list[Asked]:
    """Return a stream in which a share of the requests comes back, in the same or other words.

    Paraphrases and near misses belong to intents asked before and are themselves asked for the
    first time; where none is left the request is a repeat, as it is when the new questions are
    used up. The first request is always new. Only the report half is used, because thresholds
    were tuned on the other.
    """
    rng = np.random.default_rng([seed, 2])
    fresh = texts.select("canonical", "report") + texts.select("never_cached", "report")
    fresh = [fresh[place] for place in rng.permutation(len(fresh))]
    pools: dict[str, dict[str, list[Text]]] = {"paraphrase": {}, "near_miss": {}}
    for label, pool in pools.items():
        for text in texts.select(label, "report"):
            pool.setdefault(text.intent, []).append(text)
    shares = [mix["repeats"], mix["paraphrases"], mix["near_misses"]]
    kinds = rng.choice(4, size=requests, p=[*shares, max(0.0, 1 - sum(shares))])
    asked: list[Asked] = []
    seen: list[str] = []
    for kind in kinds:
        name = ("repeat", "paraphrase", "near_miss", "new")[kind] if asked else "new"
        if name in pools:
            open_intents = [intent for intent in seen if pools[name].get(intent)]
            if open_intents:
                pool = pools[name][open_intents[int(rng.integers(len(open_intents)))]]
                text = pool.pop(int(rng.integers(len(pool))))
                answer = text.intent if name == "paraphrase" else text.id
                asked.append(Asked(text.text, answer, name))
                continue
            name = "repeat"
        if name == "new" and fresh:
            text = fresh.pop()
            seen += [text.intent] if text.label == "canonical" else []
            asked.append(Asked(text.text, text.intent, name))
            continue
        again = asked[int(rng.integers(len(asked)))]
        asked.append(Asked(again.text, again.answer, "repeat"))
    return asked


# --- strategies -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """An answer, the name of the question it was generated for, and where it came from."""

    text: str
    answer: str
    kind: str


Serve = Callable[[Asked], Served]


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Send one stream through all strategies, request by request in an order drawn anew.

    A round is one request: every strategy answers it before the next one comes, so that what
    slows the machine slows all of them.
    """
    if context.model_dir is None:
        raise Unsupported("no local model to put a cache in front of")
    mix = {name: factors[name] for name in ("repeats", "paraphrases", "near_misses")}
    asked = stream(paraphrase_set.load(), factors["requests"], mix, context.seed)
    model = LocalModel(context.model_dir, factors["new_tokens"])
    # The first calls of a process are slower than any later one.
    for request in asked[:_WARM_UP]:
        model.generate(request.text)
    log = Log(context.known)
    serve: dict[str, Serve] = {}
    footprint, added, wrong, tokens = {}, {}, Counter(), Counter()
    reasons: dict[str, str] = {}
    with ExitStack() as stack:
        for strategy in factors["strategies"]:
            try:
                serve[strategy], footprint[strategy], added[strategy] = _start(
                    strategy, factors, context, model, stack
                )
            except Unsupported as error:
                # The others are compared all the same.
                reasons[strategy] = str(error)
        if reasons and serve.keys() <= {"none"}:
            raise Unsupported("; ".join(dict.fromkeys(reasons.values())))
        doing = with_controls(serve, "none")
        # It generates every answer, so that it takes part in a share of the rounds only.
        seldom = {control_of("none"): max(_CONTROLS, len(asked) // 3)}
        for number, strategy in log.turns(doing, len(asked), context.seed, seldom):
            before = model.tokens
            started = time.perf_counter()
            served = serve[doing[strategy]](asked[number])
            passed = time.perf_counter() - started
            tokens[strategy] += model.tokens - before
            right = served.answer == asked[number].answer
            wrong[strategy] += not right
            log.add(strategy, number, seconds=passed, kind=served.kind, right=right)
        held = {strategy: footprint[strategy]() for strategy in serve}
    rows = []
    for strategy in serve:
        seconds = log.of(strategy, "seconds")
        kinds = Counter(log.of(strategy, "kind"))
        identity = {"mix": factors["mix"], "strategy": strategy}
        row = {"part": "strategy"} | identity | mix
        row |= {f"{kind}_requests": sum(a.kind == kind for a in asked) for kind in _REQUEST_KINDS}
        row |= {"requests": len(asked), "wrong_answers": wrong[strategy]}
        row |= {f"{kind}_answers": kinds[kind] for kind in factors["kinds"]}
        row |= {
            "hit_ratio": 1 - kinds["model"] / len(asked),
            "tokens_generated": tokens[strategy],
            "mean_s": float(np.mean(seconds)),
            **summary(seconds, "request"),
            "cache_entries": held[strategy][0],
            "cache_bytes": held[strategy][1],
            "added_memory_mib": added[strategy],
        }
        rows.append(row)
        for share, value in zip(_SHARES, np.quantile(seconds, _SHARES), strict=True):
            rows.append(
                {"part": "quantile"} | identity | {"share": share, "latency_s": float(value)}
            )
    kinds_asked = [request.kind for request in asked]
    return Outcome(rows, {"arms": log.arms(), "asked": kinds_asked, "not_measured": reasons})


_REQUEST_KINDS = ("repeat", "paraphrase", "near_miss", "new")


class LocalModel:
    """The local model behind its chat template: greedy, a fixed number of new tokens."""

    def __init__(self, folder: Path, new_tokens: int) -> None:
        with startup.collector_paused():
            import torch

            startup.skip_unused_imports()
            from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            ).eval()
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = reason.replace(str(folder), folder.name)
            raise Unsupported(f"the local model cannot be loaded: {reason}") from error
        self._no_gradients = torch.inference_mode
        self._new_tokens = new_tokens
        self.tokens = 0

    def generate(self, text: str) -> str:
        """Return the answer to one user message; counts its tokens in :attr:`tokens`."""
        inputs = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with self._no_gradients():
            output = self._model.generate(
                **inputs,
                do_sample=False,
                min_new_tokens=self._new_tokens,
                max_new_tokens=self._new_tokens,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id or 0,
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        self.tokens += len(new)
        return self._tokenizer.decode(new, skip_special_tokens=True)


def _start(
    strategy: str,
    factors: Mapping[str, Any],
    context: Context,
    model: LocalModel,
    stack: ExitStack,
) -> tuple[Serve, Callable[[], tuple[int, int]], float]:
    """Return the strategy, its entries and bytes, and the MiB that starting it added."""
    from psutil import Process

    before = Process().memory_info().rss

    def generate(request: Asked) -> Served:
        return Served(model.generate(request.text), request.answer, "model")

    def added() -> float:
        return max(0, Process().memory_info().rss - before) / 2**20

    if strategy == "none":
        return generate, lambda: (0, 0), added()
    if strategy == "layered":
        server = stack.enter_context(running(context.server_url, context.scratch))
        client = server.client(**impatient(_SERVER_TIMEOUT_S))
        cache = LayeredCache(
            client,
            server.namespace,
            ttl_s=_TTL_S,
            l1_capacity=factors["memory_entries"],
        )
        stack.callback(cache.close)
        if not cache.wait_until_coherent():
            raise ServerRefused("the cache server publishes no invalidations")
        # LayeredCache keeps its entries under this prefix, and the server says what they take.
        held = RedisBackend(client, f"{server.namespace}e:")
        return _layered(cache, generate), held.footprint, added()
    backend = MemoryBackend(max(1, factors["requests"]))
    # Every answer has exactly the length that was asked for, so each is a whole one, even if a
    # small model says nothing that can be printed.
    exact = ResponseCache(backend, accept=lambda _answer: True)
    if strategy == "exact":
        return _exact(exact, generate), backend.footprint, added()
    from kvbench.caching.encoder import SentenceEncoder

    encoder = SentenceEncoder(factors["encoder"], factors["encoder_revision"])
    encoder("warm up")
    alike = SemanticCache(
        encoder,
        encoder.dimension,
        threshold=factors["threshold"],
        guards=GUARDS,
        fits=encoder.fits,
    )

    def footprint() -> tuple[int, int]:
        entries, size = backend.footprint()
        return entries, size + alike.footprint()[1]

    return _exact_semantic(exact, alike, generate), footprint, added()


def _request(asked: Asked) -> Request:
    return Request(model="local", prompt=asked.text, parameters={"temperature": 0})


def _exact(cache: ResponseCache, generate: Serve) -> Serve:
    def serve(asked: Asked) -> Served:
        found = cache.get(_request(asked))
        if found is not MISS:
            return Served(found.text, asked.answer, "exact")
        served = generate(asked)
        cache.put(_request(asked), Answer(served.text))
        return served

    return serve


def _exact_semantic(cache: ResponseCache, alike: SemanticCache, generate: Serve) -> Serve:
    def miss(asked: Asked) -> Served:
        found = alike.get(asked.text)
        if found.hit:
            # Not stored as an exact answer: a wrong one would come back at every repeat.
            text, answer = found.value
            return Served(text, answer, "semantic")
        served = generate(asked)
        alike.put(asked.text, (served.text, asked.answer))
        cache.put(_request(asked), Answer(served.text))
        return served

    def serve(asked: Asked) -> Served:
        found = cache.get(_request(asked))
        return miss(asked) if found is MISS else Served(found.text, asked.answer, "exact")

    return serve


def _layered(cache: LayeredCache, generate: Serve) -> Serve:
    def serve(asked: Asked) -> Served:
        key = request_key(_request(asked))
        found = cache.get(key, lambda: json.dumps(generate(asked).text).encode())
        if cache.last_failure is not None:
            raise ServerRefused(f"the cache server failed: {cache.last_failure}")
        kind = {1: "memory", 2: "server", 3: "model"}[found.level]
        return Served(json.loads(found.value), asked.answer, kind)

    return serve
