"""A small OpenAI-compatible upstream for tests, that can misbehave on request."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Upstream:
    """What the server does next, and what it was asked.

    ``mode`` is one of ``ok``, ``error``, ``rubbish``, ``not_http``, ``short``, ``slow``, ``drip``,
    ``cut_stream``, ``stream_error``, ``tool``, ``empty``, ``length``, ``no_store``.
    """

    def __init__(self, port: int) -> None:
        self.mode = "ok"
        self.url = f"http://127.0.0.1:{port}/v1"
        self.requests: list[dict] = []
        self.paths: list[str] = []
        self.stop = threading.Event()

    @property
    def calls(self) -> int:
        return len(self.requests)


@contextmanager
def serving() -> Iterator[Upstream]:
    """Run the upstream in a thread while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.upstream = Upstream(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.upstream
    finally:
        server.upstream.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()


def answer_to(text: str) -> str:
    """What the upstream says to a question."""
    return f"answer to <{text}>"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_arguments) -> None:
        pass

    def do_GET(self) -> None:
        self.server.upstream.paths.append(self.path)
        self._reply(200, b'{"data": []}')

    def do_POST(self) -> None:
        upstream = self.server.upstream
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        upstream.requests.append(request)
        upstream.paths.append(self.path)
        mode = upstream.mode
        text = answer_to(request["messages"][-1]["content"])
        if mode == "error":
            self._reply(500, b'{"error": {"message": "no"}}')
        elif mode == "rubbish":
            self._reply(200, b"<html>not an answer</html>")
        elif mode == "not_http":
            self.wfile.write(b"\x00\x01 what?\n")
            self.close_connection = True
        elif mode == "short":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(json.dumps(self._whole(text)).encode())
            self.close_connection = True
        elif mode == "slow":
            upstream.stop.wait(20)
        elif mode == "drip":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while not upstream.stop.wait(0.05):
                self._chunk(b": still there\n\n")
        elif request.get("stream"):
            asked = (request.get("stream_options") or {}).get("include_usage")
            self._stream(text, mode, bool(asked))
        else:
            self._reply(200, json.dumps(self._whole(text, mode)).encode(), mode)

    def _whole(self, text: str, mode: str = "ok") -> dict:
        message = {"role": "assistant", "content": "" if mode == "empty" else text}
        reason = "length" if mode == "length" else "stop"
        if mode == "tool":
            message["tool_calls"] = [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ]
            reason = "tool_calls"
        return {
            "id": f"c{self.server.upstream.calls}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        }

    def _stream(self, text: str, mode: str, usage: bool = False) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in re.findall(r"\S+|\s+", text):
            self._event({"choices": [{"index": 0, "delta": {"content": piece}}]})
        if mode == "cut_stream":
            self.close_connection = True
            return
        if mode == "stream_error":
            self._event({"error": "out of memory"})
        else:
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            if usage:
                pieces = len(re.findall(r"\S+|\s+", text))
                counts = {
                    "prompt_tokens": 100,
                    "completion_tokens": pieces,
                    "total_tokens": 100 + pieces,
                }
                counts["prompt_tokens_details"] = {"cached_tokens": 60}
                self._event({"choices": [], "usage": counts})
            self._chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, fields: dict) -> None:
        base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        self._chunk(b"data: " + json.dumps(base | fields).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def _reply(self, status: int, body: bytes, mode: str = "ok") -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if mode == "no_store":
            self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)
