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

from kvbench import physics
from kvbench.errors import Unsupported
from kvbench.inputs import models
from kvbench.studies import Context, Outcome
from kvbench.studies._estimates import summary
from kvbench.studies.measuring._retokenise import retokenise
from kvbench.studies.measuring._rounds import Log, with_controls

if TYPE_CHECKING:
    from kvbench.inputs.models import LoadedModel
    from kvbench.measurement.clock import Timing

#: The ways that others of their kind are compared with.
_REFERENCES = ("recompute", "paged", "vllm")


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
            return retokenise(factors, context)
        return _serve(factors, context)


def _serve(factors: Mapping[str, Any], context: Context) -> Outcome:
    model = models.load(context.model_dir, "cpu", "float32")
    try:
        architecture = physics.Architecture.from_config(model.architecture)
    except physics.UnknownFamily as error:
        raise Unsupported(str(error)) from None
    if any(layer.window or layer.state for layer in architecture.layers):
        raise Unsupported(
            "a prefix is shared by layers that keep all keys and values; this model has others"
        )
    system, questions = _prompts(factors, architecture.vocab_size, context.seed)
    length = len(system) + factors["question_tokens"] + factors["new_tokens"]
    if length > (architecture.max_positions or length):
        raise Unsupported(
            f"a request takes {length} tokens, the model's context {architecture.max_positions}"
        )
    log = Log(context.known)
    replies: dict[str, list[list[int]]] = {way: [] for way in factors["ways"]}
    saved: dict[str, float] = {}
    held: dict[str, int] = {}
    setup_s: dict[str, float] = {}
    reasons = {}
    with contextlib.ExitStack() as stack:
        serving: dict[str, Any] = {}
        for way in factors["ways"]:
            try:
                kind = _kind(way)
                serving[way] = stack.enter_context(
                    contextlib.closing(kind(way, model, system, factors, length))
                )
            except ImportError:
                reasons[way] = "needs a transformers with ContinuousBatchingConfig"
            except Unsupported as error:
                reasons[way] = str(error)
        # The engines change the model's attention, so that the two kinds take turns as wholes; within
        # a kind a question is a round, and every way answers it before the next one comes.
        for kind in (_Contiguous, _Engine, _Vllm):
            ways = [way for way in serving if isinstance(serving[way], kind)]
            with contextlib.ExitStack() as running:
                for way in ways:
                    running.enter_context(serving[way].active())
                    setup_s[way] = serving[way].prepare()
                # A reference keeps nothing from one request to the next, so that its control can be
                # the same server, asked again.
                doing = with_controls(ways, *_REFERENCES)
                for number, arm in log.turns(doing, len(questions), context.seed):
                    way = doing[arm]
                    tokens, timing = serving[way].answer([*system, *questions[number]])
                    if arm == way:
                        replies[way].append(tokens)
                    log.add(arm, number, ttft_s=timing.ttft_s, e2e_s=timing.e2e_s)
                for way in ways:
                    saved[way] = serving[way].reused_tokens() / len(questions)
                    held[way] = serving[way].held_bytes(
                        [[*system, *question] for question in questions[: factors["together"]]]
                    )
    together = min(factors["together"], len(questions))
    rows = []
    for way in serving:
        # The first request pays for what later ones find allocated.
        warm = slice(1, None)
        prompt = len(system) + factors["question_tokens"]
        rows.append(
            {
                "part": "serving",
                "way": way,
                "system_tokens": len(system),
                "prompt_tokens": prompt,
                "new_tokens": factors["new_tokens"],
                "requests": len(questions) - 1,
                "reused_tokens": saved[way],
                "prefill_saved": saved[way] / prompt,
                "prefill_saved_predicted": _reused(way, len(system), factors) / prompt,
                "setup_s": setup_s[way],
                **summary(log.of(way, "ttft_s")[warm], "ttft"),
                **summary(log.of(way, "e2e_s")[warm], "e2e"),
                "together": together,
                "held_mib": held[way] / 2**20,
                "held_mib_predicted": _held(way, architecture, len(system), factors, together)
                / 2**20,
                **serving[way].engine(),
                "tokens_equal": _equal(replies[way], replies.get("recompute")),
            }
        )
    return Outcome(rows, {"arms": log.arms(), "reasons": reasons})


