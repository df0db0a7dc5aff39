"""One cell in its process: warm-up, turns on the clock, and the passes for memory and quality."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Sequence

import pytest
from kvbench import strategies
from kvbench.errors import InputError, Unsupported
from kvbench.measurement import cell as cells
from kvbench.measurement import conversation
from kvbench.measurement.cell import Cell, Failure, Job, failure
from kvbench.measurement.clock import Timing
from kvbench.measurement.memory import CpuMemory
from kvbench.strategies.base import Generation, Session
from talk import write_prompts


@pytest.fixture
def prompts(tiny_folder, tmp_path):
    return write_prompts(tmp_path / "prompts.json", tiny_folder)


@pytest.fixture
def make(tiny, tiny_folder, prompts) -> Callable[..., Cell]:
    """A cell of the tiny model, two turns of six tokens."""

    def make(strategy: str = "dynamic", **fields: object) -> Cell:
        given = {
            "measured": strategy,
            "device": "cpu",
            "dtype": "float32",
            "turns": 2,
            "max_new_tokens": 6,
            "max_prompt_tokens": None,
            "warmup": 1,
            "memory": "separate",
            "slowdown": 0.0,
            "quality": False,
            "profile": False,
        }
        return Cell(Job(given | fields, tiny_folder, prompts, 1), tiny)

    return make


def measured(cell: Cell, rounds: int = 2) -> tuple[list, list, dict]:
    """Open, warm up, play some rounds, finish: cold samples, samples by round, and the rest."""
    cell.open()
    cold, samples = cell.warm_up(), []
    for _ in range(rounds):
        cell.begin(1)
        samples.append([cell.turn(0), cell.turn(1)])
    return cold, samples, cell.finish()


class Fixed(Session):
    """A session that gives tokens without a model, and compiles where the test says so."""

    def __init__(self, compiling: Iterable[int] = ()) -> None:
        self.turns = self.graphs = 0
        self.gc: list[bool] = []
        self.closed = 0
        # Conversations of two turns, counted from 0.
        self._compiling = {2 * number for number in compiling}

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        self.graphs += self.turns in self._compiling
        self.turns += 1
        self.gc.append(gc.isenabled())
        for _ in range(max_new_tokens):
            on_token()
        return Generation([5] * max_new_tokens, None)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def session(monkeypatch):
    """Put a given session in the place of the dynamic strategy's."""

    def session(given: Fixed, compiled: bool = False) -> Fixed:
        dynamic = type(strategies.get("dynamic"))
        monkeypatch.setattr(dynamic, "session", lambda *_: given)
        monkeypatch.setattr(dynamic, "compiled", lambda *_: compiled)
        counter = type("Graphs", (), {"__init__": lambda *_: None, "count": lambda _: given.graphs})
        monkeypatch.setattr(cells, "_Graphs", counter)
        return given

    return session


# Turns ----------------------------------------------------------------------------------------


def test_a_turn_gives_its_times_and_one_gap_less_than_tokens(make):
    _, samples, _ = measured(make())
    for turn in (turn for round in samples for turn in round):
        assert 0 < turn["ttft_s"] <= turn["e2e_s"]
        assert len(turn["itl_s"]) == 5
        assert turn["disturbed"] is False


def test_cold_conversations_are_kept_apart(make, session):
    given = session(Fixed())
    cold, _, _ = measured(make(warmup=3), rounds=1)
    assert [[sample["iteration"] for sample in turn] for turn in cold] == [[0, 1, 2]] * 2
    assert given.turns == 2 * (3 + 1 + 1)


def test_without_a_warm_up_nothing_is_cold(make):
    cold, samples, _ = measured(make(warmup=0))
    assert cold == [[], []]
    assert len(samples) == 2


def test_every_round_is_the_same_conversation_from_its_start(make):
    one, two = (measured(make(), rounds=rounds)[2]["turns"] for rounds in (1, 2))
    assert [turn["token_digest"] for turn in one] == [turn["token_digest"] for turn in two]
    assert [turn["prompt_tokens"] for turn in one] == [turn["prompt_tokens"] for turn in two]


def test_prompts_grow_by_history_question_and_reply(make, prompts):
    document = json.loads(prompts.read_text())
    first, second = (turn["prompt_tokens"] for turn in measured(make())[2]["turns"])
    assert first == len(document["first"])
    assert second == first + 6 + len(document["next"][0])


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
    assert cells._recites(tiny, tokens, reference) is exact


def test_garbage_is_collected_before_a_round_and_not_during_its_turns(make, session):
    given = session(Fixed())
    measured(make())
    # One cold conversation, two rounds, one conversation for memory.
    assert given.gc == [True] * 2 + [False] * 4 + [True] * 2
    assert gc.isenabled()


# Compiling ------------------------------------------------------------------------------------


