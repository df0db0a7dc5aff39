"""One cell of a block, in the process that measures it: its session, its turns, its last passes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from kvbench import documents, physics, records, strategies
from kvbench.errors import InputError, Unsupported
from kvbench.inputs import models
from kvbench.measurement import noise, placement, prediction, profiling, startup
from kvbench.measurement import quality as lossy
from kvbench.measurement.conversation import Script, SlowedSession, Talk, Turn, script
from kvbench.measurement.memory import ElsewhereMemory, cache_bytes, meter_for
from kvbench.strategies.base import Session

#: Warm-ups that a compiling strategy may take until a conversation passes without a new graph.
MOST_WARMUPS = 4
#: Turns, and tokens of each reference reply, over which the quality of a lossy cache is scored.
QUALITY_TURNS, QUALITY_TOKENS = 8, 48


@dataclass(frozen=True)
class Job:
    """What a cell's process has to know.

    Attributes
    ----------
    cell:
        The fields of :class:`kvbench.inputs.configuration.KvCell`.
    model_folder, prompts_file:
        What the inputs stage made.
    threads:
        Threads for torch's operations on a CPU.
    """

    cell: Mapping[str, Any]
    model_folder: Path
    prompts_file: Path
    threads: int


@dataclass
class Known:
    """What is known of one turn beside its times.

    Attributes
    ----------
    prompts, replies:
        Prompt and new tokens of each row.
    padding:
        Padded positions before each row's prompt; empty for one request.
    """

    prompts: Sequence[Sequence[int]] = ()
    replies: Sequence[Sequence[int]] = ()
    new_tokens: int = 0
    reused_tokens: int = 0
    padding: tuple[int, ...] = ()
    kv_bytes: int | None = None
    peak_memory_bytes: int | None = None
    reserved_memory_bytes: int | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the whole prompt, of a batch the longest."""
        return max(map(len, self.prompts), default=0)


class _Graphs:
    """Counts what torch.compile has compiled; nothing is imported when nothing compiles."""

    def __init__(self, active: bool) -> None:
        self._active = active

    def count(self) -> int:
        if not self._active:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"].get("unique_graphs", 0))


