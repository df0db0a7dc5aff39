"""Servers that studies ask: ``transformers serve``, vLLM's own, or one that is already there."""

from __future__ import annotations

import http.client
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvbench import processes
from kvbench.engines import vllm
from kvbench.errors import Unsupported
from kvbench.studies import Context
from kvbench.studies.measuring import _children as children

#: What `transformers serve` imports beyond transformers itself.
_SERVER_PACKAGES = ("fastapi", "uvicorn", "openai")


@dataclass(frozen=True)
class Upstream:
    """A server: what it is, where it answers, the name of its model, and how to wait for it."""

    kind: str
    base_url: str
    model: str
    key: str
    wait: Callable[[], None]


@contextmanager
def upstream(factors: Mapping[str, Any], context: Context) -> Iterator[Upstream]:
    """Give a server that is there, or one that is being started and stops with the block."""
    external = os.environ.get("OPENAI_BASE_URL")
    if external:
        if not factors["model"]:
            raise Unsupported("OPENAI_BASE_URL is set, but app.studies.llm_api.model is not")
        key = os.environ.get("OPENAI_API_KEY", "none")
        yield Upstream("external", external, factors["model"], key, lambda: None)
        return
    with transformers_serve(context, factors["startup_timeout_s"]) as server:
        yield server


@contextmanager
def transformers_serve(context: Context, startup_timeout_s: float) -> Iterator[Upstream]:
    """Start ``transformers serve`` with the local model; it stops with the block.

    Raises
    ------
    Unsupported
        It cannot be started here, or was not ready in time.
    """
    missing = [name for name in _SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise Unsupported(f"transformers serve needs {', '.join(missing)}; install them")
    if context.model_dir is None:
        raise Unsupported("no local model for transformers serve")
    port = processes.free_port()
    model = str(context.model_dir.resolve())
    log = context.scratch / "server.log"
    command = [sys.executable, "-m", "kvbench.engines.transformers_serve", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    command += ["--dtype", "float32"]
    with children.child(command, log, children.environment()) as process:

        def wait() -> None:
            try:
                children.await_ready(
                    process, log, lambda: _healthy(port), startup_timeout_s, "transformers serve"
                )
            except Unsupported as error:
                # The reason goes into a record, where a path of this machine means nothing.
                name = context.model_dir.name
                raise Unsupported(str(error).replace(model, name)) from error

        yield Upstream("transformers serve", f"http://127.0.0.1:{port}/v1", model, "local", wait)


@contextmanager
def vllm_serve(context: Context, startup_timeout_s: float) -> Iterator[Upstream]:
    """Start vLLM's OpenAI-compatible server, with prefix caching, from its own environment.

    Raises
    ------
    Unsupported
        vLLM is not installed, or was not ready in time.
    """
    if why := vllm.unavailable():
        raise Unsupported(why)
    if context.model_dir is None:
        raise Unsupported("no local model for vLLM's server")
    port = processes.free_port()
    model = str(context.model_dir.resolve())
    log = context.scratch / "vllm.log"
    command = [vllm.interpreter(), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "4096", "--block-size", "32", "--enforce-eager"]
    command += ["--enable-prefix-caching", "--enable-prompt-tokens-details", "--max-num-seqs", "16"]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    # Our own path must not reach the other environment: it holds other versions.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with children.child(command, log, inherited | settings) as process:

        def wait() -> None:
            children.await_ready(
                process, log, lambda: _healthy(port), startup_timeout_s, "vLLM's server"
            )

        yield Upstream("vllm serve", f"http://127.0.0.1:{port}/v1", model, "local", wait)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
