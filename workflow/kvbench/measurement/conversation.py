"""One measured cell: warm-up, timed conversations, a pass for memory, and the record of it all."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench import documents, physics, records, strategies
from kvbench.errors import InputError, Unsupported
from kvbench.inputs import models
from kvbench.measurement import limits, lock, noise, prediction, startup
from kvbench.measurement import quality as lossy
from kvbench.measurement.clock import Timing, clock_for
from kvbench.measurement.memory import cache_bytes, meter_for
from kvbench.strategies.base import Generation, Session, Strategy

logger = logging.getLogger(__name__)

#: Warm-ups that a compiling strategy may take until a conversation passes without a new graph.
MOST_WARMUPS = 4
#: Turns, and tokens of each reference reply, over which the quality of a lossy cache is scored.
QUALITY_TURNS, QUALITY_TOKENS = 8, 48
#: Disturbed iterations are repeated until this many times the wanted number have been made.
MOST_REPEATS = 2


@dataclass(frozen=True)
class Request:
    """One turn to generate, as a function of the replies so far.

    Attributes
    ----------
    prompt:
        Tokens of the whole prompt (``fresh``), or those that follow the history.
    continues:
        Whether the history of this conversation comes before ``prompt``.
    new_tokens:
        Exact number of tokens to generate.
    """

    prompt: Sequence[int]
    continues: bool
    new_tokens: int


@dataclass
class Script:
    """The turns of a cell, and the length of the longest context they reach."""

    requests: list[Request]
    kind: str

    @property
    def max_length(self) -> int:
        """Tokens of the longest context; no cache needs more room."""
        longest = context = 0
        for request in self.requests:
            context = (context if request.continues else 0) + len(request.prompt)
            context += request.new_tokens
            longest = max(longest, context)
        return longest


def script(document: Mapping[str, Any], cell: Mapping[str, Any]) -> Script:
    """Lay out the turns of a cell from a scenario's token ids (:func:`kvbench.inputs.tokens.prompts`)."""
    if document["kind"] == "fixed":
        limit = cell["max_prompt_tokens"]
        return Script(
            [
                Request(step["prompt"], False, step["new_tokens"])
                for step in document["steps"]
                if limit is None or len(step["prompt"]) <= limit
            ],
            "fixed",
        )
    new = cell["max_new_tokens"]
    following = document["next"][: (cell["turns"] or len(document["next"]) + 1) - 1]
    return Script(
        [
            Request(document["first"], False, new),
            *(Request(ids, True, new) for ids in following),
        ],
        "conversation",
    )


@dataclass
class Turn:
    """What is known of one turn after the passes over it."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    kv_bytes: int | None = None
    peak_memory_bytes: int | None = None
    reserved_memory_bytes: int | None = None
    cold: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


def converse(
    session: Session,
    turns: Script,
    device: str,
    after_turn: Callable[[int, list[int], Generation, Timing], None],
    before_turn: Callable[[], None] | None = None,
) -> None:
    """Run one conversation from its start.

    History is kept as token ids: what was generated is never decoded and tokenised again, which
    would move token borders and break every cache.

    Parameters
    ----------
    session:
        The strategy's session; it is restarted first.
    turns:
        What to generate.
    device:
        Decides the clock.
    after_turn:
        Called with the turn's index, its whole prompt, what was generated, and the times.
    before_turn:
        Called right before the clock starts.
    """
    clock = clock_for(device)
    session.restart()
    history: list[int] = []
    for index, request in enumerate(turns.requests):
        history = [*history, *request.prompt] if request.continues else list(request.prompt)
        if not request.continues:
            session.restart()
        if before_turn is not None:
            before_turn()
        clock.start()
        generation = session.generate(history, request.new_tokens, clock.on_token)
        timing = clock.finish(generation.stamps)
        if len(generation.tokens) != request.new_tokens:
            raise RuntimeError(
                f"turn {index + 1}: {len(generation.tokens)} tokens came back, "
                f"{request.new_tokens} were asked for"
            )
        after_turn(index, history, generation, timing)
        history = [*history, *generation.tokens]


class SlowedSession(Session):
    """A session that takes a known share longer per token: what the instrument must notice.

    Parameters
    ----------
    session:
        The session to slow down.
    slowdown:
        Share by which every token's gap is lengthened, such as 0.05.
    """

    def __init__(self, session: Session, slowdown: float) -> None:
        self._session = session
        self._slowdown = slowdown

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate one turn, idling after each token for a share of the time it took."""
        last = time.perf_counter()

        def slowed() -> None:
            nonlocal last
            now = time.perf_counter()
            until = now + self._slowdown * (now - last)
            while time.perf_counter() < until:
                pass
            last = time.perf_counter()
            on_token()

        return self._session.generate(token_ids, max_new_tokens, slowed)

    def restart(self) -> None:
        """Restart the slowed session."""
        self._session.restart()

    def close(self) -> None:
        """Close the slowed session."""
        self._session.close()