class Cell:
    """A strategy at work on one scenario: opened, warmed up, then a turn whenever it is asked.

    Everything that goes in and out is plain data, so that the cell may live in another process. It
    is used under ``torch.inference_mode()``.

    Parameters
    ----------
    job:
        What to measure.
    model:
        The model, where the process has it already; else it is loaded by :meth:`open`.
    turns:
        The turns, where they are not those of the job's prompts.
    """

    def __init__(
        self, job: Job, model: models.LoadedModel | None = None, turns: Script | None = None
    ) -> None:
        self._job = job
        self._model = model
        self._device = job.cell["device"]
        self._strategy = strategies.get(job.cell["measured"])
        self._turns = turns
        self._session: Session | None = None
        self._engine: dict[str, Any] = {}
        self._slowed: SlowedSession | None = None
        #: Returns when a turn that has gone on for long may go on; without it turns are in one piece.
        self.rest: Callable[[], None] | None = None
        self._places: placement.Places | None = None
        self.known: list[Known] = []

    def prepare(self) -> None:
        """Load the model unless it is there, and have everything ready but the session.

        Raises
        ------
        Unsupported
            The strategy cannot run with this model or on this device.
        """
        cell = self._job.cell
        with startup.collector_paused():
            import torch

            if self._device == "cpu":
                torch.set_num_threads(self._job.threads)
            if self._model is None:
                keep = self._strategy.needs()
                self._model = models.load(
                    self._job.model_folder, self._device, cell["dtype"], keep=keep
                )
        reason = self._strategy.available(self._model, self._device)
        if reason := reason or self._strategy.adapt(self._model):
            raise Unsupported(reason)
        if self._turns is None:
            self._turns = script(documents.read_json(self._job.prompts_file), cell)
        if self._turns.batch > 1 and (
            reason := self._strategy.available_batch(self._model, self._turns.lengths)
        ):
            raise Unsupported(reason)
        self.known = [Known() for _ in self._turns.requests]
        self._graphs = _Graphs(self._strategy.compiled(self._device))
        self._seen_graphs = self._warm_graphs = 0
        self._neighbours = noise.GpuNeighbours() if self._device == "cuda" else None
        self._companions = 1
        self._here = self._strategy.engine == "transformers"
        self._meter = meter_for(self._device) if self._here else ElsewhereMemory()
        self._timed_memory = cell["memory"] == "timed" and self._meter.supported

    def open(self) -> None:
        """Prepare, and open the strategy's session; raises what :meth:`prepare` does."""
        self.prepare()
        if self._timed_memory:
            self._meter.settle()
        self._session = self._opened()
        self._engine = dict(self._session.facts)
        if slowdown := self._job.cell["slowdown"]:
            self._session = self._slowed = SlowedSession(
                self._session, slowdown, lambda: self._talk.rested_s
            )
        before = self._meter.start if self._timed_memory else (lambda: None)
        self._talk = Talk(self._session, self._turns, self._device, before, self.rest)

    def _opened(self) -> Session:
        """A session of the cell's strategy."""
        several = (self._turns.batch,) if self._turns.batch > 1 else ()
        return self._strategy.session(self._model, self._turns.max_length, *several)

    def warm_up(self) -> list[list[dict[str, Any]]]:
        """Hold the cold conversations; a compiling strategy goes on until nothing is compiled.

        Returns
        -------
        list
            For each turn its cold samples.
        """
        cold: list[list[dict[str, Any]]] = [[] for _ in self._turns.requests]
        wanted, made = self._job.cell["warmup"], 0
        compiles = self._strategy.compiled(self._device)
        talk = Talk(self._session, self._turns, self._device)
        while made < wanted or (compiles and made < MOST_WARMUPS):
            before = self._graphs.count()
            for index, samples in enumerate(cold):
                turn = talk.turn(index)
                samples.append({"iteration": made, **_times(turn), "disturbed": False})
                self._keep(index, turn)
            made += 1
            if made >= wanted and self._graphs.count() == before:
                break
        self._seen_graphs = self._warm_graphs = self._graphs.count()
        return cold

    def settle(self) -> None:
        """Bind the threads of this process, which is the cell's own, to their processors.

        Nothing is bound on a GPU, or where another process or another thread than the main one does the
        work: it and the threads that help it would share what is left by an idle one.
        """
        if not self._here or self._strategy.own_thread or self._device != "cpu":
            return
        import torch

        # Without a warm-up the threads of torch's operations are not there yet: a large sum starts them.
        torch.ones(2**20).sum()
        self._places = placement.Places(self._job.threads)

    def begin(self, companions: int) -> None:
        """Begin a round: collect garbage now, so that it is not collected while a turn is timed.

        Parameters
        ----------
        companions:
            Processes of this block that are alive, this one included.
        """
        self._companions = companions
        gc.collect()
        gc.disable()

    def turn(self, index: int) -> dict[str, Any]:
        """Take one turn on the clock.

        Returns
        -------
        dict
            ``e2e_s``, ``ttft_s``, ``itl_s``, and ``disturbed``: whether a graph was compiled, or
            somebody else was on the GPU. Of a slowed cell also ``injected_s``.
        """
        turn = self._talk.turn(index)
        self._keep(index, turn)
        if self._places:
            self._places.check()
        if self._timed_memory:
            known = self.known[index]
            known.peak_memory_bytes, known.reserved_memory_bytes = self._meter.peak()
            known.kv_bytes = cache_bytes(turn.generation.cache)
        graphs = self._graphs.count()
        compiled, self._seen_graphs = graphs > self._seen_graphs, graphs
        neighbours = (self._neighbours.count() or 0) if self._neighbours else 0
        injected = {"injected_s": self._slowed.injected_s} if self._slowed else {}
        return {**_times(turn), **injected, "disturbed": compiled or neighbours > self._companions}

    def _keep(self, index: int, turn: Turn) -> None:
        known, generation = self.known[index], turn.generation
        known.prompts, known.replies = turn.prompts, turn.replies
        known.new_tokens, known.padding = len(generation.tokens), generation.padding
        known.reused_tokens = generation.reused_tokens
        if not self._here:
            # Such an engine says by itself what a turn holds, and what it reserved at its start.
            known.kv_bytes = cache_bytes(generation.cache)
            known.reserved_memory_bytes = generation.cache.reserved_bytes

    def finish(self) -> dict[str, Any]:
        """Close the session, measure memory apart, and score what a lossy cache costs in quality.

        Returns
        -------
        dict
                ``turns`` (the record's turns but for their samples), ``model`` (architecture, size and
            attention), ``compile`` (``graphs`` and ``recompiles``), ``main_cpu`` (to which the main thread
            was bound to the end, or None) and, where there is one, ``engine``
            (what it says of its start), and where the plan asks for them, ``profile`` and ``quality``.
        """
        found: dict[str, Any] = {
            "compile": {
                "graphs": self._graphs.count(),
                "recompiles": self._graphs.count() - self._warm_graphs,
            },
            "main_cpu": self._places.main if self._places else None,
        }
        if self._job.cell["profile"]:
            found["profile"] = self._profile()
        if self._engine:
            found["engine"] = self._engine
        self.close()
        if self._here and not self._timed_memory:
            self.measure_memory()
        document = documents.read_json(self._job.prompts_file)
        found["model"] = {
            **prediction.described(self._model),
            "layout": document.get("layout"),
        }
        found["turns"] = self._described(found["model"], document)
        if self._job.cell["quality"]:
            found["quality"] = self._quality(document)
        return found

    def close(self) -> None:
        """Give the session's memory back; no turn is taken afterwards."""
        gc.enable()
        if self._session is not None:
            self._session.close()
            self._session = None
            del self._talk

    def measure_memory(self) -> None:
        """Hold one more conversation, in a session of its own, for memory alone."""
        if self._meter.supported:
            self._meter.settle()
        session = self._opened()
        before = self._meter.start if self._meter.supported else (lambda: None)
        talk = Talk(session, self._turns, self._device, before)
        try:
            for index, known in enumerate(self.known):
                turn = talk.turn(index)
                if self._meter.supported:
                    known.peak_memory_bytes, known.reserved_memory_bytes = self._meter.peak()
                known.kv_bytes = cache_bytes(turn.generation.cache)
                self._keep(index, turn)
        finally:
            session.close()

    def _profile(self) -> dict[str, Any]:
        """Take the time of a token apart, behind the longest prompt of the cell."""
        if not self._here:
            return {"status": "unsupported", "reason": "the engine runs in a process of its own"}
        if self._device != "cpu":
            # Kernels of a captured graph carry no operator that they could be told by.
            reason = "a token's time is taken apart on a CPU only"
            return {"status": "unsupported", "reason": reason}
        if self._turns.batch > 1:
            reason = "a token's time is taken apart for one request at a time"
            return {"status": "unsupported", "reason": reason}
        room = min(profiling.TOKENS, self._turns.max_length - 1)
        if room < profiling.FEWEST:
            reason = f"the conversation has no room for {profiling.FEWEST} tokens"
            return {"status": "unsupported", "reason": reason}
        prompt = max((known.prompts[0] for known in self.known), key=len)
        prompt = prompt[: self._turns.max_length - room]
        try:
            return profiling.profile(
                self._session,
                prompt,
                room,
                self._model.model,
                self._strategy.compiled(self._device),
            )
        except Exception as error:
            # What was timed before stands, whatever the profiler came upon.
            return {"status": "failed", "reason": failure(error).reason}

    def _described(
        self, model: dict[str, Any], document: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """The record's turns without times, with the bytes that physics predicts."""
        size = physics.bytes_per_element(self._job.cell["dtype"])
        traffic = self._strategy.traffic(self._turns.max_length)
        predicted = prediction.kv_bytes(model, traffic, self.known, size)
        references = document.get("references")
        of_batches = self._of_batches(model, traffic, size)
        return [
            {
                "turn": number,
                "prompt_tokens": known.prompt_tokens,
                "new_tokens": known.new_tokens,
                "reused_tokens": known.reused_tokens,
                "kv_bytes": known.kv_bytes,
                "kv_bytes_predicted": predicted[number - 1],
                "peak_memory_bytes": known.peak_memory_bytes,
                "reserved_memory_bytes": known.reserved_memory_bytes,
                # Of a batch the digest is that of all replies, one after the other.
                "token_digest": records.token_digest([*chain.from_iterable(known.replies)]),
                "response": self._model.decode(known.replies[0]),
                "reply_exact": references
                and _recites(self._model, known.replies[0], references[number - 1]),
                **of_batches[number - 1],
            }
            for number, known in enumerate(self.known, start=1)
        ]

    def _of_batches(
        self, model: dict[str, Any], traffic: physics.Traffic, size: int
    ) -> list[dict[str, Any]]:
        """What a turn of a batch says beside: its rows, and what the padding takes; else nothing."""
        if self._turns.batch == 1:
            return [{} for _ in self.known]
        alone = self._each_alone()
        padding = prediction.padding_bytes(model, traffic, self.known, size)
        return [
            {
                "padded_tokens": sum(known.padding),
                "kv_bytes_padding": wasted,
                "rows": [
                    {
                        "prompt_tokens": len(prompt),
                        "token_digest": records.token_digest(reply),
                        "as_alone": list(reply) == expected,
                    }
                    for prompt, reply, expected in zip(
                        known.prompts, known.replies, replies, strict=True
                    )
                ],
            }
            for known, wasted, replies in zip(self.known, padding, alone, strict=True)
        ]

    def _each_alone(self) -> list[list[list[int]]]:
        """For each turn the reply to every row's prompt by itself; the history is the batch's.

        An exact strategy is held against the reference, which is the quickest; a lossy one against itself.
        """
        strategy = strategies.get(strategies.REFERENCE) if self._strategy.exact else self._strategy
        found: list[list[list[int]]] = [[] for _ in self.known]
        session = strategy.session(self._model, self._turns.max_length)
        try:
            for row in range(self._turns.batch):
                for index, (known, request) in enumerate(
                    zip(self.known, self._turns.requests, strict=True)
                ):
                    if index == 0 or not request.continues:
                        session.restart()
                    reply = session.generate(known.prompts[row], known.new_tokens, lambda: None)
                    found[index].append(list(reply.tokens))
        finally:
            session.close()
        return found

    def _quality(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """What a lossy cache costs in quality; the reference beside it shows what nothing costs."""
        reason = lossy.without_meaning(self._job.model_folder, document)
        if reason:
            return {"status": "unsupported", "reason": reason, "turns": [], "summary": {}}
        turns = min(self._job.cell["turns"] or QUALITY_TURNS, QUALITY_TURNS)
        return lossy.quality(self._model, self._strategy, document, turns, QUALITY_TOKENS)


def _times(turn: Turn) -> dict[str, Any]:
    timing = turn.timing
    return {"e2e_s": timing.e2e_s, "ttft_s": timing.ttft_s, "itl_s": timing.itl_s}


def _recites(model: models.LoadedModel, tokens: Sequence[int], reference: Sequence[int]) -> bool:
    """Whether the shown reply is the reference, as far as the fixed length lets it go."""
    reply = model.reply(tokens)
    ended = len(reply) < len(tokens)
    return reply == list(reference[: len(reply)]) and (not ended or len(reply) == len(reference))


@dataclass(frozen=True)
class Failure:
    """How a cell ended that gave no result: the record's ``status`` and ``reason``."""

    status: str
    reason: str


def failure(error: Exception) -> Failure:
    """What an exception inside a cell means for its record.

    Raises
    ------
    InputError
        The inputs are wrong: that is no failure of the cell, and no record is made.
    """
    if isinstance(error, InputError):
        raise error
    message = " ".join(str(error).split())[:500]
    if isinstance(error, Unsupported):
        return Failure("unsupported", message)
    status = "out_of_memory" if _is_out_of_memory(error) else "failed"
    return Failure(status, f"{type(error).__name__}: {message}")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or (
        "out of memory" in text or "can't allocate memory" in text
    )
