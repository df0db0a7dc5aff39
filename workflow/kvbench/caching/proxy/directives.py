"""What requests and answers say about caching (RFC 9111), and the proxy's own request headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvbench.caching.proxy.tenancy import Header

_DIRECTIVE = re.compile(r'([!#$%&\'*+.^_`|~0-9A-Za-z-]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"|[^,\s]*))?')
_TAG = re.compile(r"[!-+\--~]{1,100}")
_NAMESPACE = re.compile(r"[!-~]{1,200}")
_MOST_TAGS = 16
_LONGEST_S = 2.0**31


@dataclass(frozen=True)
class Wishes:
    """What a request wants of the cache.

    Attributes
    ----------
    no_store, no_cache, only_if_cached:
        Directives of RFC 9111, section 5.2.1.
    max_age_s, min_fresh_s:
        Greatest age and least remaining life of an acceptable answer, or None.
    ttl_s:
        Life of the answer if it is stored, or None for the proxy's own.
    namespace, tags:
        Part of the tenant under which the answer is stored, and names by which it can be deleted.
    """

    no_store: bool = False
    no_cache: bool = False
    only_if_cached: bool = False
    max_age_s: float | None = None
    min_fresh_s: float | None = None
    ttl_s: float | None = None
    namespace: str = ""
    tags: tuple[str, ...] = field(default=())


def wishes(headers: Iterable[Header]) -> Wishes:
    """Read ``cache-control``, ``pragma`` and ``x-cache-ttl``, ``-namespace``, ``-tags``.

    Raises
    ------
    ValueError
        If one of the proxy's own headers cannot be read; the message is for the client.
    """
    headers = [
        (name, value)
        for name, value in headers
        if name == b"cache-control" or name == b"pragma" or name.startswith(b"x-cache-")
    ]
    if not headers:
        return _NO_WISHES
    said = directives(headers)
    own: dict[bytes, str] = {}
    for name, value in headers:
        if not name.startswith(b"x-cache-"):
            continue
        text = value.decode("latin-1").strip()
        if name in own and name != b"x-cache-tags":
            raise ValueError(f"{name.decode('latin-1')} stands there twice")
        # Lines of a list are one list (RFC 9110, section 5.3).
        own[name] = f"{own[name]},{text}" if name in own else text
    pragma = any(name == b"pragma" and value.lower() == b"no-cache" for name, value in headers)
    ttl_s = None
    if b"x-cache-ttl" in own:
        ttl_s = _seconds(own[b"x-cache-ttl"])
        if ttl_s is None:
            raise ValueError("x-cache-ttl is not a whole number of seconds")
    namespace = own.get(b"x-cache-namespace", "")
    if namespace and not _NAMESPACE.fullmatch(namespace):
        raise ValueError("x-cache-namespace: 1 to 200 visible ASCII characters")
    tags = tuple(tag.strip() for tag in own.get(b"x-cache-tags", "").split(",") if tag.strip())
    if len(tags) > _MOST_TAGS or not all(map(_TAG.fullmatch, tags)):
        raise ValueError(f"x-cache-tags: at most {_MOST_TAGS}, each 1 to 100 visible characters")
    return Wishes(
        no_store="no-store" in said,
        # RFC 9111, section 5.4: the old header counts only where the new one is silent.
        no_cache="no-cache" in said or (pragma and not said),
        only_if_cached="only-if-cached" in said,
        max_age_s=_limit(said, "max-age"),
        min_fresh_s=_limit(said, "min-fresh", unreadable=float("inf")),
        ttl_s=ttl_s,
        namespace=namespace,
        tags=tags,
    )


_NO_WISHES = Wishes()


def freshness(headers: Iterable[Header]) -> float | None:
    """Return the seconds for which a server lets its answer be kept; None if it does not say.

    0 for ``no-store``, and for ``no-cache``, because nothing is asked a second time here.
    """
    said = directives(headers)
    if "no-store" in said or "no-cache" in said:
        return 0.0
    return _limit(said, "max-age")


def directives(headers: Iterable[Header]) -> dict[str, str]:
    """Return the directives of all ``cache-control`` lines, names in lower case."""
    text = ",".join(value.decode("latin-1") for name, value in headers if name == b"cache-control")
    found: dict[str, str] = {}
    for name, value in _DIRECTIVE.findall(text):
        found.setdefault(name.lower(), value.strip('"'))
    return found


def _limit(said: dict[str, str], name: str, unreadable: float = 0.0) -> float | None:
    """Return the seconds of a directive; what cannot be read counts as the strictest."""
    if name not in said:
        return None
    seconds = _seconds(said[name])
    return unreadable if seconds is None else seconds


def _seconds(text: str) -> float | None:
    """Return whole seconds, at most as many as RFC 9111, section 1.2.2, asks a cache to know."""
    return min(float(text), _LONGEST_S) if text.isascii() and text.isdigit() else None
