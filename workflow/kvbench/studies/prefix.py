"""What one system prompt for many requests saves, and what tokenising the history again loses."""

from __future__ import annotations

import contextlib
import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench import layout, physics
from kvbench.errors import InputError, Unsupported
from kvbench.inputs import models, scenarios
from kvbench.measurement import startup
from kvbench.paper.values import Value
from kvbench.studies import Cell, Context, Outcome, Study
from kvbench.studies._estimates import share_value
from kvbench.studies._latency import first, milliseconds, number, summary, summary_columns

if TYPE_CHECKING:
    import pandas as pd

    from kvbench.inputs.models import LoadedModel
    from kvbench.measurement.clock import Timing

WAYS = ("recompute", "copied", "shared", "paged", "paged_shared")

_OPTIONS: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "system_tokens": {
            "description": "Lengths of the system prompt that all requests share, in tokens.",
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 32768},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0, 64, 256, 1024],
        },
        "question_tokens": {
            "description": "Tokens of a request after the system prompt; no two are alike.",
            "type": "integer",
            "minimum": 1,
            "default": 24,
        },
        "new_tokens": {
            "description": "Tokens generated for a request.",
            "type": "integer",
            "minimum": 2,
            "default": 8,
        },
        "requests": {
            "description": "Timed requests of each way to serve them.",
            "type": "integer",
            "minimum": 1,
            "default": 6,
        },
        "together": {
            "description": "Requests whose caches are held at once, to see what they take.",
            "type": "integer",
            "minimum": 1,
            "maximum": 64,
            "default": 4,
        },
        "block_size": {
            "description": "Tokens per block of the paged engine.",
            "type": "integer",
            "minimum": 1,
            "maximum": 1024,
            "default": 16,
        },
        "scenarios": {
            "description": "Conversations whose history is decoded and tokenised again.",
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "uniqueItems": True,
            "default": ["banking_loan_application"],
        },
        "turns": {
            "description": "Turns of those conversations; null means all.",
            "type": ["integer", "null"],
            "minimum": 2,
            "default": 6,
        },
        "reply_tokens": {
            "description": "Longest reply in those conversations, in tokens.",
            "type": "integer",
            "minimum": 1,
            "default": 64,
        },
        "temperatures": {
            "description": "Temperatures of the replies; 0 is greedy.",
            "type": "array",
            "items": {"type": "number", "minimum": 0, "maximum": 5},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0, 1, 2],
        },
    },
}

_SERVING = ("question_tokens", "new_tokens", "requests", "together", "block_size")


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """One timed cell per length of the system prompt; an untimed one per conversation."""
    cells = {
        f"system{length}": Cell(
            {"system_tokens": length, **{name: options[name] for name in _SERVING}}
        )
        for length in options["system_tokens"]
    }
    for scenario in options["scenarios"]:
        factors = {name: options[name] for name in ("turns", "reply_tokens", "temperatures")}
        cells[f"retokenise-{scenario}"] = Cell({"scenario": scenario, **factors}, timed=False)
    return cells


def measure(factors: Mapping[str, Any], context: Context) -> Outcome:
    """Serve requests in every way, or hold a conversation as text.

    Raises
    ------
    Unsupported
        There is no local model, or its context is too short.
    InputError
        The scenario does not exist or is no conversation.
    """
    if context.model_dir is None:
        raise Unsupported("no local model; set app.model")
    import torch

    with torch.inference_mode():
        if "scenario" in factors:
            return _retokenise(factors, context)
        return _serve(factors, context)


# Many requests with one system prompt ----------------------------------------------------------


