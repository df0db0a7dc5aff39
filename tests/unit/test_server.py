"""The private cache server starts for a block, and nothing of it is left afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil
import pytest
import redis
import study_runs
from kvbench import studies
from kvbench.caching import addresses
from kvbench.caching import response_cache as response_cache_module
from kvbench.caching import server as server_module
from kvbench.caching.resilience import impatient, slow_proxy
from kvbench.caching.server import ServerRefused, delete_prefix, running
from kvbench.errors import InputError, Unsupported
from kvbench.studies.measuring import write_policy as write_policies_study

WORKFLOW = Path(__file__).parents[2] / "workflow"


@pytest.fixture(autouse=True)
def no_configured_server(monkeypatch):
    monkeypatch.delenv("REDIS_URL", raising=False)


def test_unix_server_answers_and_listens_on_no_port(tmp_path):
    with running(None, tmp_path) as server:
        client = server.client()
        assert client.set("a", "1") and client.get("a") == b"1"
        assert server.private and server.transport == "unix"
        assert server.version.split()[0] in {"valkey", "redis"}
        assert client.config_get("port")["port"] == "0"


def test_tcp_server_listens_on_the_loopback_only(tmp_path):
    with running(None, tmp_path, tcp=True) as server:
        client = server.client()
        assert client.ping()
        assert server.transport == "tcp" and server.address.startswith("127.0.0.1:")
        process = psutil.Process(client.info("server")["process_id"])
        listening = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
        assert {c.laddr.ip for c in listening} == {"127.0.0.1"}


def test_no_process_and_no_file_is_left_after_the_block(tmp_path):
    with running(None, tmp_path) as server:
        pid = server.client().info("server")["process_id"]
        assert list(tmp_path.iterdir())
    assert not psutil.pid_exists(pid)
    assert list(tmp_path.iterdir()) == []


def test_no_process_and_no_file_is_left_after_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), running(None, tmp_path) as server:
        pid = server.client().info("server")["process_id"]
        raise ZeroDivisionError
    assert not psutil.pid_exists(pid)
    assert list(tmp_path.iterdir()) == []


def lives(pid: int) -> bool:
    """Whether a process runs; in a container there may be nobody who buries the orphans."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_and_no_file_is_left_after_a_signal(tmp_path, number):
    program = (
        "import sys, time, pathlib, signal\n"
        "from kvbench.caching.server import running\n"
        # Where the tests run in the background, an interrupt would be ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with running(None, pathlib.Path(sys.argv[1])) as server:\n"
        "    print(server.client().info('server')['process_id'], flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(WORKFLOW)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as child:
        pid = int(child.stdout.readline())
        child.send_signal(number)
        status = child.wait(timeout=20)
    # SIGTERM ends the block in order, so that whatever else it holds is cleaned up too.
    assert number != signal.SIGTERM or status == 128 + signal.SIGTERM
    deadline = time.monotonic() + 10
    # After SIGKILL the watchdog needs a moment; otherwise all is gone already.
    while (lives(pid) or any(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not lives(pid)
    assert list(tmp_path.iterdir()) == []


def test_a_locale_that_this_machine_does_not_have_is_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "xx_XX.UTF-8")
    with running(None, tmp_path) as server:
        assert server.client().ping()


def test_a_scratch_path_too_long_for_a_socket_is_avoided(tmp_path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with running(None, deep) as server:
        path = Path(server.address.removeprefix("unix:"))
        assert server.client().ping()
        assert len(os.fsencode(path)) <= 100
    assert not path.parent.exists()


def test_a_handler_for_sigterm_that_was_there_is_kept(tmp_path):
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with running(None, tmp_path):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_configured_server_is_used_and_only_its_own_keys_are_deleted(tmp_path):
    with running(None, tmp_path, tcp=True) as real:
        admin = real.client()
        admin.set("somebody", "else's")
        with running(f"redis://{real.address}", tmp_path) as server:
            assert (server.kind, server.private, server.transport) == ("configured", False, "tcp")
            server.client().set(f"{server.namespace}key", "value")
        assert admin.keys() == [b"somebody"]


def test_redis_url_names_the_server_when_the_configuration_does_not(tmp_path, monkeypatch):
    with running(None, tmp_path) as real:
        monkeypatch.setenv("REDIS_URL", f"unix://{real.address.removeprefix('unix:')}")
        with running(None, tmp_path) as server:
            assert (server.kind, server.address) == ("configured", real.address)


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:1", "unix:///nowhere/at/all.sock", "http://127.0.0.1", "nonsense"]
)
def test_an_unusable_address_is_one_clear_line(tmp_path, url):
    with pytest.raises(InputError, match=r"app\.server_url") as caught, running(url, tmp_path):
        pass
    assert "\n" not in str(caught.value)


def test_a_password_never_appears_in_the_message(tmp_path):
    with pytest.raises(InputError) as caught, running("redis://u:secret@127.0.0.1:1", tmp_path):
        pass
    assert "secret" not in str(caught.value)


def test_without_any_server_the_cell_is_unsupported(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="no cache server"), running(None, tmp_path):
        pass


def test_a_server_program_that_dies_is_unsupported_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "executable", lambda: ("redis-server", "/bin/false"))
    with pytest.raises(Unsupported, match="did not start"), running(None, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_clients_are_closed_with_the_server(tmp_path):
    with running(None, tmp_path) as server:
        client = server.client(**impatient(1.0))
        client.ping()
    with pytest.raises(redis.ConnectionError):
        client.ping()


def test_delete_prefix_takes_the_prefix_literally(tmp_path):
    with running(None, tmp_path) as server:
        client = server.client()
        client.mset({"a*:1": 1, "a*:2": 2, "ab:1": 3})
        assert delete_prefix(client, "a*:") == 2
        assert client.keys() == [b"ab:1"]


# --- a server that belongs to somebody else ---


@pytest.mark.parametrize(
    "url",
    [
        "redis://:p@ss:w0rd/x@h",
        "redis://:123/456@h",
        "redis://:w0rd@h:port",
        "redis://:w0rd#x@h",
        "redis://:w0rd@h/not-a-number",
        "http://:w0rd@h",
    ],
)
def test_no_part_of_a_password_is_in_the_message_about_an_address(tmp_path, url):
    with pytest.raises(InputError) as caught, running(url, tmp_path):
        pass
    told = str(caught.value)
    assert told.startswith("app.server_url")
    # Of the whole chain, because a log shows it.
    shown = "".join(traceback.format_exception(caught.value))
    shown = shown[shown.index("InputError") :]
    for part in ("w0rd", "p@ss", "123", "456", "not-a-number"):
        assert part not in shown


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("redis://h", "h:6379/0"),
        ("redis://u:p%40ss@h:7000/3", "h:7000/3"),
        ("rediss://:secret@h?db=2&ssl_cert_reqs=none", "h:6379/2"),
        ("valkey://h/1", "h:6379/1"),
        ("unix://:secret@/run/s?db=4", "unix:/run/s/4"),
    ],
)
def test_a_server_is_named_without_its_password(url, where):
    assert addresses.label(url) == where


