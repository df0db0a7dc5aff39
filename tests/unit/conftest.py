"""What the tests of the caching proxy share: an upstream, and proxies in front of it."""

from __future__ import annotations

import fake_openai
import pytest
from kvbench.caching import proxy as proxies
from proxying import Client, WordEncoder


@pytest.fixture
def upstream():
    """An OpenAI-compatible server that can misbehave."""
    with fake_openai.serving() as server:
        yield server


@pytest.fixture
def start(upstream):
    """Return a function that starts a proxy with settings and returns a client of it."""
    running = []

    def begin(encoder=None, second_opinion=None, **settings):
        options = {"upstream": upstream.url} | settings
        if options.get("threshold") is not None:
            encoder = encoder or WordEncoder()
        manager = proxies.serving(proxies.Settings(**options), encoder, second_opinion)
        running.append(manager)
        return Client(manager.__enter__())

    yield begin
    # Whoever still waits for an answer gets it, so that the proxies can end at once.
    upstream.release.set()
    for manager in running:
        manager.__exit__(None, None, None)
