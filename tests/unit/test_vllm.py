"""vLLM as an engine: the worker's protocol, its faults, and (where installed) its tokens."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
from kvbench import strategies, studies
from kvbench.engines import vllm
from kvbench.errors import Unsupported
from kvbench.measurement import conversation
from kvbench.measurement.cell import Cell, Job
from kvbench.measurement.memory import cache_bytes

#: Answers as the worker does, without vLLM: counts upwards, and reuses whole blocks of 32 tokens.
FAKE = """
import json, sys, time
seen = []
for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "start":
        answer = {"version": "0", "blocks": 8, "block_size": 32, "block_bytes": 1000, "order": order}
        answer |= {"import_s": 1.5, "start_s": 2.5, "compile_s": 0.5}
    elif order["do"] == "together":
        answer = {"blocks": len(order["prompts"]) + 1}
    elif order["do"] == "forget":
        seen, answer = [], {}
    elif order["do"] == "generate":
        same = 0
        while same < min(len(seen), len(order["ids"])) and seen[same] == order["ids"][same]:
            same += 1
        tokens = list(range(order["new"]))
        seen = order["ids"] + tokens
        now = time.perf_counter()
        answer = {"tokens": tokens, "stamps": [now] * len(tokens), "reused": same // 32 * 32}
    else:
        break
    print(json.dumps({"ok": True, **answer}), flush=True)
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """Put a program of the given text where vLLM's interpreter is looked for."""

    def put(program: str) -> None:
        worker = tmp_path / "worker.py"
        worker.write_text(textwrap.dedent(program))
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\nexec {sys.executable} {worker}\n")
        python.chmod(0o755)
        monkeypatch.setenv(vllm.VARIABLE, str(python))

    return put


def turns(*requests: tuple[int, bool, int]) -> conversation.Script:
    made = [conversation.Request(range(size), goes_on, new) for size, goes_on, new in requests]
    return conversation.Script(made, "conversation")


def test_without_vllm_the_command_that_installs_it_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv(vllm.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    why = strategies.get("vllm").available(None, "cpu")
    assert "make install-vllm" in why
    with pytest.raises(Unsupported, match="make install-vllm"):
        vllm.Worker(model="m")


def test_a_named_interpreter_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(vllm.VARIABLE, str(tmp_path / "nowhere"))
    assert "nowhere" in vllm.unavailable()


def test_a_conversation_reuses_blocks_within_itself_and_forgets_between_two(engine, tiny):
    engine(FAKE)
    seen = []
    session = strategies.get("vllm_prefix_caching").session(tiny, 200)
    try:
        for _ in range(2):
            talk = conversation.Talk(session, turns((40, False, 10), (5, True, 10)), "cpu")
            seen += [talk.turn(index).generation for index in (0, 1)]
    finally:
        session.close()
    assert [generation.reused_tokens for generation in seen] == [0, 32, 0, 32]
    assert [len(generation.stamps) for generation in seen] == [10, 10, 10, 10]


def test_held_bytes_are_whole_blocks_and_the_pool_is_told_apart(engine, tiny):
    engine(FAKE)
    session = strategies.get("vllm").session(tiny, 200)
    try:
        cache = session.generate(list(range(40)), 10, lambda: None).cache
    finally:
        session.close()
    # 49 tokens are kept: the last one is returned, and nothing follows it.
    assert (cache_bytes(cache), cache.reserved_bytes) == (2 * 1000, 8 * 1000)


def test_prefix_caching_is_asked_for_by_its_strategy_only(engine, tiny):
    engine(FAKE)
    asked = {}
    for name in ("vllm", "vllm_prefix_caching"):
        session = strategies.get(name).session(tiny, 64)
        asked[name] = session.facts["order"]["prefix_caching"]
        session.close()
    assert asked == {"vllm": False, "vllm_prefix_caching": True}


def test_a_model_that_vllm_refuses_is_unsupported_with_its_words(engine):
    engine(
        'print(\'{"ok": false, "error": "ValueError: no such architecture"}\', flush=True); input()'
    )
    with pytest.raises(Unsupported, match="no such architecture"):
        vllm.Worker(model="m")


def test_an_engine_that_dies_says_its_last_words(engine):
    engine("import sys; print('out of memory', file=sys.stderr); sys.exit(1)")
    with pytest.raises(Unsupported, match="out of memory"):
        vllm.Worker(model="m")


def test_an_engine_that_is_silent_is_given_up(engine, monkeypatch):
    engine("input(); input()")
    monkeypatch.setattr(vllm, "START_LIMIT_S", 0.2)
    with pytest.raises(Unsupported, match="did not answer"):
        vllm.Worker(model="m")


def test_no_process_and_no_folder_stay_behind(engine, tiny, tmp_path, monkeypatch):
    engine(FAKE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    session = strategies.get("vllm").session(tiny, 64)
    process = session._worker._process
    session.close()
    assert process.poll() is not None
    assert list((tmp_path / "scratch").iterdir()) == []


#: A cell of the study of shared prefixes on vLLM alone.
PREFIX = {
    "ways": ["vllm", "vllm_prefix_caching"],
    "system_tokens": 70,
    "question_tokens": 9,
    "new_tokens": 6,
    "requests": 3,
    "together": 2,
    "block_size": 16,
    "vllm_block_size": 32,
}


def prefix_rows(folder, scratch, **changed) -> dict[str, dict]:
    context = studies.Context(scratch, 3, model_dir=folder)
    outcome = studies.get("prefix").measure(PREFIX | changed, context)
    return {row["way"]: row for row in outcome.rows}


def test_a_system_prompt_s_blocks_are_found_and_pool_and_start_told_apart(
    engine, tiny_folder, tmp_path
):
    # This engine remembers its last prompt whatever it is told; only what is told apart is shown.
    engine(FAKE)
    row = prefix_rows(tiny_folder, tmp_path)["vllm_prefix_caching"]
    assert row["reused_tokens"] == row["prefill_saved_predicted"] * 79 == 64
    assert row["held_mib"] == 3 * 1000 / 2**20
    assert row["reserved_mib"] == 8 * 1000 / 2**20
    assert (row["engine_start_s"], row["engine_compile_s"]) == (4.0, 0.5)
    # Nobody recomputed, so nobody knows.
    assert row["tokens_equal"] is None


def test_without_vllm_the_other_ways_of_the_study_are_measured(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv(vllm.VARIABLE, str(tmp_path / "nowhere"))
    assert set(prefix_rows(tiny_folder, tmp_path, ways=["recompute", "vllm"])) == {"recompute"}


def test_a_record_keeps_start_and_compilation_of_an_engine_apart(
    engine, tiny, tiny_folder, tmp_path
):
    engine(FAKE)
    found = measured_cell(tiny, tiny_folder, tmp_path)
    said = found["engine"]
    assert (said["import_s"], said["start_s"], said["compile_s"]) == (1.5, 2.5, 0.5)


INSTALLED = pytest.mark.skipif(
    not Path(os.environ.get(vllm.VARIABLE) or ".venv-vllm/bin/python").is_file(),
    reason="vLLM is not installed here: make install-vllm",
)


@INSTALLED
def test_vllm_gives_the_tokens_of_the_dynamic_cache(tiny):
    replies = {}
    for name in ("dynamic", "vllm", "vllm_prefix_caching"):
        session = strategies.get(name).session(tiny, 300)
        try:
            talk = conversation.Talk(session, turns((70, False, 20), (6, True, 20)), "cpu")
            taken = [talk.turn(index).generation for index in (0, 1)]
            replies[name] = [(generation.tokens, generation.reused_tokens) for generation in taken]
        finally:
            session.close()
    tokens = {name: [reply for reply, _ in turn] for name, turn in replies.items()}
    assert tokens["vllm"] == tokens["vllm_prefix_caching"] == tokens["dynamic"]
    assert [reused for _, reused in replies["vllm_prefix_caching"]] == [0, 64]


@INSTALLED
def test_vllm_finds_the_system_prompt_again_and_answers_as_recomputation_does(
    tiny_folder, tmp_path
):
    rows = prefix_rows(tiny_folder, tmp_path, ways=["recompute", "vllm", "vllm_prefix_caching"])
    assert [rows[way]["reused_tokens"] for way in rows] == [0, 0, 64]
    assert [rows[way]["tokens_equal"] for way in rows] == [1, 1, 1]
    for way in ("vllm", "vllm_prefix_caching"):
        assert rows[way]["held_mib"] == rows[way]["held_mib_predicted"]
        assert rows[way]["held_mib"] < rows[way]["reserved_mib"]


def test_a_record_tells_memory_reserved_from_memory_held_and_guesses_no_peak(
    engine, tiny, tiny_folder, tmp_path
):
    engine(FAKE)
    turn = measured_cell(tiny, tiny_folder, tmp_path)["turns"][0]
    assert turn["kv_bytes"] == 2000
    assert turn["reserved_memory_bytes"] == 8000
    assert turn["peak_memory_bytes"] is None


def measured_cell(tiny, tiny_folder, tmp_path) -> dict:
    """What a cell of one turn on vLLM finds."""
    prompts = tmp_path / "prompts.json"
    steps = [{"prompt": list(range(40)), "new_tokens": 10}]
    prompts.write_text(json.dumps({"kind": "fixed", "steps": steps}))
    cell = {
        "measured": "vllm",
        "device": "cpu",
        "dtype": "float32",
        "turns": None,
        "max_new_tokens": 10,
        "max_prompt_tokens": None,
        "warmup": 0,
        "memory": "separate",
        "slowdown": 0.0,
        "quality": False,
        "profile": False,
    }
    measured = Cell(Job(cell, tiny_folder, prompts, 1), tiny)
    measured.open()
    measured.turn(0)
    return measured.finish()
