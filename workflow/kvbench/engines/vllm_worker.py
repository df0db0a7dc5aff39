"""Runs inside vLLM's own environment: generates what it is told to, one JSON line in, one out.

vLLM brings its own torch and transformers, which are not the pinned ones, so it cannot live in the
process that measures the other strategies. This file therefore imports nothing of kvbench; it is
started by :mod:`kvbench.engines.vllm` with vLLM's interpreter, and ends when its input does.

Lines in
--------
``{"do": "start", "model": folder, "dtype": ..., "max_length": n, "prefix_caching": bool,
"block_size": n, "threads": n, "seed": n}``, ``{"do": "generate", "ids": [...], "new": n}``,
``{"do": "together", "prompts": [[...], ...], "new": n}``, ``{"do": "forget"}``, ``{"do": "stop"}``.

Lines out
---------
One for each line in, ``{"ok": true, ...}`` or ``{"ok": false, "error": "..."}``. Times are those of
``time.perf_counter``, which on Linux is one clock for all processes of a machine.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

#: Memory for keys and values on a CPU, in GiB: the engine takes whole GiB.
_SMALLEST_POOL_GIB = 1


class Worker:
    """One engine and what it is asked to do."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._prefix_caching = False
        self._requests = 0

    def start(self, order: dict[str, Any]) -> dict[str, Any]:
        """Load the engine; returns its version, what its start took, and the blocks it holds.

        ``start_s`` is without ``compile_s``, the seconds of torch.compile as the engine counts them.
        """
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(_SMALLEST_POOL_GIB))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["OMP_NUM_THREADS"] = str(order["threads"])
        begin = time.perf_counter()
        import torch
        import vllm

        on_gpu = torch.cuda.is_available() and order["device"] == "cuda"
        imported = time.perf_counter()
        settings: dict[str, Any] = {
            "model": order["model"],
            "dtype": order["dtype"],
            "max_model_len": order["max_length"],
            "enable_prefix_caching": order["prefix_caching"],
            "block_size": order["block_size"],
            "max_num_seqs": 8,
            "seed": order["seed"],
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        if not on_gpu:
            settings["enforce_eager"] = True
        self._engine = vllm.LLM(**settings).llm_engine
        self._prefix_caching = order["prefix_caching"]
        if not on_gpu:
            torch.set_num_threads(order["threads"])
        started = time.perf_counter()
        compiling = self._engine.vllm_config.compilation_config
        compile_s = getattr(compiling, "compilation_time", 0.0)
        cache = self._engine.vllm_config.cache_config
        return {
            "version": vllm.__version__,
            "torch": torch.__version__,
            "import_s": imported - begin,
            "start_s": max(0.0, started - imported - compile_s),
            "compile_s": compile_s,
            "blocks": cache.num_gpu_blocks,
            "block_size": cache.block_size,
            "block_bytes": self._pool_bytes() // cache.num_gpu_blocks,
            "threads": torch.get_num_threads(),
        }

    def _pool_bytes(self) -> int:
        """Bytes of the tensors that hold keys and values, as the engine allocated them."""
        runner = (
            self._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        )
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in _tensors(runner.kv_caches)
        }
        return sum(storages.values())

    def generate(self, order: dict[str, Any]) -> dict[str, Any]:
        """Generate greedily; returns tokens, the moment of each, and the prompt tokens reused."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        self._requests += 1
        parameters = SamplingParams(
            temperature=0.0, max_tokens=order["new"], ignore_eos=True, detokenize=False
        )
        prompt = TokensPrompt(prompt_token_ids=order["ids"])
        begin = time.perf_counter()
        self._engine.add_request(str(self._requests), prompt, parameters)
        stamps: list[float] = []
        last = None
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                now = time.perf_counter()
                last = output
                made = len(output.outputs[0].token_ids)
                stamps += [now] * (made - len(stamps))
        if last is None:
            raise RuntimeError("the engine returned nothing")
        return {
            "tokens": list(last.outputs[0].token_ids),
            "stamps": stamps,
            "begin": begin,
            "reused": last.num_cached_tokens or 0,
        }

    def together(self, order: dict[str, Any]) -> dict[str, Any]:
        """Serve requests at once; returns the most blocks of the pool that were theirs at a time."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        core = self._engine.engine_core.engine_core
        pool = core.scheduler.kv_cache_manager.block_pool
        parameters = SamplingParams(
            temperature=0.0, max_tokens=order["new"], ignore_eos=True, detokenize=False
        )
        idle = fewest = pool.get_num_free_blocks()
        for ids in order["prompts"]:
            self._requests += 1
            prompt = TokensPrompt(prompt_token_ids=ids)
            self._engine.add_request(str(self._requests), prompt, parameters)
        while self._engine.has_unfinished_requests():
            self._engine.step()
            fewest = min(fewest, pool.get_num_free_blocks())
        return {"blocks": idle - fewest}

    def forget(self, order: dict[str, Any]) -> dict[str, Any]:
        """Empty the prefix cache, as between two conversations that know nothing of each other."""
        if self._prefix_caching:
            self._engine.reset_prefix_cache()
        return {}


def _tensors(value: Any) -> list[Any]:
    """Tensors in nested lists, tuples and mappings."""
    if hasattr(value, "untyped_storage"):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in _tensors(part)]


def main() -> None:
    """Answer each line of standard input until it ends or says ``stop``."""
    # Whatever the libraries print goes to standard error; the answers have the pipe for themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "stop":
            break
        try:
            answer = {"ok": True, **getattr(worker, order["do"])(order)}
        except Exception as error:
            answer = {
                "ok": False,
                "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
