"""A client of the caching proxy, and an encoder that compares words, for its tests."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from kvbench.caching import proxy as proxies


class WordEncoder:
    dimension = 64

    def __call__(self, text):
        vector = np.zeros(self.dimension, dtype=np.float32)
        for word in re.findall(r"\w+", text.lower()):
            vector[zlib.crc32(word.encode()) % self.dimension] += 1
        return vector

    def fits(self, text):
        return len(text) < 2000


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    seconds: float = 0.0

    @property
    def cache(self):
        return self.headers["x-cache"]

    @property
    def reason(self):
        return self.headers["x-cache-reason"]

    @property
    def text(self):
        return json.loads(self.body)["choices"][0]["message"]["content"]


@dataclass
class Client:
    """Sends chat requests to a proxy, each on a connection of its own."""

    proxy: proxies.Proxy
    headers: dict = field(default_factory=dict)

    def body(self, text, messages=None, **fields):
        body = {"model": "m", "temperature": 0} | fields
        body["messages"] = [*(messages or []), {"role": "user", "content": text}]
        return json.dumps(body)

    def ask(self, text, headers=None, messages=None, **fields):
        body = self.body(text, messages, **fields)
        return self.send("POST", "/v1/chat/completions", body, headers)

    def ask_at_once(self, count, text, **fields):
        """Ask the same ``count`` times at the same time, without waiting for an answer."""
        pool = ThreadPoolExecutor(count)
        return [pool.submit(self.ask, text, **fields) for _ in range(count)]

    def send(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection(*self.proxy.address, timeout=10)
        started = time.monotonic()
        try:
            connection.request(method, path, body, {**self.headers, **(headers or {})})
            response = connection.getresponse()
            return Reply(
                response.status, response.headers, response.read(), time.monotonic() - started
            )
        finally:
            connection.close()

    def leave_early(self, text, headers=None, **fields):
        """Send a request and give the connection back, to be closed without reading."""
        connection = http.client.HTTPConnection(*self.proxy.address, timeout=10)
        body = self.body(text, **fields)
        connection.request("POST", "/v1/chat/completions", body, headers or {})
        return connection

    def raw(self, data):
        """Send bytes as they are and return all that comes back until the end."""
        with socket.create_connection(self.proxy.address, timeout=10) as connection:
            connection.sendall(data)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
            return answer

    def metric(self, name, **labels):
        """Return the value of a metric, 0 if it was never counted."""
        return self.proxy.metrics.registry.get_sample_value(f"kvbench_proxy_{name}", labels) or 0.0


def until(condition, seconds=5.0):
    """Wait until something holds that another thread brings about; fail if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def said(body):
    """Return the text of a stream."""
    events = [line[6:] for line in body.decode().split("\n") if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
