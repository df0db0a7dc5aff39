"""What a hit of the caching proxy costs: latency with 50 clients at once, and hits a second of one core.

    PYTHONPATH=workflow python tests/benchmarks/proxy_hits.py [--url http://127.0.0.1:4000/v1 --model m]

Two figures, because one load cannot show both: *latency* is measured while 50 connections together
ask at a steady rate (each connection's turn comes every tenth of a second, so that none waits for
its own last answer; a proxy that cannot keep up needs a lower ``--rate``); *throughput* is what 50
connections get that ask again at once. The proxy runs in a process of its own, bound to one core
where the system can do that; the clients share one process on the others. With ``--url`` another
proxy is asked in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests" / "unit")]

import fake_openai  # noqa: E402

CLIENTS = 50
SECONDS = 5.0


def request(host: str, model: str) -> bytes:
    """Return one chat request; all of them are equal, so that all but the first are hits."""
    body = json.dumps(
        {
            "model": model,
            "temperature": 0,
            "messages": [
                {"role": "system", "content": "You answer in one sentence."},
                {"role": "user", "content": "How long is the warranty on a lamp? " * 10},
            ],
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer k\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Connection:
    """A kept-alive connection that reads answers with a length; no client library in the way."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        return cls(*await asyncio.open_connection(host, port))

    async def ask(self, data: bytes) -> bytes:
        """Send a request, read the answer, and return its head."""
        self._writer.write(data)
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"the proxy answered {head.splitlines()[0].decode()}")
        lengths = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if lengths is None:
            raise SystemExit("an answer without a length: not a hit")
        await self._reader.readexactly(int(lengths[1]))
        return head

    def close(self) -> None:
        self._writer.close()


async def latencies(connections: list[Connection], data: bytes, rate: float) -> list[float]:
    """Return seconds of each request, at ``rate`` a second over all connections."""
    loop = asyncio.get_running_loop()
    interval = CLIENTS / rate
    start = loop.time() + 0.1
    found: list[float] = []

    async def one(number: int, connection: Connection) -> None:
        for turn in range(int(SECONDS / interval)):
            due = start + (turn + number / CLIENTS) * interval
            await asyncio.sleep(max(0.0, due - loop.time()))
            sent = loop.time()
            await connection.ask(data)
            found.append(loop.time() - sent)

    await asyncio.gather(*(one(n, c) for n, c in enumerate(connections)))
    return found


async def throughput(connections: list[Connection], data: bytes) -> float:
    """Return answers a second when every connection asks again at once."""
    end = time.perf_counter() + SECONDS

    async def one(connection: Connection) -> int:
        count = 0
        while time.perf_counter() < end:
            await connection.ask(data)
            count += 1
        return count

    counts = await asyncio.gather(*(one(connection) for connection in connections))
    return sum(counts) / SECONDS


async def measure(
    name: str, host: str, port: int, model: str, rate: float, upstream: fake_openai.Upstream
) -> None:
    """Print both figures of one proxy, and how many of the requests reached the server."""
    before = upstream.calls
    data = request(f"{host}:{port}", model)
    connections = [await Connection.open(host, port) for _ in range(CLIENTS)]
    for connection in connections:
        await connection.ask(data)
    times = await latencies(connections, data, rate)
    per_second = await throughput(connections, data)
    for connection in connections:
        connection.close()
    cuts = statistics.quantiles(times, n=100)
    print(
        f"{name}: hit {statistics.median(times) * 1e3:.2f} ms at the median,"
        f" {cuts[98] * 1e3:.2f} ms at the 99th percentile ({len(times)} hits,"
        f" {CLIENTS} clients, {rate:.0f} a second); {per_second:.0f} hits a second;"
        f" {upstream.calls - before} of all requests reached the server"
    )


@contextlib.contextmanager
def our_proxy(upstream: str) -> Iterator[tuple[str, int]]:
    """Run the proxy in a process of its own, on one core."""
    command = [sys.executable, "-m", "kvbench.caching.proxy", "--upstream", upstream]
    process = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "workflow")},
    )
    assert process.stdout is not None
    try:
        if hasattr(os, "sched_setaffinity") and len(cores := os.sched_getaffinity(0)) > 1:
            os.sched_setaffinity(process.pid, {max(cores)})
            os.sched_setaffinity(0, cores - {max(cores)})
        address = urlsplit(process.stdout.readline().split()[-1])
        yield str(address.hostname), int(address.port or 0)
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="another proxy to ask in the same way, for comparison")
    parser.add_argument("--model", default="m", help="model name that the other proxy knows")
    parser.add_argument(
        "--rate", type=float, default=500.0, help="requests a second for the latency"
    )
    parser.add_argument("--upstream-port", type=int, default=0, help="where the upstream listens")
    options = parser.parse_args()
    with fake_openai.serving(options.upstream_port) as upstream:
        with our_proxy(upstream.url) as (host, port):
            asyncio.run(measure("kvbench", host, port, "m", options.rate, upstream))
        if options.url:
            other = urlsplit(options.url)
            host, port = other.hostname or "", other.port or 80
            asyncio.run(measure("other", host, port, options.model, options.rate, upstream))


if __name__ == "__main__":
    main()