def _equal(own: Sequence[list[int]], reference: Sequence[list[int]] | None) -> float | None:
    """Share of the requests with exactly the tokens of recomputation; None where nobody recomputed."""
    if not reference:
        return None
    return float(np.mean([one == other for one, other in zip(own, reference, strict=True)]))


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
    if way in ("paged_shared", "vllm_prefix_caching"):
        size = _block_size(way, factors)
        return system // size * size
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
    if _kind(way) is _Contiguous:
        kept = system if way in ("copied", "shared") else 0
        return physics.kv_bytes(architecture, together * tokens + kept, 4)
    size = _block_size(way, factors)
    common = _reused(way, system, factors) // size
    blocks = common + together * (-(-tokens // size) - common)
    return physics.kv_bytes(architecture, blocks * size, 4)


def _block_size(way: str, factors: Mapping[str, Any]) -> int:
    """Tokens per block of an engine."""
    return factors["vllm_block_size" if way.startswith("vllm") else "block_size"]


def _kind(way: str) -> type:
    """Who serves in a way."""
    return _Vllm if way.startswith("vllm") else _Engine if way.startswith("paged") else _Contiguous


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

    def engine(self) -> dict[str, Any]:
        """Columns of an engine; the library has none."""
        return {}

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

    def engine(self) -> dict[str, Any]:
        """What the engine reserved: room for the requests of the study, no more."""
        blocks = self._config.num_blocks
        reserved = physics.kv_bytes(self._architecture, blocks * self._size, 4)
        return {"reserved_mib": reserved / 2**20}

    def close(self) -> None:
        """Nothing is kept outside :meth:`active`."""
        self._manager = None


class _Vllm:
    """Requests on vLLM, in a process of its own, with or without automatic prefix caching."""

    def __init__(
        self,
        way: str,
        model: LoadedModel,
        system: Sequence[int],
        factors: Mapping[str, Any],
        length: int,
    ) -> None:
        from kvbench.strategies.vllm import Vllm, VllmPrefixCaching

        kinds = {kind.name: kind for kind in (Vllm, VllmPrefixCaching)}
        strategy = kinds[way](block_size=factors["vllm_block_size"])
        if why := strategy.available(model, "cpu"):
            raise Unsupported(why)
        self._system, self._new = list(system), factors["new_tokens"]
        self._session = strategy.session(model, length)
        self._reused = 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The engine runs from its start on; it waits without working."""
        yield

    def prepare(self) -> float:
        """Serve a request that ends after the system prompt, so that its blocks are known."""
        begin = time.perf_counter()
        self._session.generate([*self._system, 1], 2, lambda: None)
        return time.perf_counter() - begin

    def answer(self, ids: list[int]) -> tuple[list[int], Timing]:
        """Serve one request; the engine stamps its tokens, and the way to it counts."""
        from kvbench.measurement.clock import clock_for

        clock = clock_for("cpu")
        clock.start()
        generation = self._session.generate(ids, self._new, lambda: None)
        self._reused += generation.reused_tokens
        return generation.tokens, clock.finish(list(generation.stamps))

    def reused_tokens(self) -> int:
        """Prompt tokens of all requests whose blocks were found, as the engine counts them."""
        return self._reused

    def held_bytes(self, prompts: Sequence[list[int]]) -> int:
        """Bytes of the most blocks that these requests, served at once, had at any time."""
        return self._session.held_together(prompts, self._new)

    def engine(self) -> dict[str, Any]:
        """What the engine reserved, and what its start took."""
        facts = self._session.facts
        return {
            "reserved_mib": self._session.reserved_bytes / 2**20,
            "engine_start_s": facts["import_s"] + facts["start_s"],
            "engine_compile_s": facts["compile_s"],
        }

    def close(self) -> None:
        """End the engine's process."""
        self._session.close()