class _Graphs:
    """Counts what torch.compile has compiled; nothing is imported when nothing compiles."""

    def __init__(self, active: bool) -> None:
        self._active = active

    def count(self) -> int:
        if not self._active:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"].get("unique_graphs", 0))


def measure(
    session: Session,
    turns: Script,
    device: str,
    *,
    warmup: int,
    iterations: int,
    budget_s: float,
    compiled: bool = False,
    builds: bool = False,
    meter: Any = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Turn], dict[str, Any], dict[str, Any]]:
    """Time conversations: cold ones first, then ``iterations`` that nothing disturbed.

    Parameters
    ----------
    session, turns, device:
        As for :func:`converse`.
    warmup, iterations:
        Cold and timed conversations wanted.
    budget_s:
        Seconds of timing after which no further conversation starts.
    compiled:
        Whether graphs are compiled; warm-up then goes on until none is.
    builds:
        Whether the first conversation compiles anything, be it a graph or an extension.
    meter:
        Reads the memory of the timed conversations; None leaves memory to a pass of its own.
    progress:
        Receives a line per step.

    Returns
    -------
    turns:
        One :class:`Turn` per request, without memory figures.
    noise:
        What others did meanwhile.
    compile:
        ``seconds``, ``graphs`` and ``recompiles``; compiling never falls into a kept sample.
    """
    result = [Turn() for _ in turns.requests]
    graphs = _Graphs(compiled)
    neighbours = noise.GpuNeighbours() if device == "cuda" else None
    begin = time.perf_counter()

    def iteration(number: int, cold: bool) -> bool:
        """Run one conversation; return whether all its turns were undisturbed."""
        window = noise.read()
        pending: list[dict[str, Any]] = []
        clean = True
        known_graphs = graphs.count()

        def close_window() -> None:
            nonlocal window, clean
            now = noise.read()
            mark = noise.disturbed(window, now)
            for sample in pending:
                sample["disturbed"] |= mark
                clean &= not sample["disturbed"]
            pending.clear()
            window = now

        def after_turn(
            index: int, prompt: list[int], generation: Generation, timing: Timing
        ) -> None:
            nonlocal known_graphs
            turn = result[index]
            turn.prompt_tokens, turn.new_tokens = len(prompt), len(generation.tokens)
            turn.reused_tokens, turn.tokens = generation.reused_tokens, generation.tokens
            seen = graphs.count()
            sample = {
                "iteration": number,
                "e2e_s": timing.e2e_s,
                "ttft_s": timing.ttft_s,
                "itl_s": timing.itl_s,
                "disturbed": (seen > known_graphs and not cold)
                or bool(neighbours and neighbours.count()),
            }
            known_graphs = seen
            (turn.cold if cold else turn.samples).append(sample)
            if meter is not None and not cold:
                turn.peak_memory_bytes, turn.reserved_memory_bytes = meter.peak()
                turn.kv_bytes = cache_bytes(generation.cache)
            pending.append(sample)
            if noise.read().wall_s - window.wall_s >= noise.SHORTEST_WINDOW_S:
                close_window()

        # Marks are reset before the clock starts.
        before_turn = meter.start if meter is not None and not cold else None
        converse(session, turns, device, after_turn, before_turn)
        close_window()
        return clean

    first = noise.read()
    made = 0
    while made < warmup or (compiled and made < MOST_WARMUPS):
        before = graphs.count()
        iteration(made, cold=True)
        made += 1
        if made >= warmup and graphs.count() == before:
            break
    warm = graphs.count()
    progress(f"warm after {made} conversation(s), {time.perf_counter() - begin:.1f} s")

    timed = time.perf_counter()
    start = noise.read()
    gc.collect()
    gc.disable()
    try:
        clean = number = 0
        while clean < iterations and number < iterations * MOST_REPEATS:
            clean += iteration(number, cold=False)
            number += 1
            progress(f"iteration {number}, {clean} undisturbed of {iterations}")
            if time.perf_counter() - timed > budget_s:
                break
    finally:
        gc.enable()
    end = noise.read()
    samples = [sample for turn in result for sample in turn.samples]
    wall = max(end.wall_s - start.wall_s, 1e-9)
    disturbance = {
        "others_cores": round(start.others_s(end) / wall, 4),
        "steal_s": round(end.steal_s - start.steal_s, 3),
        "involuntary_switches": end.involuntary - start.involuntary,
        "samples": len(samples),
        "disturbed_samples": sum(sample["disturbed"] for sample in samples),
        "iterations_wanted": iterations,
        "iterations_made": number,
        "measured_s": round(wall, 3),
        "gpu_neighbours": neighbours.count() if neighbours else None,
        "warmup_s": round(start.wall_s - first.wall_s, 3),
    }
    return result, disturbance, _compilation(result, builds, warm, graphs.count())


