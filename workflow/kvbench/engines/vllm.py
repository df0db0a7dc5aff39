"""vLLM beside transformers: finds its environment, starts a worker there, and asks it for tokens."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
from collections import deque
from pathlib import Path
from typing import Any

from kvbench.errors import Unsupported

#: Names another interpreter that can import vLLM.
VARIABLE = "KVBENCH_VLLM_PYTHON"
#: What to do where there is none.
INSTALL = "make install-vllm"
#: Seconds after which a start, or a turn, is given up; starting compiles on a GPU.
START_LIMIT_S, TURN_LIMIT_S = 600.0, 600.0
_WORKER = Path(__file__).with_name("vllm_worker.py")


def interpreter() -> str | None:
    """The Python that can import vLLM: the variable's, or that of the folder ``.venv-vllm``."""
    named = os.environ.get(VARIABLE)
    candidates = [Path(named)] if named else [Path(".venv-vllm/bin/python")]
    return next((str(path.absolute()) for path in candidates if path.is_file()), None)


def unavailable() -> str | None:
    """Why vLLM cannot be started here, in one sentence, or None when it can."""
    if interpreter() is not None:
        return None
    named = os.environ.get(VARIABLE)
    if named:
        return f"vLLM's interpreter {named} ({VARIABLE}) does not exist"
    return f"vLLM has an environment of its own, which is not installed here: {INSTALL}"


class Worker:
    """A process that holds one vLLM engine; ends with :meth:`close` or with this process.

    Parameters
    ----------
    order:
        What :mod:`kvbench.engines.vllm_worker` takes at its start.

    Raises
    ------
    Unsupported
        vLLM is not installed, or refuses the model; the message is its own.
    """

    def __init__(self, **order: Any) -> None:
        python = interpreter()
        if python is None:
            raise Unsupported(unavailable())
        self._process = subprocess.Popen(
            # -P: a file beside the worker has the name of the package it imports.
            [python, "-P", "-u", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Our own path must not reach the other environment: it holds other versions.
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        )
        self._said: deque[str] = deque(maxlen=20)
        self._answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._listeners = [
            threading.Thread(target=target, daemon=True)
            for target in (self._listen, self._overhear)
        ]
        for listener in self._listeners:
            listener.start()
        try:
            self.facts = self._ask("start", START_LIMIT_S, **order)
        except RuntimeError as error:
            self.close()
            raise Unsupported(f"vLLM does not start with this model: {error}") from None
        except BaseException:
            self.close()
            raise

    def generate(self, token_ids: list[int], new_tokens: int) -> dict[str, Any]:
        """Tokens, their moments (s, ``perf_counter``), prompt tokens reused, bytes of blocks held."""
        return self._ask("generate", TURN_LIMIT_S, ids=token_ids, new=new_tokens)

    def together(self, prompts: list[list[int]], new_tokens: int) -> int:
        """Most blocks of the pool that these requests have at a time, when they are served at once."""
        return self._ask("together", TURN_LIMIT_S, prompts=prompts, new=new_tokens)["blocks"]

    def forget(self) -> None:
        """Empty the engine's prefix cache."""
        self._ask("forget", TURN_LIMIT_S)

    def close(self) -> None:
        """End the process; what it held is free afterwards."""
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps({"do": "stop"}) + "\n")
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for listener in self._listeners:
            listener.join(timeout=5)
        for pipe in (self._process.stdout, self._process.stderr):
            pipe.close()

    def _ask(self, what: str, limit_s: float, **order: Any) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps({"do": what, **order}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise RuntimeError(f"the engine's process has ended: {self._last_words()}") from None
        try:
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            self._process.kill()
            raise RuntimeError(f"the engine did not answer within {limit_s:.0f} s") from None
        if line is None:
            raise RuntimeError(f"the engine's process has ended: {self._last_words()}")
        answer = json.loads(line)
        if not answer.pop("ok"):
            raise RuntimeError(answer["error"])
        return answer

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _overhear(self) -> None:
        for line in self._process.stderr:
            if line.strip():
                self._said.append(line.strip())

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        # What it wrote last may still be on its way through the pipe.
        self._listeners[-1].join(timeout=5)
        return (self._said[-1] if self._said else f"exit status {self._process.returncode}")[:300]
