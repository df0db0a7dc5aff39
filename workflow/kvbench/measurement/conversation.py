"""A conversation under a strategy: its turns, and one turn at a time on the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbench.layout import EQUAL, MIXED
from kvbench.measurement.clock import Timing, clock_for
from kvbench.strategies.base import Generation, Session


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
    """The turns of a cell, and the length of the longest context they reach.

    Attributes
    ----------
    requests, kind:
        The turns of the first row, whose prompts are the longest, and whether they are a conversation.
    batch, lengths:
        Rows that are generated for at once, and whether their prompts are ``equal``ly long or ``mixed``.
    """

    requests: list[Request]
    kind: str
    batch: int = 1
    lengths: str = EQUAL

    @property
    def max_length(self) -> int:
        """Tokens of the longest context; no cache needs more room."""
        longest = context = 0
        for request in self.requests:
            context = (context if request.continues else 0) + len(request.prompt)
            context += request.new_tokens
            longest = max(longest, context)
        return longest

    def opening(self, row: int, prompt: Sequence[int]) -> list[int]:
        """What a row of the batch begins with where the first one begins with ``prompt``.

        Rows differ, so that no cache can share them and a row in another's place would be noticed. Of
        equal lengths, a row begins as many tokens into the prompt as its number says, and what it skipped
        stands at the end; of mixed ones it lacks up to half of the prompt's beginning, evenly spread.
        """
        if self.lengths == MIXED:
            return list(prompt[row * len(prompt) // (2 * self.batch) :])
        start = row % len(prompt)
        return [*prompt[start:], *prompt[:start]]


def script(document: Mapping[str, Any], cell: Mapping[str, Any]) -> Script:
    """Lay out the turns of a cell from a scenario's token ids (:func:`kvbench.inputs.tokens.prompts`)."""
    batch, lengths = cell.get("batch", 1), cell.get("lengths", EQUAL)
    if document["kind"] == "fixed":
        limit = cell["max_prompt_tokens"]
        return Script(
            [
                Request(step["prompt"], False, step["new_tokens"])
                for step in document["steps"]
                if limit is None or len(step["prompt"]) <= limit
            ],
            "fixed",
            batch,
            lengths,
        )
    new = cell["max_new_tokens"]
    following = document["next"][: (cell["turns"] or len(document["next"]) + 1) - 1]
    return Script(
        [
            Request(document["first"], False, new),
            *(Request(ids, True, new) for ids in following),
        ],
        "conversation",
        batch,
        lengths,
    )


@dataclass(frozen=True)
class Turn:
    """One turn that was generated: the whole prompt of each row, what came back, and how long it took."""

    prompts: list[list[int]]
    generation: Generation
    timing: Timing

    @property
    def replies(self) -> list[list[int]]:
        """The new tokens of each row."""
        found = self.generation
        return [found.tokens] if found.rows is None else found.rows


class Talk:
    """A conversation that is taken up turn by turn, and from its start again at turn 0.

    History is kept as token ids: what was generated is never decoded and tokenised again, which
    would move token borders and break every cache. The session may stay where it is between two
    turns while another one works.

    Parameters
    ----------
    session:
        The strategy's session.
    turns:
        What to generate.
    device:
        Decides the clock.
    before_turn:
        Called right before the clock starts.
    rest:
        Lets the others of a block have the machine (:class:`kvbench.measurement.clock.Clock`).
    """

    def __init__(
        self,
        session: Session,
        turns: Script,
        device: str,
        before_turn: Callable[[], None] = lambda: None,
        rest: Callable[[], None] | None = None,
    ) -> None:
        self._session = session
        self._turns = turns
        self._clock = clock_for(device, rest)
        self._before_turn = before_turn
        self._histories: list[list[int]] = [[] for _ in range(turns.batch)]

    @property
    def rested_s(self) -> float:
        """Seconds that the turn in flight, or the last one, rested."""
        return self._clock.rested_s

    def turn(self, index: int) -> Turn:
        """Generate turn ``index``; the turns before it have to come before it.

        Raises
        ------
        RuntimeError
            The session gave another number of tokens than it was asked for.
        """
        turns, request = self._turns, self._turns.requests[index]
        if index == 0 or not request.continues:
            self._session.restart()
            prompts = [turns.opening(row, request.prompt) for row in range(turns.batch)]
        else:
            prompts = [[*history, *request.prompt] for history in self._histories]
        on_token, new = self._clock.on_token, request.new_tokens
        self._before_turn()
        self._clock.start()
        if turns.batch == 1:
            generation = self._session.generate(prompts[0], new, on_token)
        else:
            generation = self._session.generate_batch(prompts, new, on_token)
        turn = Turn(prompts, generation, self._clock.finish(generation.stamps))
        for reply in turn.replies:
            if len(reply) != new:
                raise RuntimeError(
                    f"turn {index + 1}: {len(reply)} tokens came back, {new} were asked for"
                )
        self._histories = [
            [*prompt, *reply] for prompt, reply in zip(prompts, turn.replies, strict=True)
        ]
        return turn


class SlowedSession(Session):
    """A session that takes a known share longer per turn: what the instrument must notice.

    It idles once, when everything of the turn is done. Idling after every token as well would let the
    threads of the next token's operations fall asleep, and lengthen a turn by more than is asked for.

    Parameters
    ----------
    session:
        The session to slow down.
    slowdown:
        Share of its own time by which a turn is lengthened, such as 0.05.
    rested_s:
        Gives the seconds that the turn rested, which are not its own.

    Attributes
    ----------
    injected_s:
        Seconds that the last turn really idled.
    """

    def __init__(
        self, session: Session, slowdown: float, rested_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._session = session
        self._slowdown = slowdown
        self._rested_s = rested_s
        self.injected_s = 0.0

    def generate(
        self, token_ids: Sequence[int], max_new_tokens: int, on_token: Callable[[], None]
    ) -> Generation:
        """Generate one turn, and idle at its end for a share of the time it took."""
        begin = time.perf_counter()
        generation = self._session.generate(token_ids, max_new_tokens, on_token)
        done = now = time.perf_counter()
        until = done + self._slowdown * (done - begin - self._rested_s())
        while now < until:
            now = time.perf_counter()
        self.injected_s = now - done
        return generation

    def restart(self) -> None:
        """Restart the slowed session."""
        self._session.restart()

    def close(self) -> None:
        """Close the slowed session."""
        self._session.close()
