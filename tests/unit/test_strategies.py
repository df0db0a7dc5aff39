"""Every strategy of the registry: tokens, bytes, stamps, and honest reasons for what cannot run."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from kvbench import physics, strategies
from kvbench.errors import InputError
from kvbench.measurement.memory import cache_bytes
from kvbench.strategies import static
from kvbench.strategies.graph import StaticLoopSession

WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
MAX_LENGTH = 260
#: Two conversations: what is asked at each turn, as token ids.
CONVERSATIONS = (
    (range(300, 340), range(700, 720), range(900, 930)),
    (range(1200, 1230), range(40, 45)),
)
NEW = 12


def here(name: str) -> bool:
    """Whether a strategy runs on this CPU without compiling graphs."""
    strategy = strategies.get(name)
    return strategy.available(None, "cpu") is None and not strategy.compiled("cpu")


def hqq(name: str) -> bool:
    """HQQ must be visible to transformers from its first import, which this process may have had."""
    return name.startswith("quantized_hqq")


RUNNING = [name for name in strategies.names() if here(name) and not hqq(name)]
EXACT = [name for name in RUNNING if strategies.get(name).exact]


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def talk(session: strategies.Session, questions, new: int = NEW) -> list[list[int]]:
    """Replies of one conversation; the history grows by token ids."""
    session.restart()
    history: list[int] = []
    replies = []
    for question in questions:
        history += question
        replies.append(session.generate(history, new, lambda: None).tokens)
        history += replies[-1]
    return replies


@pytest.fixture
def opened(tiny):
    """Open sessions of strategies by name; all are closed when the test ends."""
    sessions = []

    def opened(name: str, max_length: int = MAX_LENGTH) -> strategies.Session:
        sessions.append(strategies.get(name).session(tiny, max_length))
        return sessions[-1]

    yield opened
    for session in sessions:
        session.close()


@pytest.fixture(scope="module")
def expected(tiny):
    """Replies of recomputation, which every exact strategy must give."""
    session = strategies.get("none").session(tiny, MAX_LENGTH)
    return [talk(session, questions) for questions in CONVERSATIONS]


# Tokens ---------------------------------------------------------------------------------------


def test_the_tiny_models_tokens_vary_so_that_equality_means_something(expected):
    replies = [tuple(reply) for conversation in expected for reply in conversation]
    assert len(set(replies)) == len(replies)
    assert min(len(set(reply)) for reply in replies) >= 4


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_strategy_gives_the_tokens_of_recomputation(opened, expected, name):
    session = opened(name)
    assert [talk(session, questions) for questions in CONVERSATIONS] == expected


def test_the_exact_strategies_of_a_cpu_are_at_least_these():
    assert {"none", "dynamic", "static", "paged"} <= set(EXACT)


def test_the_loop_that_is_captured_on_a_gpu_gives_the_same_tokens_on_a_cpu(tiny, expected):
    session = StaticLoopSession(tiny, MAX_LENGTH, capture=False)
    assert [talk(session, questions) for questions in CONVERSATIONS] == expected


@pytest.mark.parametrize("name", RUNNING)
def test_a_restarted_session_remembers_nothing(opened, name):
    session = opened(name)
    first = talk(session, CONVERSATIONS[0])
    talk(session, CONVERSATIONS[1])
    assert talk(session, CONVERSATIONS[0]) == first


@pytest.mark.parametrize("name", [n for n in RUNNING if not strategies.get(n).reuses_turns])
def test_without_reuse_no_prompt_token_counts_as_reused(opened, name):
    generation = opened(name).generate(list(range(300, 320)), 4, lambda: None)
    assert generation.reused_tokens == 0


@pytest.mark.parametrize("name", [n for n in RUNNING if strategies.get(n).reuses_turns])
def test_reuse_counts_history_once_per_conversation_and_none_after_a_restart(opened, name):
    session = opened(name)
    first = list(range(300, 340))
    for _ in range(2):
        session.restart()
        begun = session.generate(first, 8, lambda: None)
        assert begun.reused_tokens == 0
        history = [*first, *begun.tokens, *range(700, 720)]
        # The last token of a reply was never fed back, so its keys and values are not there.
        assert session.generate(history, 8, lambda: None).reused_tokens == len(first) + 8 - 1


# Stamps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNING)
@pytest.mark.parametrize("new", [2, 7])
def test_every_token_is_stamped_once_while_it_is_made(opened, name, new):
    session = opened(name)
    called: list[float] = []
    begin = time.perf_counter()
    generation = session.generate(
        list(range(300, 330)), new, lambda: called.append(time.perf_counter())
    )
    end = time.perf_counter()
    stamps = called if generation.stamps is None else generation.stamps
    assert len(generation.tokens) == len(stamps) == new
    assert [begin, *stamps, end] == sorted([begin, *stamps, end])
    assert not (called and generation.stamps)


def test_the_captured_loop_stamps_every_token_once(tiny):
    called: list[int] = []
    session = StaticLoopSession(tiny, MAX_LENGTH, capture=False)
    session.generate(list(range(300, 330)), 7, lambda: called.append(1))
    assert len(called) == 7


# Bytes ----------------------------------------------------------------------------------------

#: Prompt and new tokens; the last pair fills the full-precision rest of a quantised cache.
LENGTHS = ((40, 5), (64, 20), (30, 150))


def predicted(tiny, strategy: strategies.Strategy, prompt: int, new: int) -> int:
    architecture = physics.Architecture.from_config(tiny.architecture)
    return physics.predicted_kv_bytes(architecture, strategy.traffic(MAX_LENGTH), prompt, new, 4)


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_cache_holds_the_predicted_bytes(tiny, opened, name):
    session = opened(name)
    for prompt, new in LENGTHS:
        generation = session.generate(list(range(300, 300 + prompt)), new, lambda: None)
        assert cache_bytes(generation.cache) == predicted(tiny, strategies.get(name), prompt, new)


@pytest.mark.skipif(not installed("optimum.quanto"), reason="optimum-quanto is not installed")
@pytest.mark.parametrize("name", ["quantized_int4", "quantized_int2"])
def test_a_cache_quantised_by_quanto_holds_the_predicted_bytes(tiny, opened, name):
    session = opened(name)
    for prompt, new in LENGTHS:
        generation = session.generate(list(range(300, 300 + prompt)), new, lambda: None)
        assert cache_bytes(generation.cache) == predicted(tiny, strategies.get(name), prompt, new)


_HQQ = """
import json, sys
from pathlib import Path
import torch
from kvbench import physics, strategies
from kvbench.inputs import models
from kvbench.measurement.memory import cache_bytes
torch.set_num_threads(1)
found = {}
for name in ("quantized_hqq_int8", "quantized_hqq_int4"):
    strategy = strategies.get(name)
    tiny = models.load(Path(sys.argv[1]), "cpu", "float32", keep=strategy.needs())
    session = strategy.session(tiny, 260)
    shape = physics.Architecture.from_config(tiny.architecture)
    found[name] = []
    for prompt, new in json.loads(sys.argv[2]):
        held = session.generate(list(range(300, 300 + prompt)), new, lambda: None)
        traffic = strategy.traffic(260)
        said = physics.predicted_kv_bytes(shape, traffic, prompt, new, 4)
        found[name].append([cache_bytes(held.cache), said, len(held.tokens)])