def test_a_password_is_blotted_out_of_a_text_in_every_spelling():
    text = addresses.without_secrets("p%40ss or p@ss", "redis://:p%40ss@h")
    assert text == "*** or ***"


@pytest.fixture
def guarded(tmp_path):
    """A server with a password, as somebody might run it, and its address with database 3."""
    with running(None, tmp_path) as real:
        real.client().config_set("requirepass", "open sesame")
        path = real.address.removeprefix("unix:")
        yield (
            redis.Redis(unix_socket_path=path, password="open sesame", db=3),
            (f"unix://:open%20sesame@{path}?db=3"),
        )


def test_a_way_around_to_a_server_keeps_its_account_and_database(guarded, tmp_path):
    admin, url = guarded
    path = admin.connection_pool.connection_kwargs["path"]

    def connect():
        end = socket.socket(socket.AF_UNIX)
        end.connect(path)
        return end

    with running(url, tmp_path) as server, slow_proxy(connect, 0.0) as port:
        server.client_at(port).set(f"{server.namespace}around", "x", ex=60)
        assert admin.keys("*around") == [f"{server.namespace}around".encode()]


def test_a_server_that_refuses_to_store_is_refused_with_its_own_reason(guarded, tmp_path):
    admin, url = guarded
    admin.config_set("maxmemory", 1)
    with (
        pytest.raises(ServerRefused, match="command not allowed when used memory"),
        running(url, tmp_path),
    ):
        pass


def test_a_read_only_replica_is_refused_with_its_own_reason(guarded, tmp_path):
    admin, url = guarded
    admin.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(ServerRefused, match="read only replica"), running(url, tmp_path):
        pass


def test_an_account_that_may_run_no_script_gives_no_times(guarded, tmp_path):
    """The layered cache writes by a script: without it every answer would come from the source."""
    admin, url = guarded
    admin.execute_command(
        *("ACL", "SETUSER", "plain", "on", ">word", "~*", "&*", "+@all", "-@scripting")
    )
    study = studies.get("layered")
    planned = study.plan(study_runs.options("layered", **ON_A_SERVER["layered"]))
    cell = next(cell for cell in planned.values() if cell.timed)
    account = url.replace("//:open%20sesame@", "//plain:word@")
    with pytest.raises(ServerRefused, match="no permissions to run the 'evalsha' command"):
        study.measure(cell.factors, studies.Context(tmp_path, 3, server_url=account))


#: Studies that ask a server which is not theirs alone, in their smallest form.
ON_A_SERVER = {
    "layered": {"rounds": 1, "workers": [1], "service_ms": [0.1]},
    "response_cache": {"rounds": 1, "backends": ["server_unix"], "service_ms": 0.1},
    "resilience": {
        "clients": ["short_timeout"],
        "faults": ["up", "corrupt", "wrong_type", "slow"],
        "requests": 10,
        "keys": 2,
        "service_ms": 0.1,
        "slow_ms": 1,
    },
    "stampede": {
        "protections": ["set_nx"],
        "threads": [2],
        "rounds": 1,
        "duration_ms": 100,
        "service_ms": 1,
        # Longer than the test: what is looked for must not have expired before the look.
        "ttl_ms": 60_000,
    },
    "write_policy": {"operations": 40, "rounds": 2, "crashes": 0, "write_shares": [0.5]},
}


@pytest.mark.parametrize("name", ON_A_SERVER)
def test_what_a_killed_study_leaves_on_a_server_has_an_expiry_and_a_place(
    name, guarded, tmp_path, monkeypatch
):
    """Killed before it cleans up: every key is in the given database, in its namespace, and expires."""
    admin, url = guarded
    for module in (server_module, write_policies_study, response_cache_module):
        if hasattr(module, "delete_prefix"):
            monkeypatch.setattr(module, "delete_prefix", lambda *_: 0)
    study = studies.get(name)
    planned = study.plan(study_runs.options(name, **ON_A_SERVER[name]))
    timed = [cell for cell in planned.values() if cell.timed]
    assert timed
    for cell in timed:
        study.measure(cell.factors, studies.Context(tmp_path, 3, server_url=url))
    left = admin.keys()
    assert left and all(key.startswith(b"kvbench:") for key in left)
    # -1 would be a key for good; -2 is one that has expired meanwhile.
    assert not [key for key in left if admin.pttl(key) == -1]
    assert set(admin.info("keyspace")) == {"db3"}
