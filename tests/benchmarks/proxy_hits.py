"""What a hit of the caching proxy costs: latency at a stated load, hits a second, processor time a hit.

    PYTHONPATH=workflow python tests/benchmarks/proxy_hits.py

What is asked of it: at most 1 ms at the 99th percentile with 50 clients at once, and 1,000 hits a
second of one core. Clients that ask again at once (a closed loop) keep a server busy whatever it can
do, and 50 of them wait 50 times its work by arithmetic: their latency says nothing that their
throughput does not. So the latency is measured at the load that is asked for: 1,000 requests a
second over 50 open connections, at random moments (Poisson), counted from the moment at which a
request was *due*, so that a proxy that falls behind cannot hide it. The throughput is that of the
closed loop. Both are repeated in blocks that take turns between the proxies that are compared; a
value is the median over blocks with its distribution-free 95 % interval.

The proxy has one core for itself and the load another one, where it spins: what the load itself
was late is printed beside the latencies, which contain it. Questions are asked in turn out of 100
different ones, and every answer is checked to be a whole one. Another proxy is started, bound and
asked in the same way with ``--other-command`` and ``--other-url`` (docs/proxy.md has LiteLLM's).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests" / "unit")]

import bounds  # noqa: E402
import fake_openai  # noqa: E402
from kvbench.analysis import intervals  # noqa: E402
from kvbench.measurement import placement  # noqa: E402

CLIENTS = 50
#: Different questions, asked in turn.
QUESTIONS = 100
#: Requests a second at which the latency is measured, and the latency that is asked for.
RATE = 1000.0
ASKED_S = 1e-3
#: Hits a second that are asked of one core.
ASKED_PER_S = 1000.0
#: Seconds of one block of either kind.
SECONDS = 3.0
#: Longest wait for an answer.
PATIENCE_S = 30.0

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def requests(host: str, model: str) -> list[bytes]:
    """Return the chat requests of the load."""
    found = []
    for number in range(QUESTIONS):
        question = f"How long is the warranty on lamp {number}? " * 8
        body = json.dumps(
            {
                "model": model,
                "temperature": 0,
                "messages": [
                    {"role": "system", "content": "You answer in one sentence."},
                    {"role": "user", "content": question},
                ],
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer k\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        found.append(head.encode() + body)
    return found


class Load:
    """Connections that are kept, and requests over them; plain sockets, so that it costs little."""

    def __init__(self, host: str, port: int, data: Sequence[bytes]) -> None:
        self._data, self._next = data, 0
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._read: dict[int, bytes] = {}
        for _ in range(CLIENTS):
            one = socket.create_connection((host, port))
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets[one.fileno()] = one
            self._poll.register(one, select.EPOLLIN)

    def close(self) -> None:
        """Close the connections."""
        self._poll.close()
        for one in self._sockets.values():
            one.close()

    def warm_up(self) -> None:
        """Ask every question once, and let every connection ask."""
        names = list(self._sockets)
        for number in range(max(QUESTIONS, CLIENTS)):
            self._send(names[number % CLIENTS])
            end = time.perf_counter() + PATIENCE_S
            while not self._answered(0.1):
                self._check(end)

    def closed(self, seconds: float) -> float:
        """Return answers a second when every connection asks again at once."""
        start = time.perf_counter()
        end, count = start + seconds, 0
        for name in self._sockets:
            self._send(name)
        while (now := time.perf_counter()) < end:
            for name in self._answered(0.1):
                count += 1
                self._send(name)
        rate = count / (now - start)
        waiting = CLIENTS
        while waiting:
            waiting -= len(self._answered(0.1))
            self._check(end + PATIENCE_S)
        return rate

    def open(self, rate: float, seconds: float, seed: int) -> tuple[list[float], list[float]]:
        """Ask at random moments; return the seconds of each request, and by how much it was late.

        A request that finds every connection taken waits for one; it is not left out, and its
        seconds begin when it was due. Lateness is that of the load, with a connection free.
        """
        draw = random.Random(seed)
        free, due_at = deque(self._sockets), {}
        took: list[float] = []
        late: list[float] = []
        start = time.perf_counter()
        end = start + seconds
        due = start + draw.expovariate(rate)
        while due < end or due_at:
            now = time.perf_counter()
            waited = False
            while due <= now and due < end:
                if not free:
                    waited = True
                    break
                name = free.popleft()
                if not waited:
                    late.append(now - due)
                due_at[name] = due
                self._send(name)
                due += draw.expovariate(rate)
            for name in self._answered(0):
                took.append(time.perf_counter() - due_at.pop(name))
                free.append(name)
            self._check(end + PATIENCE_S)
        return took, late

    def _send(self, name: int) -> None:
        self._sockets[name].sendall(self._data[self._next])
        self._next = (self._next + 1) % len(self._data)

    def _answered(self, timeout: float) -> list[int]:
        """Return the connections whose answer is whole now."""
        whole = []
        for name, _ in self._poll.poll(timeout):
            piece = self._sockets[name].recv(65_536)
            data = self._read.pop(name, b"") + piece
            head, blank, body = data.partition(b"\r\n\r\n")
            length = _LENGTH.search(head)
            if not piece or not data.startswith(b"HTTP/1.1 200"[: len(data)]):
                raise SystemExit(f"the proxy answered {data[:80]!r}")
            if not blank:
                self._read[name] = data
                continue
            if length is None:
                raise SystemExit("an answer without a length: not a hit")
            if len(body) < int(length[1]):
                self._read[name] = data
            else:
                whole.append(name)
        return whole

    @staticmethod
    def _check(end: float) -> None:
        if time.perf_counter() > end:
            raise SystemExit(f"no answer within {PATIENCE_S:.0f} s")


@dataclass
class Subject:
    """One proxy: where it listens, its process, and what was measured of it, block by block."""

    name: str
    host: str
    port: int
    model: str
    process: subprocess.Popen
    upstream: fake_openai.Upstream
    rates: list[float] = field(default_factory=list)
    p50_s: list[float] = field(default_factory=list)
    p99_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    asked: int = 0
    missed: int = 0

    def block(self, rate: float, seconds: float, seed: int) -> None:
        """Measure once."""
        load = Load(self.host, self.port, requests(f"{self.host}:{self.port}", self.model))
        try:
            load.warm_up()
            calls = self.upstream.calls
            took, late = load.open(rate, seconds, seed)
            before = processor_s(self.process.pid)
            answers_s = load.closed(seconds)
            after = processor_s(self.process.pid)
        finally:
            load.close()
        self.p50_s.append(percentile(took, 50))
        self.p99_s.append(percentile(took, 99))
        self.late_s.append(percentile(late, 99))
        self.rates.append(answers_s)
        self.cpu_s.append((after - before) / (answers_s * seconds))
        self.asked += len(took) + round(answers_s * seconds)
        self.missed += self.upstream.calls - calls

    def report(self, rate: float) -> str:
        """Return the lines on this proxy; the last two are the verdicts."""
        quick = bounds.judge(*ends(self.p99_s), most=ASKED_S)
        if quick == bounds.NOT_MET and percentile(self.late_s, 50) > ASKED_S:
            # The latencies contain what the load itself was late, which is no fault of the proxy's.
            quick = bounds.CANNOT_TELL
        lines = [
            f"{self.name}: {len(self.rates)} blocks, {self.asked} requests,"
            f" {self.missed} of them reached the server",
            f"  latency of a hit, {rate:.0f} a second at random moments over {CLIENTS} connections:"
            f" {shown(self.p50_s, 1e3)} ms at the median,"
            f" {shown(self.p99_s, 1e3)} ms at the 99th percentile"
            f" (the load itself was {percentile(self.late_s, 50) * 1e3:.2f} ms late at its 99th)",
            f"  {CLIENTS} connections that ask again at once: {shown(self.rates)} hits a second"
            f" ({CLIENTS / percentile(self.rates, 50) * 1e3:.1f} ms each, by arithmetic),"
            f" {shown(self.cpu_s, 1e6)} us of the processor a hit",
            bounds.line(
                quick,
                f"{self.name} at most {ASKED_S * 1e3:.0f} ms at the 99th percentile",
                f"{shown(self.p99_s, 1e3)} ms",
            ),
            bounds.line(
                bounds.judge(*ends(self.rates), least=ASKED_PER_S),
                f"{self.name} at least {ASKED_PER_S:.0f} hits a second of one core",
                shown(self.rates),
            ),
        ]
        return "\n".join(lines)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` per cent of them lie, by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share / 100))]


def shown(values: Sequence[float], factor: float = 1.0) -> str:
    """Return median and interval; without one, the range."""
    middle, ends = intervals.median(values)
    low, high = ends if ends else (min(values), max(values))
    return f"{middle * factor:.4g} [{low * factor:.4g}, {high * factor:.4g}]"


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the median's interval, NaN where there are too few for one."""
    return intervals.median(values)[1] or (math.nan, math.nan)


