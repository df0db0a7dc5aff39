"""The address of a user's cache server: read without ever repeating its password."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

from kvbench.errors import InputError

SCHEMES = ("redis", "rediss", "valkey", "valkeys", "unix")

#: Said of every address that cannot be read: which part is wrong may be part of the password.
_REMEDY = (
    "app.server_url (or REDIS_URL): the address cannot be read; write "
    "redis://[user:password@]host[:port][/database] or unix://[user:password@]/path[?db=number], "
    "with / ? # @ : % of a password as %2F %3F %23 %40 %3A %25"
)


def label(url: str) -> str:
    """Return where a server is, without user and password: ``host:port/database`` or ``unix:path``.

    Raises
    ------
    InputError
        The address cannot be read; the message holds no part of it.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        # Without the cause: its text quotes what stands where the port should.
        raise InputError(_REMEDY) from None
    behind = f"{parts.path}{parts.query}{parts.fragment}"
    # A password with a slash ends the host early, and what is left of it would pass for a path.
    if parts.scheme not in SCHEMES or "@" in behind or parts.fragment:
        raise InputError(_REMEDY)
    database = parse_qs(parts.query).get("db", ["0"])[0]
    if parts.scheme == "unix":
        where = f"unix:{unquote(parts.path)}"
    else:
        where = f"{host or '127.0.0.1'}:{port or 6379}"
        database = parts.path.strip("/") or database
    if not database.isdigit():
        raise InputError(_REMEDY)
    return f"{where}/{database}"


def secrets_of(url: str) -> set[str]:
    """Return every spelling of the password that a message of somebody else might quote."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return set()
    held = [parts.password, *parse_qs(parts.query).get("password", [])]
    return {text for one in held if one for text in (one, unquote(one))}


def without_secrets(text: str, url: str | None) -> str:
    """Return a text in which the password of ``url`` is blotted out."""
    for secret in sorted(secrets_of(url) if url else (), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
