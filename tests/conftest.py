"""What the tests share: a tiny seeded model made once, a private machine lock, hand-made records."""

from __future__ import annotations

import copy
import gc
import os
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Read by OpenMP when torch is first imported; the machine is shared with other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Another ninja than the one beside this interpreter would compile quanto's extension again.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# Here, so that a file's properties are tried alike whichever files are collected beside it. How long an
# example takes depends on what else the machine does, and the same examples come in every run; others
# come with --hypothesis-seed.
settings.register_profile(
    "patient", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")

ROOT = Path(__file__).resolve().parents[1]

#: A model file; its head size is the group size of the quantised caches, and its random, untied
#: weights give tokens that vary, so that equal tokens mean something.
TINY = {
    "name": "tiny",
    "title": "Tiny",
    "source": "built",
    "seed": 7,
    "initializer_range": 0.1,
    "tokenizer": "embedded",
    "architecture": {
        "model_type": "llama",
        "vocab_size": 2560,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1.0e-5,
        "tie_word_embeddings": False,
    },
}


def available_processors() -> int:
    """How many processors these tests may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker per processor, and at most four: each holds the libraries, some 0.7 GiB."""
    return min(available_processors(), 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that run Snakemake, the longest ones, so that no worker ends with one of them.

    Workers take whole files in this order, so that what a file's tests share is made once.
    """
    items.sort(key=lambda item: item.get_closest_marker("end_to_end") is None)


@pytest.fixture
def tiny_document() -> dict:
    """A model file as a document that a test may change."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny model as a folder in Hugging Face format."""
    import torch
    from kvbench.inputs import models
    from kvbench.measurement import startup

    torch.set_num_threads(1)
    startup.skip_unused_imports()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    models.prepare(TINY, folder, ROOT)
    # The libraries' many objects stay for good; every later collection would walk through them.
    gc.collect()
    gc.freeze()
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny model in memory, in float32 on the CPU."""
    from kvbench.inputs import models

    return models.load(tiny_folder, "cpu", "float32")


@pytest.fixture
def private_lock(tmp_path, monkeypatch) -> Path:
    """Measurements of this test do not wait for those of others on this machine."""
    from kvbench.measurement import lock

    path = tmp_path / "machine.lock"
    monkeypatch.setattr(lock, "machine", partial(lock.machine, path))
    return path


@pytest.fixture
def undisturbed(monkeypatch) -> None:
    """Nothing counts as noise, however busy the machine that runs the tests is."""
    from kvbench.measurement import noise

    monkeypatch.setattr(noise, "busy", lambda others_s, wall_s: False)


@pytest.fixture
def facts() -> dict:
    """What a machine's environment file says, as far as records need it."""
    return {
        "digest": "0123456789abcdef",
        "cpu": "A processor",
        "cores": 2,
        "commit": "0123456789ab",
        "gpu": None,
        "packages": {"torch": "2.13.0", "transformers": "5.15.1"},
    }


@pytest.fixture(scope="session")
def make_record():
    """A kv record by hand: every number in it is the test's own."""
    return kv_record


def _block(name: str, rounds: int) -> dict:
    """What a record says of its block."""
    return {
        "id": name,
        "members": ["dynamic", "static", "none"],
        "reference": "dynamic",
        "control": False,
        "rounds": rounds,
        "stopped": "precision",
        "precision": 0.03,
        "budget_s": 60.0,
        "processes": "forked",
        "probe_s": [0.001] * rounds,
        "order": [["dynamic", "static", "none"]] * rounds,
    }


def kv_record(
    strategy: str = "dynamic",
    e2e: list[list[float]] | None = None,
    *,
    replicate: int = 1,
    scenario: str = "talk",
    model: str = "tiny",
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 2,
    status: str = "ok",
    reason: str | None = None,
    disturbed: dict[tuple[int, int], bool] | None = None,
    digests: list[str] | None = None,
    new_tokens: int = 11,
    cold_s: float = 9.0,
    exact: bool = True,
    traffic: dict | None = None,
    block: str | None = None,
) -> dict:
    """Make a record whose ``e2e`` holds the seconds of each turn's iterations.

    The first token takes a tenth of a turn. ``disturbed`` names samples by (turn, iteration), both
    counted from 0; ``digests`` gives one letter per turn; with a ``block`` an iteration is its round.
    """
    e2e = [[1.0, 1.0, 1.0]] if e2e is None else e2e
    disturbed = disturbed or {}
    digests = digests or ["a"] * len(e2e)

    def sample(seconds: float, iteration: int, mark: bool = False) -> dict:
        first = seconds / 10
        gaps = [(seconds - first) / (new_tokens - 1)] * (new_tokens - 1)
        return {
            "iteration": iteration,
            "e2e_s": seconds,
            "ttft_s": first,
            "itl_s": gaps,
            "disturbed": mark,
            **({} if block is None else {"round": iteration, "slot": iteration}),
        }

    turns = [
        {
            "turn": number + 1,
            "prompt_tokens": 100 * (number + 1),
            "new_tokens": new_tokens,
            "reused_tokens": 0,
            "kv_bytes": (number + 1) * 2**20,
            "kv_bytes_predicted": (number + 1) * 2**20,
            "peak_memory_bytes": (number + 3) * 2**20,
            "reserved_memory_bytes": None,
            "token_digest": digests[number] * 64,
            "response": "Yes.",
            "cold": [sample(cold_s, 0)],
            "samples": [
                sample(seconds, i, disturbed.get((number, i), False))
                for i, seconds in enumerate(iterations)
            ],
        }
        for number, iterations in enumerate(e2e)
    ]
    return {
        "schema": "kvbench/kv-cell/1",
        "cell": {
            "suite": "kv",
            "model": model,
            "scenario": scenario,
            "strategy": strategy,
            "replicate": replicate,
            "device": device,
            "dtype": dtype,
            "seed": 1,
            "threads": threads,
            "max_new_tokens": new_tokens,
            "turns": len(e2e),
            "kind": "conversation",
            "experiment": "test",
            "iterations": len(e2e[0]),
            "warmup": 1,
        },
        **({} if block is None else {"block": _block(block, len(e2e[0]))}),
        "status": status,
        "reason": reason,
        "turns": turns if status == "ok" else [],
        "strategy_info": {
            "exact": exact,
            "compiled": False,
            "options": {},
            "traffic": traffic or {"kind": "dynamic"},
        },
        "model": {
            "parameter_bytes": 4,
            "attention": "sdpa",
            "architecture": {
                "layers": 2,
                "hidden_size": 64,
                "heads": 2,
                "kv_heads": 1,
                "head_dim": 64,
                "intermediate_size": 128,
                "vocab_size": 2560,
                "tied_embeddings": False,
                "max_positions": 4096,
            },
        },
        "compile": {"seconds": 0.0, "graphs": 0, "recompiles": 0},
        "noise": {},
        "environment": {"digest": "0123456789abcdef"},
        "code_digest": "0123456789abcdef",
        "started_at": "2025-10-01T12:00:00+00:00",
        "wall_s": 12.0,
    }
