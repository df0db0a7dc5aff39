"""The private cache server starts for a block, and nothing of it is left afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis
from kvbench.caching import server as server_module
from kvbench.caching.resilience import impatient
from kvbench.caching.server import delete_prefix, running
from kvbench.errors import InputError, Unsupported

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
    while (psutil.pid_exists(pid) or any(tmp_path.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(pid)
    assert list(tmp_path.iterdir()) == []


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
