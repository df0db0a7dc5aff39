"""Whether as many conversations fit into a limited memory as the planner says: open them until one fails.

A process with a limited address space (``RLIMIT_AS``) holds a tiny model whose conversations are mostly
keys and values. What the first conversation takes beside its cache is its measured activations and work
space; with it the planner says how many fit, and then they are opened one after the other and kept.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvbench import strategies
from kvbench.analysis import capacity
from kvbench.errors import InputError
from kvbench.physics import Architecture

#: A Llama whose conversations of :data:`TOKENS` tokens hold 16 MiB of keys and values in float32.
MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
TOKENS = 512
#: Memory for weights, caches and work space, in bytes.
LIMITS = (128 * 2**20, 192 * 2**20, 320 * 2**20)
#: Conversations that are tried beyond the prediction.
_BEYOND = 4
#: Every tensor of a cache is mapped and given back by itself, so that no hole is left between them.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """What one limited process showed.

    Attributes
    ----------
    strategy, memory_bytes:
        What was tried, in how much memory.
    workspace_bytes:
        What the first conversation took beside weights and cache.
    predicted, ran:
        Conversations that should fit, and that did.
    """

    strategy: str
    memory_bytes: int
    workspace_bytes: int
    predicted: int
    ran: int

    @property
    def right(self) -> bool:
        """Whether the planner was within one conversation."""
        return abs(self.predicted - self.ran) <= 1


def check(strategy: str, limits: Sequence[int] = LIMITS) -> list[Outcome]:
    """Fill a process of its own with conversations, to one limit after the other (bytes, ascending).

    Raises
    ------
    InputError
        The system has no ``RLIMIT_AS`` that holds, or the process failed before the first conversation.
    """
    if sys.platform != "linux":
        raise InputError("capacity --check needs Linux, where an address space can be limited")
    code = "from kvbench.measurement import crowd; crowd.main()"
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [sys.executable, "-c", code, strategy, *map(str, limits)],
        env={**os.environ, **_ALLOCATOR, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"capacity --check: the process with {strategy} failed: {last}")
    return [Outcome(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def main(arguments: Sequence[str] | None = None) -> None:
    """What the limited process runs: its arguments are the strategy and the limits; prints JSON."""
    name, *limits = sys.argv[1:] if arguments is None else list(arguments)
    print(json.dumps(_fill(name, list(map(int, limits)))))


def _fill(name: str, limits: Sequence[int]) -> list[dict[str, int | str]]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from kvbench.inputs import models

    torch.set_num_threads(1)
    weights = AutoModelForCausalLM.from_config(LlamaConfig(**MODEL)).eval()
    size = sum(weight.numel() * weight.element_size() for weight in weights.parameters())
    model = models.LoadedModel(weights, weights.config.to_dict(), size, frozenset())
    strategy = strategies.get(name)
    prompt = [index % 500 for index in range(TOKENS - 3)]
    loaded = _address_space("VmSize")
    arch = Architecture.from_config({"model_type": "llama", **MODEL})

    def planned(memory_bytes: int, workspace: int = 0) -> dict:
        (row,) = capacity.plan(
            arch, memory_bytes, TOKENS, "float32", names=[name], workspace_bytes=workspace
        )
        return row

    def talk() -> tuple[object, object]:
        session = strategy.session(model, TOKENS)
        return session, session.generate(prompt, 4, lambda: None).cache

    found: list[dict[str, int | str]] = []
    with torch.inference_mode():
        kept = [talk()]
        needed = planned(limits[0])
        taken = _address_space("VmPeak") - loaded
        workspace = max(0, taken - needed["device_bytes"])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        for memory_bytes in limits:
            predicted = planned(memory_bytes, workspace)["concurrent"]
            soft = loaded - needed["weight_bytes"] + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            while len(kept) < predicted + _BEYOND:
                try:
                    kept.append(talk())
                except (MemoryError, RuntimeError):
                    # Torch says so when an allocation fails.
                    break
            found.append(
                {
                    "strategy": name,
                    "memory_bytes": memory_bytes,
                    "workspace_bytes": workspace,
                    "predicted": predicted,
                    "ran": len(kept),
                }
            )
    return found


def _address_space(field: str) -> int:
    """Bytes of this process's address space: now (``VmSize``) or at its largest (``VmPeak``)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise InputError(f"/proc/self/status has no {field}")
