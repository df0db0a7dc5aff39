"""The command line of the proxy."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, cast

from kvbench.arguments import Parser
from kvbench.caching.proxy.app import Proxy
from kvbench.caching.proxy.semantic import Guard
from kvbench.caching.proxy.settings import IGNORABLE, Rule, Settings
from kvbench.errors import InputError, Unsupported


def parser() -> Parser:
    """Return the parser of the proxy's options."""
    found = Parser(
        prog="kvbench proxy",
        description="A caching proxy for OpenAI-compatible servers: exact repeats first, then"
        " questions alike.",
    )
    for title, add in (
        ("where", _where),
        ("store", _store),
        ("what is cached", _cached),
        ("questions alike", _alike),
        ("limits", _limits),
        ("log", _log),
    ):
        add(found.add_argument_group(title))
    return found


def _where(group: Any) -> None:
    group.add_argument(
        "--upstream", required=True, help="base URL of the server, such as http://host:8000/v1"
    )
    group.add_argument(
        "--listen", default="127.0.0.1:8001", help="HOST:PORT, port 0 for a free one"
    )
    _flag(group, "--allow-remote", "let --listen be no loopback address")
    _repeated(group, "--allow-host", "name under which the proxy may be asked", metavar="NAME")


def _store(group: Any) -> None:
    group.add_argument(
        "--store",
        default=None,
        help="memory, sqlite:PATH, redis://..., rediss://... or unix://...; default: the"
        " environment's KVBENCH_PROXY_STORE (which keeps a password off the command line), or memory",
    )
    group.add_argument(
        "--secret-file", metavar="PATH", help="secret of this installation; made if missing"
    )
    _number(group, "ttl_s", "life of an answer", "--ttl")
    _number(group, "max_ttl_s", "longest life that a request may ask for")
    _number(group, "capacity", "most answers kept", kind=int)
    _number(group, "max_bytes", "most bytes of answers kept", kind=int)
    _number(group, "max_stored_bytes", "largest answer kept", kind=int)


def _cached(group: Any) -> None:
    _flag(group, "--cache-sampled", "also at a temperature above zero")
    _repeated(
        group,
        "--deterministic",
        "for models of that name: temperature, seed, always or never",
        metavar="PATTERN=RULE",
    )
    _flag(group, "--cache-length-limited", "also answers cut at max_tokens")
    _repeated(
        group,
        "--ignore-field",
        f"field of a request that cannot change the answer: {', '.join(IGNORABLE)}",
        choices=IGNORABLE,
        metavar="FIELD",
    )
    _repeated(
        group,
        "--neutral-header",
        "header that neither names a tenant nor changes an answer",
        metavar="NAME",
    )
    group.add_argument(
        "--prices",
        nargs=2,
        type=float,
        default=Settings.prices,
        metavar=("PROMPT", "COMPLETION"),
        help="of a million tokens, for the money that hits save",
    )
    group.add_argument("--currency", default=Settings.currency)


def _alike(group: Any) -> None:
    group.add_argument(
        "--threshold",
        type=float,
        metavar="COSINE",
        help="also answer questions at least this similar, within [0, 1]; default: exact only",
    )
    _flag(group, "--no-guards", "do not compare numbers, names and polarity")
    group.add_argument(
        "--encoder", default=None, help="hub name of a sentence encoder; default: embedded"
    )
    group.add_argument("--encoder-revision", help="commit of that encoder")
    group.add_argument(
        "--second-opinion", metavar="FOLDER", help="cross-encoder or NLI model that must agree too"
    )
    _number(group, "second_opinion_threshold", "its least score", metavar="SCORE")


def _limits(group: Any) -> None:
    _number(group, "connect_timeout_s", "to reach the server")
    _number(group, "read_timeout_s", "between two pieces of its answer; default: none")
    _number(group, "total_timeout_s", "for its whole answer; default: as long as the client waits")
    _number(group, "linger_s", "a generation goes on that nobody waits for")
    _number(group, "receive_timeout_s", "to receive a request")
    _number(group, "send_timeout_s", "for a client to take the next piece of an answer")
    _number(group, "idle_timeout_s", "between two requests of a connection")
    _number(group, "max_connections", "open client connections", kind=int)
    _number(group, "max_request_bytes", "largest request to a cached path", kind=int)
    _number(group, "max_header_bytes", "largest head of a request", kind=int)
    _number(group, "max_nesting", "deepest JSON that is cached", kind=int)