def processor_s(number: int) -> float:
    """Return the processor seconds that a process and its threads have used."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cores() -> tuple[int, int] | None:
    """Return the core of the proxies and that of the load; None where there are no two to be had."""
    there = placement.processors()
    return (there[-1], there[0]) if len(there) > 1 else None


@contextlib.contextmanager
def started(command: Sequence[str], core: int, **more: object) -> Iterator[subprocess.Popen]:
    """Run a proxy in a process group of its own, bound to one core."""
    process = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        **more,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def ours(upstream: fake_openai.Upstream, core: int) -> Iterator[Subject]:
    """Run this project's proxy with its answers in memory."""
    command = [sys.executable, "-m", "kvbench.caching.proxy", "--upstream", upstream.url]
    with started(
        [*command, "--listen", "127.0.0.1:0"],
        core,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "workflow")},
    ) as process:
        assert process.stdout is not None
        address = urlsplit(process.stdout.readline().split()[-1])
        yield Subject("kvbench", str(address.hostname), address.port or 0, "m", process, upstream)
        process.stdout.close()


@contextlib.contextmanager
def other(
    command: str, url: str, model: str, upstream: fake_openai.Upstream, core: int
) -> Iterator[Subject]:
    """Run another proxy, and wait until something listens where it should."""
    address = urlsplit(url)
    host, port = address.hostname or "", address.port or 80
    with started(shlex.split(command), core, stdout=subprocess.DEVNULL) as process:
        end = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"nothing listens on {url}")
            time.sleep(0.5)
        yield Subject("other", host, port, model, process, upstream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=10, help="repetitions")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each half of a block")
    parser.add_argument("--rate", type=float, default=RATE, help="requests a second of the latency")
    parser.add_argument("--upstream-port", type=int, default=0, help="where the upstream listens")
    parser.add_argument("--other-command", help="starts another proxy, in the foreground")
    parser.add_argument("--other-url", default="http://127.0.0.1:4000", help="where it listens")
    parser.add_argument("--other-model", default="m", help="model name that it knows")
    parser.add_argument("--other-rate", type=float, help="its requests a second (default: --rate)")
    options = parser.parse_args()
    if options.blocks < 1 or options.seconds <= 0:
        parser.error("needs a block and some seconds")
    if (found := cores()) is None:
        needs = "not run: needs Linux and two cores, one for the proxy and one for the load"
        print(bounds.line(bounds.CANNOT_TELL, f"a hit within {ASKED_S * 1e3:.0f} ms", needs))
        return
    core, own = found
    with fake_openai.serving(options.upstream_port) as upstream, contextlib.ExitStack() as stack:
        subjects = [stack.enter_context(ours(upstream, core))]
        rates = [options.rate]
        if options.other_command:
            named = options.other_command, options.other_url, options.other_model
            subjects.append(stack.enter_context(other(*named, upstream, core)))
            rates.append(options.other_rate or options.rate)
        os.sched_setaffinity(0, {own})
        for number in range(options.blocks):
            for subject, rate in zip(subjects, rates, strict=True):
                subject.block(rate, options.seconds, seed=number)
        for subject, rate in zip(subjects, rates, strict=True):
            print(subject.report(rate))


if __name__ == "__main__":
    main()
