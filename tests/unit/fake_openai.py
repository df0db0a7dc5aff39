"""A small OpenAI-compatible upstream for tests, that can misbehave on request."""

from __future__ import annotations

import json
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Upstream:
    """What the server does next, and what it was asked.

    ``mode`` is one of ``ok``, ``error``, ``rubbish``, ``not_http``, ``short``, ``slow``, ``drip``,
    ``cut_stream``, ``stream_error``, ``tool``, ``empty``, ``length``, ``no_store``; ``interim``
    (a 103 comes first); ``held`` (the answer waits for ``release``; if the caller leaves before,
    ``left`` is set); ``stalled`` (a stream that waits in the same way after its first word).
    ``headers`` are sent with every answer, ``usage`` in it; ``streams`` is a path that is answered
    like a chat.
    """

    def __init__(self, port: int) -> None:
        self.mode = "ok"
        self.url = f"http://127.0.0.1:{port}/v1"
        self.requests: list[dict] = []
        self.paths: list[str] = []
        self.sent_headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.headers: dict[str, str] = {}
        self.streams = "/chat/completions"
        self.usage: dict[str, int] | None = None
        self.asked = threading.Event()
        self.release = threading.Event()
        self.left = threading.Event()
        self.stop = threading.Event()

    @property
    def calls(self) -> int:
        return len(self.requests)


@contextmanager
def serving(port: int = 0) -> Iterator[Upstream]:
    """Run the upstream in a thread while the block runs."""
    server = _Server(("127.0.0.1", port), _Handler)
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


class _Server(ThreadingHTTPServer):
    #: Twenty clients connect at once; with the usual five in the queue some are turned away.
    request_queue_size = 128

    def handle_error(self, *_arguments) -> None:
        """Say nothing of callers that went away in the middle of a request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_arguments) -> None:
        pass

    def do_GET(self) -> None:
        self._note()
        self._reply(200, b'{"data": []}')

    do_OPTIONS = do_GET

    def do_POST(self) -> None:
        upstream = self.server.upstream
        body = self._note()
        chats = ("/chat/completions", "/embeddings", upstream.streams)
        if not self.path.partition("?")[0].endswith(chats):
            self._reply(200, b'{"id": "x"}')
            return
        request = json.loads(body)
        upstream.requests.append(request)
        mode = upstream.mode
        upstream.asked.set()
        if "input" in request:
            data = [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]
            answer = {"object": "list", "data": data, "model": "m"}
            usage = {"prompt_tokens": 2, "total_tokens": 2}
            self._reply(200, json.dumps(answer | {"usage": usage}).encode())
            return
        content = request["messages"][-1]["content"]
        text = answer_to(content if isinstance(content, str) else json.dumps(content))
        if mode == "held" and not self._wait():
            return
        if mode == "interim":
            self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n")
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
            self._stream(text, mode)
        else:
            self._reply(200, json.dumps(self._whole(text, mode)).encode(), mode)

    def _note(self) -> bytes:
        upstream = self.server.upstream
        upstream.paths.append(self.path)
        upstream.sent_headers.append({name.lower(): value for name, value in self.headers.items()})
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream.bodies.append(body)
        return body

    def _wait(self) -> bool:
        """Wait for the release; return whether the caller is still there."""
        upstream = self.server.upstream
        while not upstream.release.wait(0.005):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if upstream.stop.is_set():
                self.close_connection = True
                return False
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                upstream.left.set()
                self.close_connection = True
                return False
        return True

    def _whole(self, text: str, mode: str = "ok") -> dict:
        message = {"role": "assistant", "content": "" if mode == "empty" else text}
        reason = "length" if mode == "length" else "stop"
        if mode == "tool":
            message["tool_calls"] = [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ]
            reason = "tool_calls"
        request = self.server.upstream.requests[-1]
        if request.get("tools") and request.get("tool_choice") == "required":
            function = {"name": request["tools"][0]["function"]["name"], "arguments": '{"a": 1}'}
            message |= {"content": None}
            message["tool_calls"] = [{"id": "1", "type": "function", "function": function}]
            reason = "tool_calls"
        if request.get("response_format"):
            message["content"] = json.dumps({"answer": text})
        choice = {"index": 0, "message": message, "finish_reason": reason}
        if request.get("logprobs"):
            token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
            choice["logprobs"] = {"content": [token], "refusal": None}
        answer = {
            "id": f"c{self.server.upstream.calls}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "m",
            "choices": [choice | {"index": n} for n in range(request.get("n") or 1)],
        }
        if self.server.upstream.usage:
            answer["usage"] = self.server.upstream.usage
        return answer

    def _stream(self, text: str, mode: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in self.server.upstream.headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in re.findall(r"\S+|\s+", text):
            self._event({"choices": [{"index": 0, "delta": {"content": piece}}]})
            if mode == "stalled" and not self._wait():
                return
        if mode == "cut_stream":
            self.close_connection = True
            return
        if mode == "stream_error":
            self._event({"error": "out of memory"})
        else:
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            options = self.server.upstream.requests[-1].get("stream_options") or {}
            if options.get("include_usage"):
                self._event({"choices": [], "usage": self.server.upstream.usage})
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
        for name, value in self.server.upstream.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
