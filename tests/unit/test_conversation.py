"""A conversation: its turns, its history, and what a turn hands over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from kvbench.measurement import conversation
from kvbench.measurement.conversation import Request, Script, Talk
from kvbench.strategies.base import Generation, Session

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


def converse(session: Session, turns: Script = TALK, **given: object) -> list[conversation.Turn]:
    """Take every turn once."""
    talk = Talk(session, turns, "cpu", **given)
    return [talk.turn(index) for index in range(len(turns.requests))]


# History --------------------------------------------------------------------------------------


def test_history_grows_by_the_very_tokens_that_were_generated():
    session = Echo()
    converse(session)
    first, second, third = session.prompts
    assert first == [1, 2, 3]
    assert second == [*first, 1000, 1001, 1002, 1003, 7, 8]
    assert third == [*second, 2000, 2001, 2002, 2003, 9]


def test_the_steps_of_a_fixed_scenario_are_independent():
    session = Echo()
    converse(session, STEPS)
    assert session.prompts == [[1, 2, 3], [7, 8]]
    assert session.restarts >= 2


def test_turn_0_starts_the_conversation_again():
    session = Echo()
    talk = Talk(session, TALK, "cpu")
    for index in (0, 1, 2, 0, 1):
        talk.turn(index)
    assert session.prompts[3] == [1, 2, 3]
    assert session.prompts[4] == [1, 2, 3, 4000, 4001, 4002, 4003, 7, 8]
    assert session.restarts == 2


def test_a_turn_hands_over_its_whole_prompt_its_tokens_and_its_times():
    turn = converse(Echo())[1]
    assert turn.prompts == [[1, 2, 3, 1000, 1001, 1002, 1003, 7, 8]]
    assert turn.generation.tokens == [2000, 2001, 2002, 2003]
    assert 0 < turn.timing.ttft_s <= turn.timing.e2e_s
    assert [len(turn.timing.itl_s) for turn in converse(Echo(), STEPS)] == [3, 1]


def test_what_has_to_happen_before_a_turn_happens_before_each():
    calls: list[str] = []

    class Telling(Echo):
        def generate(self, *arguments: object) -> Generation:
            calls.append("turn")
            return super().generate(*arguments)

    converse(Telling(), before_turn=lambda: calls.append("before"))
    assert calls == ["before", "turn"] * 3


@pytest.mark.parametrize("short", [1, -1])
def test_a_reply_of_the_wrong_length_is_an_error(short):
    with pytest.raises(RuntimeError, match=rf"turn 1: {4 - short} tokens came back, 4 were asked"):
        converse(Echo(short))


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


# Slowing down ---------------------------------------------------------------------------------


@pytest.fixture
def ticking(monkeypatch):
    """A clock that goes on by a tick whenever it is read, and by what a session says it took."""

    class Clock:
        now = 0.0

        def read(self) -> float:
            self.now += 0.001
            return self.now

    clock = Clock()
    monkeypatch.setattr(conversation.time, "perf_counter", clock.read)
    return clock


class Working(Echo):
    """Takes 100 s for each token, and 50 s when the last one is done."""

    def __init__(self, clock) -> None:
        super().__init__()
        self._clock = clock

    def generate(self, token_ids, max_new_tokens, on_token) -> Generation:
        for _ in range(max_new_tokens):
            self._clock.now += 100.0
            on_token()
        self._clock.now += 50.0
        return Generation([1] * max_new_tokens, None)


def test_a_slowed_session_takes_the_known_share_of_a_whole_turn_longer(ticking):
    session = conversation.SlowedSession(Working(ticking), 0.05)
    session.generate([1], 10, lambda: None)
    assert ticking.now == pytest.approx(1050.0 * 1.05, rel=1e-5)
    assert session.injected_s == pytest.approx(1050.0 * 0.05, abs=0.01)


def test_a_slowed_session_idles_only_when_all_of_the_turn_is_done(ticking):
    stamps: list[float] = []
    session = conversation.SlowedSession(Working(ticking), 0.05)
    session.generate([1], 10, lambda: stamps.append(ticking.now))
    assert stamps == pytest.approx([100.0 * (n + 1) for n in range(10)], abs=0.01)


def test_the_injected_share_is_that_of_every_turn_anew(ticking):
    session = conversation.SlowedSession(Working(ticking), 0.1)
    for tokens in (10, 2):
        session.generate([1], tokens, lambda: None)
    assert session.injected_s == pytest.approx(0.1 * 250.0, abs=0.01)


def test_a_slowed_session_does_not_idle_for_the_time_it_rested(ticking):
    session = conversation.SlowedSession(Working(ticking), 0.1, lambda: 300.0)
    session.generate([1], 10, lambda: None)
    assert session.injected_s == pytest.approx(0.1 * (1050.0 - 300.0), abs=0.01)
