"""What can be set on the proxy, and what is refused before it listens."""

from __future__ import annotations

import ipaddress
import math
import re
import socket
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal, get_args
from urllib.parse import urlsplit

from kvbench.errors import InputError

#: When a request's answer is the only one it can have: ``temperature`` asks for 0; ``seed`` also
#: takes an integer seed; ``always`` and ``never`` ask for nothing.
Rule = Literal["temperature", "seed", "always", "never"]

#: Fields that an operator may declare to be without influence on the answer.
IGNORABLE = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)

_PLACE = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Settings:
    """How a proxy behaves.

    Attributes
    ----------
    upstream:
        Base URL of the server, such as ``http://127.0.0.1:8000/v1``.
    host, port:
        Where to listen; port 0 takes a free one.
    allow_remote, allowed_hosts:
        Whether ``host`` may be an address that other machines reach, and under which names they
        may ask for it (any if empty).
    store:
        ``memory``, ``sqlite:PATH``, ``redis://...``, ``rediss://...`` or ``unix://...``.
    secret_file:
        Secret of this installation, which keys are hashed with; made if it is missing. None for
        the usual place, which only stores that outlive the process need.
    ttl_s, max_ttl_s:
        Seconds an answer is kept, and the most that a request may ask for.
    capacity, max_bytes:
        Most answers kept, and most bytes of them. The index of the semantic cache has the same
        bounds, and is counted apart.
    max_stored_bytes:
        Larger answers pass through and are not stored.
    threshold:
        Least cosine of a semantic hit within [0, 1]; None for an exact cache only.
    guarded:
        Whether numbers, names and polarity of two questions must agree for a semantic hit.
    second_opinion, second_opinion_threshold:
        Folder of a cross-encoder or NLI model that has to agree too, and its least score.
    cache_sampled:
        Cache requests at a temperature above zero too, which freezes one draw.
    deterministic:
        Rule by pattern of model name; the first that matches counts before ``cache_sampled``.
    cache_length_limited:
        Store answers that ended at ``max_tokens``. That number is part of the key, so the answer
        is the right one for a repeat, but it is not a whole one.
    ignored_fields:
        Fields of the body that cannot change the answer; of :data:`IGNORABLE`.
    neutral_headers:
        Forwarded headers, beside the known ones, that name nobody and change no answer.
    prices, currency:
        Price of a million prompt and completion tokens, for the counter of money saved.
    connect_timeout_s, read_timeout_s, total_timeout_s:
        Limits for reaching the server, between two pieces of its answer, and for all of it. The
        last two are None by default: as long as the client waits.
    linger_s:
        How long a generation goes on that nobody waits for, so that a client's retry finds it.
    receive_timeout_s, send_timeout_s, idle_timeout_s:
        Limits for receiving a whole request, for a client to take the next piece of an answer,
        and between two requests of a connection.
    max_connections:
        Most open client connections.
    max_request_bytes, max_header_bytes, max_nesting:
        Larger requests (to cached paths) and headers are refused; deeper JSON is not cached.
    max_encoding:
        Most questions that wait for the sentence encoder; others are matched exactly only.
    log:
        Whether each request gives a line in the log.
    """

    upstream: str
    host: str = "127.0.0.1"
    port: int = 0
    allow_remote: bool = False
    allowed_hosts: tuple[str, ...] = ()
    store: str = "memory"
    secret_file: str | None = None
    ttl_s: float = 3600.0
    max_ttl_s: float = 30 * 86_400.0
    capacity: int = 10_000
    max_bytes: int = 256 * 2**20
    max_stored_bytes: int = 4 * 2**20
    threshold: float | None = None
    guarded: bool = True
    second_opinion: str | None = None
    second_opinion_threshold: float = 0.5
    cache_sampled: bool = False
    deterministic: tuple[tuple[str, Rule], ...] = ()
    cache_length_limited: bool = False
    ignored_fields: tuple[str, ...] = ()
    neutral_headers: tuple[str, ...] = ()
    prices: tuple[float, float] = (0.0, 0.0)
    currency: str = "USD"
    connect_timeout_s: float = 5.0
    read_timeout_s: float | None = None
    total_timeout_s: float | None = None
    linger_s: float = 1.0
    receive_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    idle_timeout_s: float = 60.0
    max_connections: int = 512
    max_request_bytes: int = 8 * 2**20
    max_header_bytes: int = 64 * 2**10
    max_nesting: int = 64
    max_encoding: int = 64
    log: bool = False

    def rule(self, model: object) -> Rule:
        """Return what counts as deterministic for a model."""
        if isinstance(model, str):
            for pattern, rule in self.deterministic:
                if fnmatchcase(model, pattern):
                    return rule
        return "always" if self.cache_sampled else "temperature"

    def check(self) -> None:
        """Raise InputError, one line that names the option, if something cannot be right."""
        self._check_upstream()
        for name in ("threshold", "second_opinion_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{_option(name)} {value}: must be within [0, 1]")
        for name in (
            "capacity",
            "max_bytes",
            "max_stored_bytes",
            "max_connections",
            "max_request_bytes",
            "max_header_bytes",
            "max_nesting",
            "max_encoding",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{_option(name)} {getattr(self, name)}: must be at least 1")
        for name in (
            "ttl_s",
            "max_ttl_s",
            "connect_timeout_s",
            "read_timeout_s",
            "total_timeout_s",
            "receive_timeout_s",
            "send_timeout_s",
            "idle_timeout_s",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{_option(name)} {value}: must be above 0 and finite")
        if not 0 <= self.linger_s < math.inf:
            raise InputError(f"--linger {self.linger_s}: must be at least 0 and finite")
        for price in self.prices:
            if not 0 <= price < math.inf:
                raise InputError(f"--prices {price}: must be at least 0 and finite")
        for name in self.ignored_fields:
            if name not in IGNORABLE:
                raise InputError(f"--ignore-field {name}: not one of {', '.join(IGNORABLE)}")
        for pattern, rule in self.deterministic:
            if rule not in get_args(Rule):
                raise InputError(
                    f"--deterministic {pattern}={rule}: not one of {', '.join(get_args(Rule))}"
                )
        if self.second_opinion is not None and self.threshold is None:
            raise InputError("--second-opinion needs --threshold: it judges semantic hits only")
        if not self.allow_remote and not is_loopback(self.host):
            raise InputError(
                f"--listen {self.host}: not a loopback address; add --allow-remote if other"
                " machines shall reach the proxy"
            )

    def _check_upstream(self) -> None:
        shown = repr(self.upstream)
        try:
            parts = urlsplit(self.upstream)
            port = parts.port
        except ValueError:
            # The reason would quote the address, and with it a password that someone put there.
            raise InputError("--upstream: not an http(s)://host[:port][/path]") from None
        if parts.username is not None or parts.password is not None:
            raise InputError(
                "--upstream: no user name or password in the address; clients send the key"
            )
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or not _PLACE.fullmatch(self.upstream)
            or port == 0
        ):
            raise InputError(f"--upstream {shown}: not an http(s)://host[:port][/path]")
        if self.port and (port or {"http": 80, "https": 443}[parts.scheme]) == self.port:
            reached = _addresses(parts.hostname)
            if reached & _addresses(self.host) or (
                _is_everywhere(self.host) and any(map(_is_local, reached))
            ):
                raise InputError(f"--upstream {shown}: is the proxy itself")


@lru_cache(64)
def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine, as seen by itself alone."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _option(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")


def _addresses(host: str) -> set[str]:
    """Return where a connection to a host goes, in one spelling; nowhere if it is unknown now."""
    try:
        found = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return set()
    return {_reached(address) for address in found}


def _reached(address: str) -> str:
    """Return the address that answers for another: an IPv4 one in IPv6's dress, or "everywhere"."""
    try:
        plain = ipaddress.ip_address(address)
    except ValueError:
        return address
    plain = getattr(plain, "ipv4_mapped", None) or plain
    if plain.is_unspecified:
        # Whoever connects to all addresses of this machine reaches its loopback one.
        return "127.0.0.1" if plain.version == 4 else "::1"
    return str(plain)


def _is_everywhere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_local(address: str) -> bool:
    """Whether an address belongs to this machine: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