def _log(group: Any) -> None:
    _flag(group, "--log", "one line a request on standard error, without prompts")


def _flag(group: Any, option: str, text: str) -> None:
    group.add_argument(option, action="store_true", help=text)


def _repeated(group: Any, option: str, text: str, **kind: Any) -> None:
    group.add_argument(option, action="append", default=[], help=f"{text}; may be repeated", **kind)


def _number(
    group: Any,
    name: str,
    text: str,
    option: str = "",
    kind: Callable[[str], Any] = float,
    metavar: str = "",
) -> None:
    option = option or "--" + name.removesuffix("_s").replace("_", "-")
    group.add_argument(
        option,
        dest=name,
        type=kind,
        default=getattr(Settings, name),
        metavar=metavar or ("N" if kind is int else "S"),
        help=f"{text} (default: %(default)s)" if "default" not in text else text,
    )


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings that a command line asks for.

    Raises
    ------
    InputError
        One line that names the option.
    """
    host, _, port = options.listen.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise InputError(f"--listen {options.listen!r}: not HOST:PORT")
    if host.count(":") and not (host.startswith("[") and host.endswith("]")):
        raise InputError(f"--listen {options.listen!r}: an IPv6 address stands in brackets")
    rules: list[tuple[str, Rule]] = []
    for text in options.deterministic:
        pattern, equals, rule = text.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"--deterministic {text!r}: not PATTERN=RULE")
        rules.append((pattern, cast(Rule, rule)))
    plain = {field.name for field in fields(Settings)} & vars(options).keys()
    plain -= {"deterministic", "prices", "store"}
    settings = Settings(
        host=host.strip("[]"),
        port=int(port),
        allowed_hosts=tuple(name.lower() for name in options.allow_host),
        store=options.store or os.environ.get("KVBENCH_PROXY_STORE") or "memory",
        guarded=not options.no_guards,
        deterministic=tuple(rules),
        ignored_fields=tuple(options.ignore_field),
        neutral_headers=tuple(options.neutral_header),
        prices=tuple(options.prices),
        **{name: getattr(options, name) for name in plain},
    )
    settings.check()
    return settings


def main(arguments: Sequence[str] | None = None, ready: Callable[[str], None] = print) -> int:
    """Run the proxy until it is interrupted or terminated; return the exit status."""
    options = parser().parse_args(arguments)
    try:
        settings = settings_of(options)
        encoder = None
        opinion: Guard | None = None
        if settings.threshold is not None:
            from kvbench.caching.encoder import EMBEDDED, SentenceEncoder

            encoder = SentenceEncoder(options.encoder or EMBEDDED, options.encoder_revision)
            encoder("warm up")
        if settings.second_opinion is not None:
            from kvbench.caching.second_opinion import SecondOpinion

            opinion = SecondOpinion(settings.second_opinion, settings.second_opinion_threshold)
        proxy = Proxy(settings, encoder, opinion)
    except (InputError, Unsupported) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if settings.log else logging.WARNING,
        format="%(asctime)s %(message)s",
    )
    for name in ("httpx", "httpcore", "asyncio", "faiss"):
        # Their messages hold addresses and headers, or are no requests.
        logging.getLogger(name).setLevel(logging.ERROR)
    if settings.allow_remote:
        print(
            f"warning: {proxy.url} can be reached from other machines; whoever reaches it can use"
            " the server behind it",
            file=sys.stderr,
        )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: proxy.close())

    # What the imports left behind stays: a collection that walks it all would be the slowest hit.
    gc.collect()
    gc.freeze()

    def listening() -> None:
        ready(f"listening on {proxy.url}")
        sys.stdout.flush()

    proxy.serve(listening)
    return 0