def _compilation(turns: list[Turn], builds: bool, warm: int, final: int) -> dict[str, Any]:
    """Seconds that cold conversations took beyond warm ones, and the graphs that were made."""
    seconds = 0.0
    if builds:
        for turn in turns:
            best = min(sample["e2e_s"] for sample in turn.samples)
            seconds += sum(max(0.0, sample["e2e_s"] - best) for sample in turn.cold)
    return {"seconds": round(seconds, 4), "graphs": final, "recompiles": final - warm}


def measure_memory(
    make_session: Callable[[], Session], turns: Script, device: str, meter: Any, result: list[Turn]
) -> None:
    """Run one more conversation for memory alone; fills the memory fields of ``result``."""
    if not meter.supported:
        session = make_session()
        try:
            converse(session, turns, device, _keep_cache_bytes(result))
        finally:
            session.close()
        return
    meter.settle()
    session = make_session()
    keep = _keep_cache_bytes(result)

    def after_turn(index: int, prompt: list[int], generation: Generation, timing: Timing) -> None:
        peak, reserved = meter.peak()
        result[index].peak_memory_bytes = peak
        result[index].reserved_memory_bytes = reserved
        keep(index, prompt, generation, timing)

    try:
        converse(session, turns, device, after_turn, before_turn=meter.start)
    finally:
        session.close()


def _keep_cache_bytes(result: list[Turn]) -> Callable[..., None]:
    def after_turn(index: int, _prompt: list[int], generation: Generation, _time: Timing) -> None:
        result[index].kv_bytes = cache_bytes(generation.cache)

    return after_turn


