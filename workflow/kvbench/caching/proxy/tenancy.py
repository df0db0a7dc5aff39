"""Which headers are forwarded, which of them name the tenant, and which an answer keeps."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable

#: Name and value of a header, the name in lower case.
Header = tuple[bytes, bytes]

#: Headers that belong to one connection (RFC 9110, sections 7.6.1 and, for proxies, 11.7) or are set anew.
_HOP_BY_HOP = frozenset(
    {
        b"accept-encoding",
        b"connection",
        b"content-length",
        b"expect",
        b"host",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

#: Forwarded request headers that say nothing about who asks and change no answer. Every other
#: header is part of the tenant: keys, cookies and forwarded users have too many names to list.
NEUTRAL = frozenset(
    {
        b"accept",
        b"b3",
        b"cache-control",
        b"content-encoding",
        b"content-type",
        b"date",
        b"idempotency-key",
        b"pragma",
        b"priority",
        b"sentry-trace",
        b"traceparent",
        b"tracestate",
        b"uber-trace-id",
        b"user-agent",
        b"via",
        b"x-amzn-trace-id",
        b"x-client-request-id",
        b"x-cloud-trace-context",
        b"x-correlation-id",
        b"x-request-id",
    }
)
_JSON = re.compile(rb'application/json(?:\s*;\s*charset="?utf-?8"?)?', re.IGNORECASE)
#: Beginnings of such names: what the openai client says of itself and of its retries, what a
#: browser says of itself, and numbers of traces.
_NEUTRAL_PREFIXES = (b"x-stainless-", b"sec-ch-", b"sec-fetch-", b"x-b3-", b"x-datadog-")

#: The proxy's own headers: never forwarded, and replaced if the server sends them.
_OWN_PREFIX = b"x-cache"
_OWN = frozenset({b"x-similarity"})

#: Response headers that still hold when the answer is served again. Cookies, request numbers and
#: rate limits belong to the first asker.
_KEPT = frozenset(
    {
        b"content-language",
        b"cross-origin-resource-policy",
        b"openai-model",
        b"openai-version",
        b"timing-allow-origin",
        b"vary",
    }
)
_KEPT_PREFIX = b"access-control-"


def forwarded(headers: Iterable[Header]) -> list[Header]:
    """Return the request headers that the server gets."""
    headers = list(headers)
    named = {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    }
    return [
        (name, value)
        for name, value in headers
        if name not in _HOP_BY_HOP and name not in named and not _is_own(name)
    ]


def tenant(headers: Iterable[Header], neutral: Collection[bytes], secret: bytes) -> bytes:
    """Return a keyed digest of who is asking, so that no API key is held in memory.

    Parameters
    ----------
    headers:
        Forwarded headers; the order of equal names counts, that of different names does not.
    neutral:
        Names beside :data:`NEUTRAL` that the operator declares to be so.
    secret:
        Of this installation, 64 bytes at most.
    """
    digest = hashlib.blake2b(key=secret, digest_size=16, person=b"tenant")
    for name, value in sorted(headers, key=lambda header: header[0]):
        silent = name in NEUTRAL or name in neutral or name.startswith(_NEUTRAL_PREFIXES)
        # What a server makes of a body that is called something else is anyone's guess.
        if silent and (name != b"content-type" or _JSON.fullmatch(value.strip())):
            continue
        digest.update(b"%d:%d:%b%b" % (len(name), len(value), name, value))
    return digest.digest()


def passed_back(headers: Iterable[Header]) -> list[Header]:
    """Return the headers of a server's answer that the client gets."""
    return [
        (name, value)
        for name, value in ((name.lower(), value) for name, value in headers)
        if name not in _HOP_BY_HOP and name not in (b"date", b"server") and not _is_own(name)
    ]


def kept(headers: Iterable[Header]) -> list[Header]:
    """Return the headers of an answer that are stored with it."""
    return [
        (name, value) for name, value in headers if name in _KEPT or name.startswith(_KEPT_PREFIX)
    ]


def varies(headers: Iterable[Header], neutral: Collection[bytes]) -> bool:
    """Whether the answer depends on a header that the key leaves out (RFC 9110, section 12.5.5)."""
    for name, value in headers:
        if name != b"vary":
            continue
        for token in value.split(b","):
            named = token.strip().lower()
            # The server is always asked for the same encoding.
            if named == b"accept-encoding":
                continue
            if named == b"*" or named in NEUTRAL or named in neutral:
                return True
            if named.startswith(_NEUTRAL_PREFIXES) or _is_own(named):
                return True
    return False


def _is_own(name: bytes) -> bool:
    return name.startswith(_OWN_PREFIX) or name in _OWN
