"""One measured cell: what is timed, what is repeated, what is kept apart, and what is written down."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Sequence

import pytest
from kvbench import records, strategies
from kvbench.errors import InputError
from kvbench.inputs import configuration, tokens
from kvbench.inputs.scenarios import Scenario, Turn
from kvbench.measurement import conversation, noise
from kvbench.measurement.clock import Timing
from kvbench.measurement.conversation import Request, Script
from kvbench.measurement.memory import CpuMemory
from kvbench.strategies.base import Generation, Session

pytestmark = pytest.mark.usefixtures("private_lock")

TALK = Script(
    [Request([1, 2, 3], False, 4), Request([7, 8], True, 4), Request([9], True, 4)], "conversation"
)
STEPS = Script([Request([1, 2, 3], False, 4), Request([7, 8], False, 2)], "fixed")


class Echo(Session):
    """Gives tokens that nobody would expect from decoding and tokenising again."""

    def __init__(self, short: int = 0) -> None:
        self.prompts: list[list[int]] = []
        self.restarts = 0
        self.closed = False
        self._short = short

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        self.prompts.append(list(token_ids))
        for _ in range(max_new_tokens - self._short):
            on_token()
        first = 1000 * len(self.prompts)
        return Generation(list(range(first, first + max_new_tokens - self._short)), None)

    def restart(self) -> None:
        self.restarts += 1

    def close(self) -> None:
        self.closed = True


class Scripted:
    """A clock on which every turn takes what the test says."""

    def __init__(self, seconds: Iterable[float]) -> None:
        self._seconds = iter(seconds)

    def start(self) -> None:
        self._tokens = 0

    def on_token(self) -> None:
        self._tokens += 1

    def finish(self, stamps: list[float] | None = None) -> Timing:
        total = next(self._seconds)
        return Timing(total, total / 2, [total / 8] * (self._tokens - 1))


def noisy(monkeypatch, marks: Iterable[bool]) -> None:
    """Let the given conversations be disturbed, then none."""
    left = iter(marks)
    monkeypatch.setattr(noise, "disturbed", lambda before, after: next(left, False))


def measure(session: Session, turns: Script = TALK, **options: object):
    given = {"warmup": 1, "iterations": 3, "budget_s": 1e9} | options
    return conversation.measure(session, turns, "cpu", **given)


# History --------------------------------------------------------------------------------------


def test_history_grows_by_the_very_tokens_that_were_generated():
    session = Echo()
    conversation.converse(session, TALK, "cpu", lambda *_: None)
    first, second, third = session.prompts
    assert first == [1, 2, 3]
    assert second == [*first, 1000, 1001, 1002, 1003, 7, 8]
    assert third == [*second, 2000, 2001, 2002, 2003, 9]


def test_the_steps_of_a_fixed_scenario_are_independent():
    session = Echo()
    conversation.converse(session, STEPS, "cpu", lambda *_: None)
    assert session.prompts == [[1, 2, 3], [7, 8]]
    assert session.restarts >= 2


def test_every_conversation_starts_from_its_first_prompt(undisturbed):
    session = Echo()
    measure(session)
    assert session.prompts[0::3] == [[1, 2, 3]] * 4


@pytest.mark.parametrize("short", [1, -1])
def test_a_reply_of_the_wrong_length_is_an_error(short):
    with pytest.raises(RuntimeError, match=rf"turn 1: {4 - short} tokens came back, 4 were asked"):
        conversation.converse(Echo(short), TALK, "cpu", lambda *_: None)


def test_the_longest_context_is_that_of_the_last_turn_or_of_the_longest_step():
    assert TALK.max_length == (3 + 4) + (2 + 4) + (1 + 4)
    assert STEPS.max_length == 7


# Script ---------------------------------------------------------------------------------------


def test_a_script_has_the_turns_that_were_asked_for():
    document = {"kind": "conversation", "first": [1], "next": [[2], [3], [4]]}
    cell = {"max_new_tokens": 5, "turns": 2}
    requests = conversation.script(document, cell).requests
    assert requests == [Request([1], False, 5), Request([2], True, 5)]
    assert len(conversation.script(document, cell | {"turns": None}).requests) == 4


def test_longer_steps_than_asked_for_are_left_out():
    steps = [{"prompt": [1] * n, "new_tokens": n} for n in (2, 4, 8)]
    cell = {"max_prompt_tokens": 4, "max_new_tokens": 99, "turns": None}
    made = conversation.script({"kind": "fixed", "steps": steps}, cell)
    assert [(len(r.prompt), r.new_tokens) for r in made.requests] == [(2, 2), (4, 4)]
    assert not any(r.continues for r in made.requests)


# Samples --------------------------------------------------------------------------------------


def test_cold_conversations_are_kept_apart(monkeypatch, undisturbed):
    clock = Scripted([90, 91, 92, 80, 81, 82, *range(1, 10)])
    monkeypatch.setattr(conversation, "clock_for", lambda device: clock)
    turns, _, _ = measure(Echo(), warmup=2)
    assert [[s["e2e_s"] for s in turn.cold] for turn in turns] == [[90, 80], [91, 81], [92, 82]]
    assert [[s["e2e_s"] for s in turn.samples] for turn in turns] == [
        [1, 4, 7],
        [2, 5, 8],
        [3, 6, 9],
    ]
    assert [s["iteration"] for s in turns[0].samples] == [0, 1, 2]


def test_without_a_warm_up_nothing_is_cold(undisturbed):
    turns, _, made = measure(Echo(), warmup=0, iterations=2)
    assert [(len(turn.cold), len(turn.samples)) for turn in turns] == [(0, 2)] * 3
    assert made["seconds"] == 0.0


def test_there_is_one_gap_less_than_there_are_tokens(undisturbed):
    turns, _, _ = measure(Echo(), STEPS)
    assert [len(turn.samples[0]["itl_s"]) for turn in turns] == [3, 1]
    assert all(0 < s["ttft_s"] <= s["e2e_s"] for turn in turns for s in turn.samples)


def test_a_disturbed_conversation_is_marked_and_repeated(monkeypatch):
    noisy(monkeypatch, [False, True, False, True])
    turns, found, _ = measure(Echo())
    for turn in turns:
        assert [s["disturbed"] for s in turn.samples] == [True, False, True, False, False]
    assert (found["iterations_wanted"], found["iterations_made"]) == (3, 5)
    assert (found["samples"], found["disturbed_samples"]) == (15, 6)


def test_on_a_machine_that_is_never_quiet_repeating_ends(monkeypatch):
    noisy(monkeypatch, [True] * 99)
    turns, found, _ = measure(Echo())
    assert found["iterations_made"] == 3 * conversation.MOST_REPEATS
    assert all(s["disturbed"] for turn in turns for s in turn.samples)


def test_a_disturbed_warm_up_costs_no_repeat(monkeypatch):
    noisy(monkeypatch, [True])
    _, found, _ = measure(Echo())
    assert found["iterations_made"] == 3
    assert found["disturbed_samples"] == 0


def test_an_exhausted_budget_ends_with_one_iteration(undisturbed):
    turns, found, _ = measure(Echo(), iterations=50, budget_s=1e-9)
    assert found["iterations_made"] == 1
    assert [len(turn.samples) for turn in turns] == [1, 1, 1]


def test_garbage_is_collected_between_and_not_during_the_timed_turns(undisturbed):
    states = []

    class Looking(Echo):
        def generate(self, *arguments: object) -> Generation:
            states.append(gc.isenabled())
            return super().generate(*arguments)

    measure(Looking(), iterations=2)
    assert states == [True] * 3 + [False] * 6
    assert gc.isenabled()


def test_garbage_collection_returns_when_a_turn_fails(undisturbed):
    class Failing(Echo):
        def generate(self, *arguments: object) -> Generation:
            if len(self.prompts) == 4:
                raise RuntimeError("no more")
            return super().generate(*arguments)

    with pytest.raises(RuntimeError, match="no more"):
        measure(Failing())
    assert gc.isenabled()


# Compiling ------------------------------------------------------------------------------------


class Compiling(Echo):
    """Compiles a graph in the conversations that the test names, counted from 0."""

    def __init__(self, monkeypatch, conversations: Iterable[int]) -> None:
        super().__init__()
        self.graphs = 0
        self._wanted = {3 * number for number in conversations}
        counter = type("Counter", (), {"__init__": lambda *_: None, "count": lambda _: self.graphs})
        monkeypatch.setattr(conversation, "_Graphs", counter)

    def generate(self, *arguments: object) -> Generation:
        self.graphs += len(self.prompts) in self._wanted
        return super().generate(*arguments)


def test_warming_up_goes_on_until_no_graph_is_made(monkeypatch, undisturbed):
    session = Compiling(monkeypatch, [0, 1])
    turns, _, made = measure(session, compiled=True)
    assert len(turns[0].cold) == 3
    assert (made["graphs"], made["recompiles"]) == (2, 0)
    assert not any(s["disturbed"] for turn in turns for s in turn.samples)


def test_warming_up_ends_even_when_every_conversation_compiles(monkeypatch, undisturbed):
    turns, _, _ = measure(Compiling(monkeypatch, range(99)), compiled=True)
    assert len(turns[0].cold) == conversation.MOST_WARMUPS


def test_a_graph_made_while_timing_is_recorded_and_its_conversation_repeated(
    monkeypatch, undisturbed
):
    turns, found, made = measure(Compiling(monkeypatch, [0, 3]), compiled=True)
    assert made["recompiles"] == 1
    assert [s["disturbed"] for s in turns[0].samples] == [False, True, False, False]
    assert found["iterations_made"] == 4


def test_the_seconds_of_compiling_are_what_cold_turns_took_beyond_warm_ones(
    monkeypatch, undisturbed
):
    clock = Scripted([30.0, 2.0, 1.0, *[2.0, 2.0, 2.0] * 3])
    monkeypatch.setattr(conversation, "clock_for", lambda device: clock)
    _, _, made = measure(Echo(), builds=True)
    assert made["seconds"] == pytest.approx(28.0)


def test_a_strategy_that_builds_nothing_has_no_compile_seconds(monkeypatch, undisturbed):
    clock = Scripted([30.0] * 3 + [2.0] * 9)
    monkeypatch.setattr(conversation, "clock_for", lambda device: clock)
    _, _, made = measure(Echo())
    assert made["seconds"] == 0.0


# Memory ---------------------------------------------------------------------------------------


class Meter:
    """Says a peak that names the turn, and remembers what was asked of it."""

    def __init__(self, supported: bool = True) -> None:
        self.supported = supported
        self.calls: list[str] = []

    def settle(self) -> None:
        self.calls.append("settle")

    def start(self) -> None:
        self.calls.append("start")

    def peak(self) -> tuple[int, int | None]:
        self.calls.append("peak")
        return 100 * self.calls.count("peak"), None


def test_memory_is_measured_in_a_pass_and_a_session_of_its_own():
    meter, sessions = Meter(), []

    def open_session() -> Echo:
        sessions.append(Echo())
        return sessions[-1]

    turns = [conversation.Turn() for _ in TALK.requests]
    conversation.measure_memory(open_session, TALK, "cpu", meter, turns)
    assert meter.calls == ["settle", *["start", "peak"] * 3]
    assert [turn.peak_memory_bytes for turn in turns] == [100, 200, 300]
    assert [turn.kv_bytes for turn in turns] == [0, 0, 0]
    assert not any(turn.samples for turn in turns)
    assert [session.closed for session in sessions] == [True]


def test_where_peaks_cannot_be_read_the_caches_bytes_still_are():
    turns = [conversation.Turn() for _ in TALK.requests]
    conversation.measure_memory(Echo, TALK, "cpu", Meter(supported=False), turns)
    assert [turn.peak_memory_bytes for turn in turns] == [None] * 3
    assert [turn.kv_bytes for turn in turns] == [0, 0, 0]


def test_peaks_can_be_read_in_the_timed_conversations_and_not_in_the_cold_ones(undisturbed):
    meter = Meter()
    turns, _, _ = measure(Echo(), iterations=2, meter=meter)
    assert meter.calls.count("start") == meter.calls.count("peak") == 2 * 3
    assert [turn.peak_memory_bytes for turn in turns] == [400, 500, 600]
    assert [turn.kv_bytes for turn in turns] == [0, 0, 0]


# Slowing down ---------------------------------------------------------------------------------


def test_a_slowed_session_takes_the_known_share_longer_per_token(monkeypatch):
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 0.001
        return now

    class Slow(Echo):
        def generate(self, token_ids, max_new_tokens, on_token) -> Generation:
            nonlocal now
            for _ in range(max_new_tokens):
                now += 100.0
                on_token()
            return Generation([1] * max_new_tokens, None)

    monkeypatch.setattr(conversation.time, "perf_counter", tick)
    called = []
    conversation.SlowedSession(Slow(), 0.05).generate([1], 10, lambda: called.append(now))
    assert len(called) == 10
    assert now == pytest.approx(10 * 105.0, rel=1e-3)


# Cells ----------------------------------------------------------------------------------------

SCENARIO = Scenario(
    id="talk",
    kind="conversation",
    title="Talk",
    system="You are the assistant of Acme.",
    turns=(
        Turn("How do I open an account?", "With two documents."),
        Turn("And online?", "Yes."),
    ),
)


@pytest.fixture
def run(tiny_folder, tmp_path, facts, undisturbed):
    """Measure one small cell of the tiny model under a strategy."""
    prompts, environment = tmp_path / "prompts.json", tmp_path / "cpu.json"
    prompts.write_text(json.dumps(tokens.prompts(tiny_folder, SCENARIO)))
    environment.write_text(json.dumps(facts))

    def run(strategy: str, **fields: object) -> dict:
        block = {
            "name": "test",
            "models": ["tiny"],
            "scenarios": ["talk"],
            "strategies": [strategy],
            "turns": 2,
            "max_new_tokens": 6,
            "iterations": 2,
        }
        config = configuration.fill({"kv": {"experiments": [block], "quiet_wait_s": 0}}, "test")
        planned = configuration.plan_kv(config, {"talk": SCENARIO}, {"tiny": {}}, "test")
        (cell,) = (cell.as_dict() | fields for cell in planned.values())
        return conversation.run_cell(cell, tiny_folder, prompts, environment, "0" * 16, 1)

    return run


def test_a_cells_record_keeps_its_contract(run, tmp_path):
    record = run("dynamic")
    records.write(tmp_path / "r1.json", record)
    assert records.read(tmp_path / "r1.json") == record
    assert record["status"] == "ok"
    assert [len(turn["samples"]) for turn in record["turns"]] == [2, 2]
    assert [len(turn["cold"]) for turn in record["turns"]] == [1, 1]
    assert record["cell"]["threads"] == 1
    assert record["cell"]["kind"] == "conversation"


@pytest.mark.parametrize("strategy", ["none", "dynamic", "static"])
def test_a_cell_measures_the_predicted_kv_bytes(run, strategy):
    for turn in run(strategy)["turns"]:
        assert turn["kv_bytes"] == turn["kv_bytes_predicted"]
        assert turn["peak_memory_bytes"] is not None


def test_exact_cells_have_equal_token_digests(run):
    digests = {
        strategy: [turn["token_digest"] for turn in run(strategy)["turns"]]
        for strategy in ("none", "dynamic", "static")
    }
    assert digests["none"] == digests["dynamic"] == digests["static"]
    assert len(set(digests["none"])) == 2


def test_memory_measured_beside_the_time_is_that_of_a_pass_of_its_own(run):
    apart, beside = (run("static", memory=memory)["turns"] for memory in ("separate", "timed"))
    assert [turn["kv_bytes"] for turn in beside] == [turn["kv_bytes"] for turn in apart]
    assert all(turn["peak_memory_bytes"] is not None for turn in beside)


@pytest.mark.parametrize("memory", ["separate", "timed"])
def test_the_baseline_is_the_loaded_model_without_the_strategys_cache(run, monkeypatch, memory):
    calls = []
    static, settle = type(strategies.get("static")), CpuMemory.settle
    opening = static.session

    def session(self, model, max_length):
        calls.append("session")
        return opening(self, model, max_length)

    monkeypatch.setattr(static, "session", session)
    monkeypatch.setattr(CpuMemory, "settle", lambda self: (calls.append("settle"), settle(self)))
    assert run("static", memory=memory)["status"] == "ok"
    measured = calls[calls.index("settle") :]
    assert measured == ["settle", "session"]


def test_a_slowed_cell_makes_the_same_tokens_and_says_so(run):
    slowed, plain = run("dynamic", slowdown=0.05), run("dynamic")
    assert slowed["cell"]["slowdown"] == 0.05
    digests = [[turn["token_digest"] for turn in r["turns"]] for r in (slowed, plain)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("tokens", "reference", "exact"),
    [
        ([300, 301, 2, 9], [300, 301], True),
        ([300, 301], [300, 301, 302], True),
        ([300, 2], [300, 301], False),
        ([300, 301, 302], [300, 301], False),
        ([300, 305], [300, 301], False),
    ],
)
def test_a_reply_is_exact_when_it_is_the_reference_as_far_as_it_goes(
    tiny, tokens, reference, exact
):
    assert conversation._recites(tiny, tokens, reference) is exact


def test_prompts_of_a_cell_grow_by_history_question_and_reply(run, tiny_folder):
    document = tokens.prompts(tiny_folder, SCENARIO)
    first, second = (turn["prompt_tokens"] for turn in run("dynamic")["turns"])
    assert first == len(document["first"])
    assert second == first + 6 + len(document["next"][0])


def test_an_unsupported_strategy_is_recorded_with_its_reason(run, tmp_path):
    record = run("offloaded")
    assert (record["status"], record["turns"]) == ("unsupported", [])
    assert "cuda" in record["reason"]
    records.write(tmp_path / "r1.json", record)


def broken(monkeypatch, error: BaseException) -> None:
    def session(*_: object) -> Session:
        raise error

    monkeypatch.setattr(type(strategies.get("dynamic")), "session", session)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("the kernel\n refused"), "failed"),
        (ZeroDivisionError("x"), "failed"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), "out_of_memory"),
    ],
)
def test_a_failure_inside_a_cell_is_data(run, monkeypatch, tmp_path, error, status):
    broken(monkeypatch, error)
    record = run("dynamic")
    assert (record["status"], record["turns"]) == (status, [])
    assert record["reason"].startswith(type(error).__name__)
    assert "\n" not in record["reason"]
    records.write(tmp_path / "r1.json", record)


def test_memory_that_torch_cannot_get_is_out_of_memory(run, monkeypatch):
    import torch

    def session(*_: object) -> Session:
        return torch.empty(2**60)

    monkeypatch.setattr(type(strategies.get("dynamic")), "session", session)
    assert run("dynamic")["status"] == "out_of_memory"


@pytest.mark.parametrize("error", [InputError("x: y"), KeyboardInterrupt()])
def test_what_is_no_failure_of_the_cell_makes_no_record(run, monkeypatch, error):
    broken(monkeypatch, error)
    with pytest.raises(type(error)):
        run("dynamic")


def test_a_strategy_that_fails_half_way_leaves_no_half_measured_turns(run, monkeypatch):
    def measure_memory(*_: object) -> None:
        raise RuntimeError("the memory pass failed")

    monkeypatch.setattr(conversation, "measure_memory", measure_memory)
    assert run("dynamic")["turns"] == []
