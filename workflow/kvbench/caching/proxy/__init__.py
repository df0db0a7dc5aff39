"""A caching proxy for OpenAI-compatible servers: exact repeats first, then questions alike.

Run it in front of any server and point the client at it::

    python -m kvbench.caching.proxy --upstream http://127.0.0.1:8000/v1 --listen 127.0.0.1:8001
    OPENAI_BASE_URL=http://127.0.0.1:8001/v1 ...

What it promises
----------------
* Cached are ``POST .../chat/completions`` and ``POST .../embeddings``; everything else passes
  through, the stateful Responses API too.
* An entry belongs to whoever the forwarded headers name (keys of any kind, cookies, organisation)
  and to a namespace: tenants never meet.
* The exact key is a keyed digest of the whole request, whether it asks for a stream or not: both
  forms are served from one entry. The semantic cache compares the last user message only, and
  only between requests that are equal in everything else: model, parameters, system prompt,
  history, tools.
* Equal requests in flight share one call, streams included: who comes later reads it from its
  beginning. A generation that nobody waits for any more is stopped.
* Stored are complete, successful answers: status 200, valid JSON or a stream that reached its
  ``finish_reason`` and ended in order, with text and without tool calls. Never an error, a cut-off
  stream, or rubbish.
* Requests whose answer is one draw of many (temperature above zero) are not cached unless asked.
* ``Cache-Control`` is followed as RFC 9111 says: ``no-store``, ``no-cache``, ``max-age``,
  ``min-fresh``, ``only-if-cached`` of a request; ``no-store``, ``no-cache``, ``max-age`` and
  ``Vary`` of an answer.
* Every answer carries ``x-cache`` (``hit``, ``miss``, ``bypass``) and ``x-cache-reason``.
* No request goes anywhere but to the configured server; bodies, headers, waiting and open
  connections are bounded.
"""

from kvbench.caching.proxy.answers import finish_reason
from kvbench.caching.proxy.app import Proxy, serving
from kvbench.caching.proxy.cli import main
from kvbench.caching.proxy.questions import Question, question_of
from kvbench.caching.proxy.settings import Settings

__all__ = ["Proxy", "Question", "Settings", "finish_reason", "main", "question_of", "serving"]