def _serve(factors: Mapping[str, Any], context: Context) -> Outcome:
    model = models.load(context.model_dir, "cpu", "float32")
    architecture = physics.Architecture.from_config(model.architecture)
    system, questions = _prompts(factors, architecture.vocab_size, context.seed)
    length = len(system) + factors["question_tokens"] + factors["new_tokens"]
    if length > (architecture.max_positions or length):
        raise Unsupported(
            f"a request takes {length} tokens, the model's context {architecture.max_positions}"
        )
    timings: dict[str, list[Timing]] = {way: [] for way in WAYS}
    replies: dict[str, list[list[int]]] = {way: [] for way in WAYS}
    saved: dict[str, float] = {}
    held: dict[str, int] = {}
    setup_s: dict[str, float] = {}
    reasons = {}
    with contextlib.ExitStack() as stack:
        serving: dict[str, Any] = {}
        for way in WAYS:
            try:
                kind = _Engine if way.startswith("paged") else _Contiguous
                serving[way] = stack.enter_context(
                    contextlib.closing(kind(way, model, system, factors, length))
                )
            except ImportError:
                reasons[way] = "needs a transformers with ContinuousBatchingConfig"
        # The engine changes the model's attention, so that the two kinds take turns as wholes.
        for kind in (_Contiguous, _Engine):
            ways = [way for way in serving if isinstance(serving[way], kind)]
            for way in ways:
                with serving[way].active():
                    setup_s[way] = serving[way].prepare()
                    for question in questions:
                        tokens, timing = serving[way].answer([*system, *question])
                        replies[way].append(tokens)
                        timings[way].append(timing)
                    saved[way] = serving[way].reused_tokens() / len(questions)
                    held[way] = serving[way].held_bytes(
                        [[*system, *question] for question in questions[: factors["together"]]]
                    )
    together = min(factors["together"], len(questions))
    rows = []
    for way in serving:
        # The first request pays for what later ones find allocated.
        warm = timings[way][1:]
        prompt = len(system) + factors["question_tokens"]
        rows.append(
            {
                "part": "serving",
                "way": way,
                "system_tokens": len(system),
                "prompt_tokens": prompt,
                "new_tokens": factors["new_tokens"],
                "requests": len(warm),
                "reused_tokens": saved[way],
                "prefill_saved": saved[way] / prompt,
                "prefill_saved_predicted": _reused(way, len(system), factors) / prompt,
                "setup_s": setup_s[way],
                **summary([timing.ttft_s for timing in warm], "ttft"),
                **summary([timing.e2e_s for timing in warm], "e2e"),
                "together": together,
                "held_mib": held[way] / 2**20,
                "held_mib_predicted": _held(way, architecture, len(system), factors, together)
                / 2**20,
                "tokens_equal": float(
                    np.mean(
                        [
                            own == reference
                            for own, reference in zip(
                                replies[way], replies["recompute"], strict=True
                            )
                        ]
                    )
                ),
            }
        )
    samples = {
        way: [{"ttft_s": timing.ttft_s, "e2e_s": timing.e2e_s} for timing in timings[way]]
        for way in serving
    }
    return Outcome(rows, samples | {"reasons": reasons})


