"""The same loads on one server by guidellm 0.8.1 and by our study `endpoint`, taking turns.

Percentiles of time to first token, time per token and whole answer should agree within their 95 %
intervals, or there is a difference to explain. It runs on demand, without a network, with guidellm in
an environment of its own:

    python3 -m venv /tmp/guide && /tmp/guide/bin/pip install guidellm==0.8.1
    PYTHONPATH=workflow python tests/benchmarks/others/endpoints.py /tmp/guide/bin/guidellm
    PYTHONPATH=workflow python tests/benchmarks/others/endpoints.py /tmp/guide/bin/guidellm \
        --url http://127.0.0.1:8000 --model m

Without an address the server is guidellm's own mock, whose times are drawn from normal distributions.

What is made equal, and what is not:

- Both ask the same prompts, one turn each, `streams` at a time, streamed, temperature left to the server
  by guidellm and 0 in ours; both stop at the same number of tokens.
- Times are taken from each program's own stamps of each request and put into one definition here:
  TTFT from the request to the first text, E2E to the end of the stream, TPOT = (E2E - TTFT)/(tokens - 1).
  guidellm's printed TPOT is E2E/tokens, and its ITL ends at the last token; neither is compared.
- The first request of every stream is left out on both sides: it opens the connection.
- guidellm negotiates HTTP/2 and schedules from processes of its own; ours is one event loop on HTTP/1.1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "workflow"))

from kvbench import processes  # noqa: E402
from kvbench.engines import endpoint  # noqa: E402
from kvbench.studies._estimates import quantile  # noqa: E402

#: Of the mock server: milliseconds to the first token and between tokens, with their deviations.
MOCK = {"--ttft-ms": 120, "--ttft-ms-std": 25, "--itl-ms": 12, "--itl-ms-std": 2}
SHARES = (0.5, 0.9, 0.99)
START_LIMIT_S, RUN_LIMIT_S = 120, 600
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

#: Times of one request in seconds: TTFT, TPOT, E2E.
Times = tuple[float, float, float]


@contextmanager
def mock_server(guidellm: str, tokens: int, log: Path) -> Iterator[str]:
    """Run guidellm's mock server; yields its address."""
    port = processes.free_port()
    command = [guidellm, "mock-server", "--port", str(port), "--model", "m"]
    command += ["--output-tokens", str(tokens)]
    command += [str(part) for option in MOCK.items() for part in option]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as said:
        server = subprocess.Popen(command, stdout=said, stderr=said, env=OFFLINE)
    try:
        until = time.monotonic() + START_LIMIT_S
        while True:
            try:
                httpx.get(f"{url}/health", timeout=2, trust_env=False)
                break
            except httpx.HTTPError:
                if server.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the mock server did not start: {log.read_text()}") from None
                time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)


def theirs(
    guidellm: str, url: str, model: str, prompts: Path, streams: int, count: int, out: Path
) -> list[Times]:
    """Times of the requests that guidellm completed, without the first of every stream."""
    command = [guidellm, "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={url},model={model}"]
    command += ["--profile", f"kind=concurrent,streams={streams}"]
    command += ["--constraint", f"kind=max_requests,count={count}"]
    command += ["--data", f"kind=json_file,path={prompts}", "--output", f"kind=json,path={out}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=OFFLINE, timeout=RUN_LIMIT_S, check=False
    )
    if done.returncode:
        raise SystemExit(f"guidellm ended with {done.returncode}: {done.stderr[-2000:]}")
    requests = json.loads(out.read_text())["benchmarks"][0]["requests"]["successful"]
    requests.sort(key=lambda request: request["request_start_time"])
    found = []
    for request in requests[streams:]:
        ttft, e2e = request["time_to_first_token_ms"] / 1000, request["request_latency"]
        found.append((ttft, (e2e - ttft) / (request["output_tokens"] - 1), e2e))
    return found


def ours(target: endpoint.Target, prompts: Sequence[str], streams: int) -> list[Times]:
    """Times of the requests that our closed loop completed, without the first of every stream."""
    samples, _ = asyncio.run(endpoint.closed_loop(target, [[text] for text in prompts], streams))
    failed = [sample.error for sample in samples if sample.error]
    if failed:
        raise SystemExit(f"{len(failed)} of our requests failed: {failed[0]}")
    samples.sort(key=lambda sample: sample.due_s)
    return [(sample.ttft_s, sample.tpot_s, sample.e2e_s) for sample in samples[streams:]]


def compare(sides: dict[str, list[Times]]) -> bool:
    """Print the percentiles of both sides; returns whether all of their intervals meet."""
    agreed = True
    print(f"{'':10}" + "".join(f"{name + ' (ms)':>30}" for name in sides))
    for place, measure in enumerate(("TTFT", "TPOT", "E2E")):
        for share in SHARES:
            ends = [quantile([times[place] for times in side], share) for side in sides.values()]
            meet = max(low for _, low, _ in ends) <= min(high for _, _, high in ends)
            agreed &= meet
            cells = "".join(
                f"{1000 * value:>12.2f} [{1000 * low:.2f}, {1000 * high:.2f}]".rjust(30)
                for value, low, high in ends
            )
            print(f"{measure} p{100 * share:<4.0f} {cells}  {'agree' if meet else 'DIFFER'}")
    return agreed


def main() -> None:
    """Let both take turns on one server, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("guidellm", help="the program guidellm")
    parser.add_argument("--url", help="address of a server, without /v1; default: guidellm's mock")
    parser.add_argument("--model", default="m")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=64, help="of each side and round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    asked = parser.parse_args()
    sides: dict[str, list[Times]] = {"ours": [], "guidellm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = (
            nullcontext(asked.url.rstrip("/"))
            if asked.url
            else mock_server(asked.guidellm, asked.tokens, folder / "server.log")
        )
        with server as url:
            target = endpoint.Target(f"{url}/v1", asked.model, max_tokens=asked.tokens)
            for number in range(asked.rounds):
                # New questions in every round: a server may keep what it was asked.
                texts = {
                    side: [
                        f"Case {number}-{side}-{place}. How do I open an account?"
                        for place in range(asked.requests)
                    ]
                    for side in sides
                }
                prompts = folder / f"prompts{number}.jsonl"
                lines = [
                    json.dumps({"prompt": text, "output_tokens_count": asked.tokens})
                    for text in texts["guidellm"]
                ]
                prompts.write_text("\n".join(lines) + "\n")
                order = list(sides) if number % 2 == 0 else list(sides)[::-1]
                for side in order:
                    if side == "ours":
                        sides[side] += ours(target, texts[side], asked.streams)
                    else:
                        out = folder / f"report{number}.json"
                        sides[side] += theirs(
                            asked.guidellm,
                            url,
                            asked.model,
                            prompts,
                            asked.streams,
                            asked.requests,
                            out,
                        )
    if not compare(sides):
        sys.exit(1)


if __name__ == "__main__":
    main()