print(json.dumps(found))
"""


@pytest.mark.skipif(not installed("hqq"), reason="hqq is not installed")
def test_caches_quantised_by_hqq_hold_the_predicted_bytes_in_a_process_of_their_own(tiny_folder):
    done = subprocess.run(
        [sys.executable, "-c", _HQQ, str(tiny_folder), json.dumps(LENGTHS)],
        env={**os.environ, "PYTHONPATH": str(WORKFLOW), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"quantized_hqq_int8", "quantized_hqq_int4"}
    for rows in found.values():
        assert [row[2] for row in rows] == [new for _, new in LENGTHS]
        assert [row[0] for row in rows] == [row[1] for row in rows]


def test_a_static_cache_is_as_large_before_the_first_turn_as_after_it(tiny, opened):
    session = opened("static")
    sizes = {
        cache_bytes(session.generate(list(range(300, 300 + n)), 3, lambda: None).cache)
        for n in (5, 200)
    }
    assert len(sizes) == 1


# What cannot run ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static", "static_graph"])
def test_a_strategy_of_a_gpu_says_so_on_a_cpu(name):
    strategy = strategies.get(name)
    assert strategy.available(None, "cpu") == f"{name} needs a cuda device"
    assert strategy.available(None, "cuda") is None


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("quantized_int4", "optimum-quanto"),
        ("quantized_int2", "optimum-quanto"),
        ("quantized_hqq_int8", "hqq"),
        ("quantized_hqq_int4", "hqq"),
    ],
)
def test_a_missing_package_is_named_as_pip_knows_it(monkeypatch, name, package):
    def absent(module: str) -> None:
        # The parent of a dotted name is imported, which fails when it is absent.
        if "." in module:
            raise ModuleNotFoundError(module)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    reason = strategies.get(name).available(None, "cpu")
    assert f"pip install {package}" in reason
    assert reason.startswith(name)


def test_groups_that_do_not_divide_the_head_size_are_refused_with_both_numbers(tiny):
    strategy = dataclasses.replace(strategies.get("quantized_int4"), group_size=48)
    reason = strategy.available(tiny, "cpu")
    assert "48" in reason
    assert "64" in reason


@pytest.mark.parametrize(
    ("source", "reason"), [("class DynamicLayer:", "fp8"), ("class FP8QuantizedLayer:", None)]
)
def test_fp8_needs_a_transformers_that_has_it(monkeypatch, tmp_path, source, reason):
    import transformers
    from kvbench.strategies import quantized

    (tmp_path / "cache_utils.py").write_text(source)
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: spec)
    found = strategies.get("quantized_fp8").available(None, "cpu")
    if reason is None:
        assert found is None
    else:
        assert reason in found and transformers.__version__ in found


def test_fp8_holds_the_predicted_bytes_where_it_runs(tiny, opened):
    strategy = strategies.get("quantized_fp8")
    if reason := strategy.available(tiny, "cpu"):
        pytest.skip(reason)
    for prompt, new in LENGTHS:
        found = opened("quantized_fp8").generate(list(range(300, 300 + prompt)), new, lambda: None)
        assert cache_bytes(found.cache) == predicted(tiny, strategy, prompt, new)


def test_traffic_is_known_where_there_is_no_transformers(monkeypatch):
    from kvbench.strategies import quantized

    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda _: None)
    for name in strategies.names():
        assert strategies.get(name).traffic(100).kind in physics.KINDS


def test_compiling_for_a_cpu_needs_a_compiler(monkeypatch):
    strategy = strategies.get("static_compiled")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "g++" in strategy.available(None, "cpu")
    assert strategy.available(None, "cuda") is None
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert strategy.available(None, "cpu") is None


@pytest.mark.parametrize(
    ("name", "cpu", "cuda"),
    [
        ("none", False, False),
        ("dynamic", False, False),
        ("static", False, True),
        ("static_compiled", True, True),
    ],
)
def test_a_strategy_says_truly_whether_it_is_compiled(name, cpu, cuda):
    strategy = strategies.get(name)
    assert (strategy.compiled("cpu"), strategy.compiled("cuda")) == (cpu, cuda)


def test_the_paged_engine_gives_the_model_its_attention_back(tiny):
    before = tiny.model.config._attn_implementation
    session = strategies.get("paged").session(tiny, 64)
    session.generate(list(range(300, 310)), 2, lambda: None)
    session.close()
    assert tiny.model.config._attn_implementation == before


# Registry -------------------------------------------------------------------------------------


def test_the_registry_holds_the_strategies_of_the_plan():
    assert {
        "none",
        "dynamic",
        "static",
        "static_compiled",
        "offloaded",
        "offloaded_static",
        "quantized_int4",
        "quantized_int2",
        "quantized_hqq_int8",
        "quantized_hqq_int4",
        "quantized_fp8",
        "paged",
    } <= set(strategies.names())


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="unknown strategy 'dinamic'") as error:
        strategies.get("dinamic")
    assert all(name in str(error.value) for name in strategies.names())


@pytest.mark.parametrize("name", strategies.names())
def test_a_strategy_documents_itself_and_its_record_is_plain_json(name):
    strategy = strategies.get(name)
    assert (type(strategy).__doc__ or "").strip()
    assert strategy.id == name
    assert strategy.devices <= {"cpu", "cuda"}
    assert strategy.traffic(100).kind in physics.KINDS
    json.dumps({"options": strategy.options(), "traffic": strategy.traffic(100).as_dict()})


_MINE = '''
"""A strategy that somebody added."""

from dataclasses import dataclass
from typing import ClassVar

from kvbench.strategies.base import Strategy


@dataclass(frozen=True)
class Mine(Strategy):
    """Keeps nothing."""

    name: ClassVar[str] = "mine"
'''


def test_one_class_in_one_file_is_all_that_a_new_strategy_needs(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(_MINE)
    monkeypatch.setattr(strategies, "__path__", [*strategies.__path__, str(tmp_path)])
    strategies._registry.cache_clear()
    try:
        assert "mine" in strategies.names()
        assert type(strategies.get("mine")).__name__ == "Mine"
    finally:
        sys.modules.pop("kvbench.strategies.mine", None)
        vars(strategies).pop("mine", None)
        strategies._registry.cache_clear()
        gc.collect()
    monkeypatch.undo()
    assert "mine" not in strategies.names()


def test_a_user_without_a_name_gets_a_folder_for_what_is_compiled(monkeypatch):
    import getpass

    from kvbench.strategies import static

    def nameless():
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(getpass, "getuser", nameless)
    # Set first, so that what is put there is gone afterwards, even where none was.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    static.name_the_compilers_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].endswith(f"torchinductor_{os.getuid()}")


def test_an_offloaded_static_layer_is_fetched_behind_the_work_that_was_asked_before(monkeypatch):
    import torch

    asked: list[object] = []

    class Stream:
        def wait_stream(self, other):
            asked.append(("waits for", other))

    class Cache:
        prefetch_stream = Stream()

        def prefetch(self, *given):
            asked.append(("fetches", *given))

    cache = Cache()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the work")
    monkeypatch.setattr(static, "allocated_static_cache", lambda *_, **__: cache)
    strategies.get("offloaded_static").session(None, MAX_LENGTH)
    cache.prefetch(3, False)
    assert asked == [("waits for", "the work"), ("fetches", 3, False)]