def _prompts(
    factors: Mapping[str, Any], vocabulary: int, seed: int
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the system prompt and of the questions, one more than are timed."""
    rng = np.random.default_rng(seed)
    # The first ids of most vocabularies are special tokens.
    lowest = min(vocabulary - 1, max(16, vocabulary // 10))

    def draw(count: int) -> list[int]:
        return rng.integers(lowest, vocabulary, count).tolist()

    questions = [draw(factors["question_tokens"]) for _ in range(factors["requests"] + 1)]
    return draw(factors["system_tokens"]), questions


def _reused(way: str, system: int, factors: Mapping[str, Any]) -> int:
    """Prompt tokens of a request that need not be read: whole blocks only where it is paged."""
    if way == "paged_shared":
        return system // factors["block_size"] * factors["block_size"]
    return system if way in ("copied", "shared") else 0


def _held(
    way: str,
    architecture: physics.Architecture,
    system: int,
    factors: Mapping[str, Any],
    together: int,
) -> int:
    """Bytes that the caches of requests held together take, by the physics module.

    Contiguous caches hold all tokens once per request however the prefix came in, and the prefix
    itself beside them; blocks are whole, and shared ones count once.
    """
    tokens = system + factors["question_tokens"] + factors["new_tokens"] - 1
    if not way.startswith("paged"):
        kept = system if way in ("copied", "shared") else 0
        return physics.kv_bytes(architecture, together * tokens + kept, 4)
    size = factors["block_size"]
    common = _reused(way, system, factors) // size
    blocks = common + together * (-(-tokens // size) - common)
    return physics.kv_bytes(architecture, blocks * size, 4)


class _Contiguous:
    """Requests on dynamic caches: all recomputed, or begun with a copy or a loan of the prefix."""

    def __init__(
        self,
        way: str,
        model: LoadedModel,
        system: Sequence[int],
        factors: Mapping[str, Any],
        length: int,
    ) -> None:
        from transformers import DynamicCache

        from kvbench.strategies.base import GenerateSession, text_config

        self._system, self._new = list(system), factors["new_tokens"]
        self._model = model
        self._empty: Callable[[], Any] = lambda: DynamicCache(config=text_config(model))
        self._way = way
        self._prefix: Any = None
        self._session = GenerateSession(model, self._begin)
        self._reused = 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Nothing has to run meanwhile."""
        yield

    def prepare(self) -> float:
        """Read the system prompt once, where the way allows it; return the seconds."""
        import torch

        if self._way == "recompute" or not self._system:
            return 0.0
        begin = time.perf_counter()
        self._prefix = self._empty()
        self._model.model(
            torch.tensor([self._system]), past_key_values=self._prefix, logits_to_keep=1
        )
        return time.perf_counter() - begin

    def _begin(self) -> Any:
        """The cache that a request starts with."""
        if self._prefix is None:
            return self._empty()
        self._reused += self._prefix.get_seq_length()
        if self._way == "copied":
            return copy.deepcopy(self._prefix)
        # The layers are new, their tensors are the prefix's: a dynamic layer never writes into
        # them, since it makes longer ones by concatenation.
        loan = copy.copy(self._prefix)
        loan.layers = [copy.copy(layer) for layer in self._prefix.layers]
        return loan

    def answer(self, ids: list[int]) -> tuple[list[int], Timing]:
        """Serve one request; making its first cache counts as part of it."""
        from kvbench.measurement.clock import clock_for

        clock = clock_for("cpu")
        clock.start()
        generation = self._session.generate(ids, self._new, clock.on_token)
        return generation.tokens, clock.finish(None)

    def reused_tokens(self) -> int:
        """Prompt tokens of all requests that came out of the prefix."""
        return self._reused

    def held_bytes(self, prompts: Sequence[list[int]]) -> int:
        """Bytes of the prefix and of the caches of these requests, all kept; storages count once."""
        from kvbench.measurement.memory import cache_bytes

        kept = [self._session.generate(ids, self._new, lambda: None).cache for ids in prompts]
        caches = [*kept, self._prefix] if self._prefix is not None else kept
        return cache_bytes(
            SimpleNamespace(layers=[layer for one in caches for layer in one.layers])
        )

    def close(self) -> None:
        """Let go of the prefix."""
        self._prefix = None


class _Engine:
    """Requests on the continuous-batching engine, with or without sharing of equal blocks."""

    def __init__(
        self,
        way: str,
        model: LoadedModel,
        system: Sequence[int],
        factors: Mapping[str, Any],
        length: int,
    ) -> None:
        from transformers import ContinuousBatchingConfig

        known = inspect.signature(ContinuousBatchingConfig).parameters
        size = "block_size" if "block_size" in known else "page_size"
        self._size, self._new = factors["block_size"], factors["new_tokens"]
        self._config = ContinuousBatchingConfig(
            **{size: self._size},
            num_blocks=(-(-length // self._size) + 1) * max(2, factors["together"]),
            max_batch_tokens=max(256, length),
            allow_block_sharing=way == "paged_shared",
        )
        self._model, self._length, self._system = model, length, list(system)
        self._manager: Any = None
        self._architecture = physics.Architecture.from_config(model.architecture)
        self._before = 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The engine's thread runs, and the model has its attention, as long as this lasts."""
        from transformers import GenerationConfig

        attention = self._model.model.config._attn_implementation
        self._manager = self._model.model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=self._length
            ),
            continuous_batching_config=self._config,
        )
        self._manager.start()
        try:
            yield
        finally:
            self._manager.stop(block=True, timeout=10)
            if hasattr(self._manager, "destroy"):
                self._manager.destroy()
            self._model.model.set_attn_implementation(attention)

    def prepare(self) -> float:
        """Serve a request that ends after the system prompt, so that its blocks are known."""
        begin = time.perf_counter()
        # The engine's first request also makes its buffers.
        self._finish(self._add([*self._system, 1], 2))
        self._before = self._cache()._total_prefix_length
        return time.perf_counter() - begin

    def _cache(self) -> Any:
        return self._manager.batch_processor.cache

    def _add(self, ids: list[int], new: int) -> str:
        return self._manager.add_request(
            ids, max_new_tokens=new, streaming=False, record_timestamps=True, eos_token_id=-1
        )

    def _finish(self, request: str) -> Any:
        for result in self._manager.request_id_iter(request):
            if result.error:
                raise RuntimeError(f"the continuous-batching engine failed: {result.error}")
            if result.is_finished():
                return result
        raise RuntimeError("the continuous-batching engine stopped before the request was served")

    def answer(self, ids: list[int]) -> tuple[list[int], Timing]:
        """Serve one request; the engine stamps its tokens."""
        from kvbench.measurement.clock import clock_for

        clock = clock_for("cpu")
        clock.start()
        result = self._finish(self._add(ids, self._new))
        return list(result.generated_tokens), clock.finish(list(result.timestamps))

    def reused_tokens(self) -> int:
        """Prompt tokens of all requests whose blocks were found, as the engine counts them."""
        return self._cache()._total_prefix_length - self._before

    def held_bytes(self, prompts: Sequence[list[int]]) -> int:
        """Bytes of the most blocks that these requests, served at once, had at any time."""
        cache = self._cache()
        free = cache.get_num_free_blocks()
        fewest = free
        pending = [self._add(ids, self._new) for ids in prompts]
        while pending:
            fewest = min(fewest, cache.get_num_free_blocks())
            result = self._manager.get_result(request_id=pending[0], timeout=0.0005)
            if result is not None and result.is_finished():
                pending.pop(0)
        return physics.kv_bytes(self._architecture, (free - fewest) * self._size, 4)

    def close(self) -> None:
        """Nothing is kept outside :meth:`active`."""
        self._manager = None


# A history that is decoded and tokenised again --------------------------------------------------


def _retokenise(factors: Mapping[str, Any], context: Context) -> Outcome:
    from transformers import AutoTokenizer

    name = factors["scenario"]
    path = layout.shipped("config") / "scenarios" / f"{name}.yaml"
    if not path.exists():
        raise InputError(
            f"app.studies.prefix.scenarios: there is no scenario {name!r}; correct the name"
        )
    scenario = scenarios.load(path)
    if scenario.kind != "conversation":
        raise InputError(
            f"app.studies.prefix.scenarios: {name!r} has no dialogue; name a conversation"
        )
    startup.skip_unused_imports()
    tokenizer = AutoTokenizer.from_pretrained(context.model_dir, local_files_only=True)
    model = models.load(context.model_dir, "cpu", "float32")
    rows = []
    for temperature in factors["temperatures"]:
        rows += _hold(temperature, scenario, tokenizer, model, factors, context.seed)
    return Outcome(rows)


def _hold(
    temperature: float,
    scenario: scenarios.Scenario,
    tokenizer: Any,
    model: LoadedModel,
    factors: Mapping[str, Any],
    seed: int,
) -> list[dict[str, Any]]:
    """A client that keeps text: how much of the cache its next prompt still agrees with."""
    from kvbench.strategies.reuse import common_prefix

    messages = [{"role": "system", "content": scenario.system}]
    held: list[int] = []
    prompt_before = 0
    rows = []
    for number_of_turn, turn in enumerate(scenario.turns[: factors["turns"]], start=1):
        messages.append({"role": "user", "content": turn.user})
        text = models.render(tokenizer, messages)
        prompt = tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
        if held:
            kept = common_prefix(held, prompt)
            rows.append(
                {
                    "part": "retokenise",
                    "scenario": scenario.id,
                    "temperature": temperature,
                    "turn": number_of_turn,
                    "held_tokens": len(held),
                    "surviving_tokens": kept,
                    "surviving": kept / len(held),
                    "reply_tokens": len(held) - prompt_before,
                    "reply_survives": max(0, kept - prompt_before)
                    / max(1, len(held) - prompt_before),
                }
            )
        reply = _reply(model, prompt, temperature, factors, seed + number_of_turn)
        held, prompt_before = [*prompt, *reply], len(prompt)
        messages.append({"role": "assistant", "content": model.decode(reply)})
    return rows


def _reply(
    model: LoadedModel, prompt: list[int], temperature: float, factors: Mapping[str, Any], seed: int
) -> list[int]:
    """Tokens of a reply up to its end, greedy or drawn."""
    import torch
    from transformers import GenerationConfig

    chosen: dict[str, Any] = {"do_sample": False}
    if temperature:
        chosen = {"do_sample": True, "temperature": float(temperature), "top_k": 0}
    ids = torch.tensor([prompt])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=factors["reply_tokens"],
                eos_token_id=None,
                pad_token_id=0,
                **chosen,
            ),
        )
    return model.reply(output[0, len(prompt) :].tolist())