def run_cell(
    cell: Mapping[str, Any],
    model_folder: Path,
    prompts_file: Path,
    environment_file: Path,
    code_digest: str,
    threads: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure one cell and return its record. A failure inside the cell is data, not an exception.

    Parameters
    ----------
    cell:
        The fields of :class:`kvbench.inputs.configuration.KvCell`.
    model_folder, prompts_file, environment_file:
        What the inputs stage made.
    code_digest:
        Digest of the measuring code.
    threads:
        Threads for torch's operations; part of the record's identity.
    progress:
        Receives one line whenever something is done.

    Raises
    ------
    InputError
        The inputs are wrong; no record is made then.
    """
    started, begin = records.now(), time.perf_counter()
    strategy = strategies.get(cell["strategy"])
    document = documents.read_json(prompts_file)
    turns = script(document, cell)
    facts = documents.read_json(environment_file)
    record: dict[str, Any] = {
        "schema": records.KV_SCHEMA,
        "cell": {
            "suite": "kv",
            **{
                key: cell[key]
                for key in ("model", "scenario", "strategy", "replicate", "device", "dtype", "seed")
            },
            "threads": threads,
            "max_new_tokens": max(request.new_tokens for request in turns.requests),
            "turns": len(turns.requests),
            "kind": turns.kind,
            "experiment": cell["experiment"],
            "iterations": cell["iterations"],
            "warmup": cell["warmup"],
            "memory": cell["memory"],
            "slowdown": cell["slowdown"],
        },
        "status": "ok",
        "reason": None,
        "turns": [],
        "strategy_info": {
            "exact": strategy.exact,
            "compiled": strategy.compiled(cell["device"]),
            "options": strategy.options(),
            "traffic": strategy.traffic(turns.max_length).as_dict(),
        },
        "model": {},
        "compile": {"seconds": 0.0, "graphs": 0, "recompiles": 0},
        "noise": {},
        "environment": _environment_facts(facts),
        "code_digest": code_digest,
        "started_at": started,
        "wall_s": 0.0,
    }
    excess = limits.of_this_process().excess(threads) if cell["device"] == "cpu" else None
    record["environment"]["warning"] = excess
    if excess:
        logger.warning(excess)
        progress(f"warning: {excess}")
    try:
        reason = strategy.available(None, cell["device"])
        if reason:
            raise Unsupported(reason)
        _measure_into(record, strategy, cell, turns, document, model_folder, threads, progress)
    except InputError:
        raise
    except Unsupported as error:
        record |= {"status": "unsupported", "reason": str(error), "turns": []}
    except Exception as error:
        logger.exception("cell failed")
        status = "out_of_memory" if _is_out_of_memory(error) else "failed"
        message = " ".join(str(error).split())[:500]
        record |= {"status": status, "reason": f"{type(error).__name__}: {message}", "turns": []}
    record["wall_s"] = round(time.perf_counter() - begin, 3)
    return record


def _environment_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: facts[key] for key in ("digest", "cpu", "cores", "commit")}
    kept["gpu"] = (facts.get("gpu") or {}).get("name")
    kept["torch"] = facts["packages"].get("torch")
    kept["transformers"] = facts["packages"].get("transformers")
    return kept


def _measure_into(
    record: dict[str, Any],
    strategy: Strategy,
    cell: Mapping[str, Any],
    turns: Script,
    document: Mapping[str, Any],
    model_folder: Path,
    threads: int,
    progress: Callable[[str], None],
) -> None:
    device = cell["device"]
    progress("loading the model")
    with startup.collector_paused():
        import torch

        if device == "cpu":
            torch.set_num_threads(threads)
        model = models.load(model_folder, device, cell["dtype"], keep=strategy.needs())
    record["model"] = {**prediction.described(model), "layout": document.get("layout")}
    reason = strategy.available(model, device)
    if reason:
        raise Unsupported(reason)
    meter = meter_for(device)

    def open_session() -> Session:
        return strategy.session(model, turns.max_length)

    apart = cell["memory"] == "separate" or not meter.supported
    with lock.machine() as waited, torch.inference_mode():
        waited_quiet = noise.wait_for_quiet(cell["quiet_wait_s"])
        if not apart:
            meter.settle()
        session = open_session()
        if cell["slowdown"]:
            session = SlowedSession(session, cell["slowdown"])
        try:
            result, disturbance, compilation = measure(
                session,
                turns,
                device,
                warmup=cell["warmup"],
                iterations=cell["iterations"],
                budget_s=cell["budget_s"],
                compiled=strategy.compiled(device),
                builds=strategy.compiled(device) or bool(strategy.needs()),
                meter=None if apart else meter,
                progress=progress,
            )
        finally:
            session.close()
        del session
        if apart:
            progress("measuring memory")
            measure_memory(open_session, turns, device, meter, result)
    record["noise"] = {
        **disturbance,
        "waited_for_lock_s": round(waited, 3),
        "waited_for_quiet_s": round(waited_quiet, 3),
    }
    record["compile"] = compilation
    size = physics.bytes_per_element(cell["dtype"])
    traffic = strategy.traffic(turns.max_length)
    predicted = prediction.kv_bytes(record["model"], traffic, result, size)
    references = document.get("references")
    record["turns"] = [
        {
            "turn": number,
            "prompt_tokens": turn.prompt_tokens,
            "new_tokens": turn.new_tokens,
            "reused_tokens": turn.reused_tokens,
            "kv_bytes": turn.kv_bytes,
            "kv_bytes_predicted": predicted[number - 1],
            "peak_memory_bytes": turn.peak_memory_bytes,
            "reserved_memory_bytes": turn.reserved_memory_bytes,
            "token_digest": records.token_digest(turn.tokens),
            "response": model.decode(turn.tokens),
            "reply_exact": references and _recites(model, turn.tokens, references[number - 1]),
            "cold": turn.cold,
            "samples": turn.samples,
        }
        for number, turn in enumerate(result, start=1)
    ]
    progress("scoring the quality of what the cache keeps")
    _add_quality(record, strategy, cell, model, document, model_folder)


def _add_quality(
    record: dict[str, Any],
    strategy: Strategy,
    cell: Mapping[str, Any],
    model: models.LoadedModel,
    document: Mapping[str, Any],
    model_folder: Path,
) -> None:
    """What a lossy cache costs in quality, where the plan asks for it."""
    if not cell["quality"]:
        return
    reason = lossy.without_meaning(model_folder, document)
    if reason:
        record["quality"] = {"status": "unsupported", "reason": reason, "turns": [], "summary": {}}
        return
    import torch

    with torch.inference_mode():
        record["quality"] = lossy.quality(
            model,
            strategy,
            document,
            min(cell["turns"] or QUALITY_TURNS, QUALITY_TURNS),
            QUALITY_TOKENS,
        )


def _recites(model: models.LoadedModel, tokens: Sequence[int], reference: Sequence[int]) -> bool:
    """Whether the shown reply is the reference, as far as the fixed length lets it go."""
    reply = model.reply(tokens)
    ended = len(reply) < len(tokens)
    return reply == list(reference[: len(reply)]) and (not ended or len(reply) == len(reference))


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or (
        "out of memory" in text or "can't allocate memory" in text
    )