def test_warming_up_goes_on_until_no_graph_is_made(make, session):
    session(Fixed([0, 1]), compiled=True)
    cold, samples, found = measured(make())
    assert len(cold[0]) == 3
    assert found["compile"] == {"graphs": 2, "recompiles": 0}
    assert not any(turn["disturbed"] for round in samples for turn in round)


def test_warming_up_ends_even_when_every_conversation_compiles(make, session):
    session(Fixed(range(99)), compiled=True)
    cold, _, _ = measured(make())
    assert len(cold[0]) == cells.MOST_WARMUPS


def test_a_graph_made_in_a_round_is_counted_and_its_turn_marked(make, session):
    # Two warm-ups: the second shows that the first has compiled everything.
    session(Fixed([0, 2]), compiled=True)
    _, samples, found = measured(make())
    assert found["compile"]["recompiles"] == 1
    marks = [[turn["disturbed"] for turn in round] for round in samples]
    assert marks == [[True, False], [False, False]]


# Memory ---------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """What has happened so far: a session of the static cache was opened, memory settled."""
    noted: list[str] = []
    static, settle = type(strategies.get("static")), CpuMemory.settle
    opening = static.session

    def opened(self, model, max_length):
        noted.append("session")
        return opening(self, model, max_length)

    monkeypatch.setattr(static, "session", opened)
    monkeypatch.setattr(CpuMemory, "settle", lambda self: (noted.append("settle"), settle(self)))
    return noted


@pytest.mark.parametrize("strategy", ["none", "dynamic", "static"])
def test_a_cell_measures_the_predicted_kv_bytes(make, strategy):
    for turn in measured(make(strategy))[2]["turns"]:
        assert turn["kv_bytes"] == turn["kv_bytes_predicted"]
        assert turn["peak_memory_bytes"] is not None


def test_memory_is_measured_in_a_session_of_its_own_after_the_rounds(make, calls):
    measured(make("static"))
    assert calls == ["session", "settle", "session"]


def test_timed_memory_settles_before_the_strategy_allocates_anything(make, calls):
    found = measured(make("static", memory="timed"))[2]
    assert calls == ["settle", "session"]
    assert all(turn["peak_memory_bytes"] is not None for turn in found["turns"])


def test_bytes_read_beside_the_time_are_those_of_a_pass_of_its_own(make):
    apart, beside = (
        measured(make("static", memory=memory))[2]["turns"] for memory in ("separate", "timed")
    )
    assert [turn["kv_bytes"] for turn in beside] == [turn["kv_bytes"] for turn in apart]


def test_where_peaks_cannot_be_read_the_caches_bytes_still_are(make, monkeypatch):
    monkeypatch.setattr(CpuMemory, "supported", False)
    for turn in measured(make("static"))[2]["turns"]:
        assert turn["peak_memory_bytes"] is None
        assert turn["kv_bytes"] > 0


# Slowing down ---------------------------------------------------------------------------------


def test_a_slowed_cell_runs_its_strategy_through_a_slowed_session(make, monkeypatch):
    made: list[float] = []

    class Slowed(conversation.SlowedSession):
        def __init__(self, session: Session, slowdown: float, rested_s: Callable) -> None:
            made.append(slowdown)
            super().__init__(session, slowdown, rested_s)

    monkeypatch.setattr(cells, "SlowedSession", Slowed)
    measured(make(slowdown=0.05))
    measured(make())
    assert made == [0.05]


# How a cell ends ------------------------------------------------------------------------------


def test_a_strategy_that_cannot_run_here_says_why(make):
    with pytest.raises(Unsupported, match="cuda"):
        make("offloaded").open()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Unsupported("no"), Failure("unsupported", "no")),
        (
            RuntimeError("the kernel\n refused"),
            Failure("failed", "RuntimeError: the kernel refused"),
        ),
        (MemoryError(), Failure("out_of_memory", "MemoryError: ")),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            Failure("out_of_memory", "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"),
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: x"),
            Failure("out_of_memory", "RuntimeError: DefaultCPUAllocator: can't allocate memory: x"),
        ),
    ],
)
def test_what_an_exception_means_for_the_record(error, expected):
    assert failure(error) == expected


def test_wrong_inputs_are_no_failure_of_the_cell():
    with pytest.raises(InputError, match="x: y"):
        failure(InputError("x: y"))


def test_the_clock_is_the_devices_own(make, monkeypatch):
    class Clock:
        def start(self) -> None:
            self._tokens = 0

        def on_token(self) -> None:
            self._tokens += 1

        def finish(self, stamps: list[float] | None = None) -> Timing:
            return Timing(3.0, 1.0, [0.4] * (self._tokens - 1))

    monkeypatch.setattr(conversation, "clock_for", lambda device, rest: Clock())
    _, samples, _ = measured(make(), rounds=1)
    assert [turn["e2e_s"] for turn in samples[0]] == [3.0, 3.0]