# Table and values -------------------------------------------------------------------------------

COLUMNS: dict[str, str] = {
    "part": "serving: requests with one system prompt; retokenise: a history kept as text",
    "way": "recompute, copied (prefix copied per request), shared (tensors lent), paged, paged_shared",
    "system_tokens": "tokens of the system prompt that all requests share",
    "prompt_tokens": "tokens of a whole prompt",
    "new_tokens": "tokens generated for a request",
    "requests": "timed requests; one before them is not counted",
    "reused_tokens": "prompt tokens of a request whose keys and values were there, mean",
    "prefill_saved": "the same as a share of the prompt",
    "prefill_saved_predicted": "that share from the lengths: whole blocks only where it is paged",
    "setup_s": "seconds of reading the system prompt once, beforehand (s)",
    **summary_columns("ttft", "time to first token"),
    **summary_columns("e2e", "time of a request"),
    "together": "requests whose caches are held at once for the next columns",
    "held_mib": "bytes of their caches; of the engine, of the most blocks in use (MiB)",
    "held_mib_predicted": "the same by the physics module (MiB)",
    "tokens_equal": "share of requests with exactly the tokens of recompute",
    "scenario": "conversation that is held as text",
    "temperature": "temperature of the replies; 0 is greedy",
    "turn": "turn whose prompt was tokenised from the text, counted from 1",
    "held_tokens": "tokens the cache holds before it, without the end mark of the reply",
    "surviving_tokens": "leading tokens of those that the new prompt agrees with",
    "surviving": "the same as a share",
    "reply_tokens": "tokens of the last reply among those held",
    "reply_survives": "share of that reply that the new prompt agrees with",
}


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return the numbers of the paper, all named ``prefix_...``, at the longest system prompt."""
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *COLUMNS])))
    served = table[table["part"] == "serving"]
    longest = served[served["system_tokens"] == served["system_tokens"].max()]
    base = first(longest[longest["way"] == "recompute"])
    found = {
        "prefix_system_tokens": number(base, "system_tokens", "", 0),
        "prefix_prompt_tokens": number(base, "prompt_tokens", "", 0),
        "prefix_requests": number(base, "requests", "", 0),
        "prefix_together": number(base, "together", "", 0),
    }
    for way in WAYS:
        row = first(longest[longest["way"] == way])
        name = f"prefix_{way}"
        found[f"{name}_ttft_ms"] = milliseconds(row, "ttft_p50_s", 2)
        found[f"{name}_e2e_ms"] = milliseconds(row, "e2e_p50_s", 2)
        found[f"{name}_saved"] = number(row, "prefill_saved", "%", 1, 100)
        found[f"{name}_held_mib"] = number(row, "held_mib", "MiB", 2)
        found[f"{name}_held_predicted_mib"] = number(row, "held_mib_predicted", "MiB", 2)
        found[f"{name}_setup_ms"] = number(row, "setup_s", "ms", 2, 1000)
        other = first(longest[longest["way"] == "paged"]) if way == "paged_shared" else base
        ratio = None
        if row is not None and other is not None and row["ttft_p50_s"]:
            ratio = float(other["ttft_p50_s"] / row["ttft_p50_s"])
        found[f"{name}_ttft_speedup"] = Value(ratio, unit="x", digits=2)
    found["prefix_tokens_equal"] = share_value(served["tokens_equal"].dropna())
    text = table[table["part"] == "retokenise"]
    found["prefix_retokenise_turns"] = Value(
        None if text.empty else int(text["turn"].max()), digits=0
    )
    hottest = text["temperature"].max()
    found["prefix_sampled_temperature"] = Value(float(hottest) if hottest > 0 else None, digits=1)
    for replies, chosen in (
        ("greedy", text["temperature"] == 0),
        ("sampled", (text["temperature"] == hottest) & (text["temperature"] > 0)),
    ):
        own = text[chosen]
        found[f"prefix_{replies}_survives"] = share_value(own["surviving"].dropna())
        found[f"prefix_{replies}_lost"] = share_value(1 - own["surviving"].dropna())
        found[f"prefix_{replies}_reply_survives"] = share_value(own["reply_survives"].dropna())
    return found


STUDY = Study(
    name="prefix",
    question="What does it save to read a system prompt once for many requests?",
    options=_OPTIONS,
    plan=plan,
    measure=measure,
    columns=COLUMNS,
    values=values,
    needs_model=True,
)
