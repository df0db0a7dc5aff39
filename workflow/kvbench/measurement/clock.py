"""Stamps for the start, every token and the end of a turn, without a synchronisation per token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

#: Seconds after which a turn hands the machine to the others of its block (:class:`Clock`).
SLICE_S = 1.0


@dataclass(frozen=True)
class Timing:
    """Times of one turn, in seconds.

    Attributes
    ----------
    e2e_s:
        End-to-end latency: from handing over the prompt until all tokens are on the host.
    ttft_s:
        Time to first token.
    itl_s:
        Gaps between consecutive tokens (inter-token latencies), one fewer than there are tokens.
    """

    e2e_s: float
    ttft_s: float
    itl_s: list[float]


class Clock:
    """Stamps one turn on a CPU with ``time.perf_counter``; it stands while the turn rests.

    A turn that takes half a minute would be compared with another of half a minute ago, in another
    weather. So it rests behind the first token that comes :data:`SLICE_S` after it began or went on.

    Parameters
    ----------
    rest:
        Returns when the turn may go on. Without it a turn is taken in one piece.

    Attributes
    ----------
    rested_s:
        Seconds that the turn has rested.
    """

    rested_s = 0.0

    def __init__(self, rest: Callable[[], None] | None = None) -> None:
        self._rest = rest

    def start(self) -> None:
        """Begin the turn."""
        self._stamps: list[float] = []
        self.rested_s = 0.0
        self._start = self._since = time.perf_counter()

    def on_token(self) -> None:
        """Stamp a token that exists now, and rest if it is time."""
        now = time.perf_counter()
        self._stamps.append(now - self.rested_s)
        if self._rest and now - self._since >= SLICE_S:
            self._rest()
            self._since = time.perf_counter()
            self.rested_s += self._since - now

    def finish(self, stamps: list[float] | None = None) -> Timing:
        """End the turn; ``stamps`` replaces the tokens' stamps where an engine took them itself."""
        end = time.perf_counter() - self.rested_s
        tokens = stamps if stamps is not None else self._stamps
        return _timing(tokens[0] - self._start, tokens, end - self._start)


class CudaClock:
    """Stamps one turn on a GPU with recorded events; the host waits once, at the end.

    A token's event is recorded right behind the kernels that make it, so it carries the moment at
    which the GPU has the token, however far ahead the host runs. End-to-end latency is the host's
    clock around work and synchronisation.
    """

    rested_s = 0.0

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda

    def start(self) -> None:
        """Begin the turn on an idle device."""
        self._cuda.synchronize()
        self._events = []
        self._begin = self._cuda.Event(enable_timing=True)
        self._start = time.perf_counter()
        self._begin.record()

    def on_token(self) -> None:
        """Record an event behind the kernels that made a token."""
        event = self._cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def finish(self, stamps: list[float] | None = None) -> Timing:
        """End the turn; ``stamps`` replaces the tokens' events where an engine took them itself."""
        self._cuda.synchronize()
        e2e = time.perf_counter() - self._start
        if stamps is not None:
            return _timing(stamps[0] - self._start, stamps, e2e)
        times = [self._begin.elapsed_time(event) / 1e3 for event in self._events]
        return _timing(times[0], times, e2e)


def _timing(ttft: float, stamps: list[float], e2e: float) -> Timing:
    gaps = [max(0.0, later - earlier) for earlier, later in pairwise(stamps)]
    return Timing(e2e, ttft, gaps)


def clock_for(device: str, rest: Callable[[], None] | None = None) -> Clock | CudaClock:
    """The clock of a device; work that a GPU has been given goes on whoever rests."""
    return CudaClock() if device == "cuda" else Clock(rest)
