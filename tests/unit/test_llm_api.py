"""The study of calls through the proxy: its children, its calls, and what makes it unsupported."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import fake_openai
import jsonschema
import pandas as pd
import pytest
from kvbench import processes
from kvbench.caching.proxy import cli
from kvbench.errors import Unsupported
from kvbench.paper import sections
from kvbench.studies import Context, control_of, llm_api
from kvbench.studies.measuring import _children as children
from kvbench.studies.measuring import _serving as serving
from kvbench.studies.measuring import llm_api as measuring

PAPER = Path(__file__).parents[2] / "paper" / "studies"


def defaults():
    return {name: p["default"] for name, p in llm_api.STUDY.options["properties"].items()}


def alive(process):
    return process.poll() is None


def sleeper():
    return [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"]


# --- children -------------------------------------------------------------------------------------


def test_a_child_stops_with_its_block(tmp_path):
    with children.child(sleeper(), tmp_path / "log") as process:
        assert alive(process)
    assert not alive(process)


def test_a_child_stops_when_its_block_fails(tmp_path):
    with pytest.raises(KeyError), children.child(sleeper(), tmp_path / "log") as process:
        raise KeyError
    assert not alive(process)


def test_a_child_that_ignores_the_signal_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "STOP_S", 0.2)
    stubborn = "import signal,time; signal.signal(15, signal.SIG_IGN); print('x', flush=True);"
    log = tmp_path / "log"
    with children.child([sys.executable, "-c", stubborn + "time.sleep(60)"], log) as process:
        children.await_ready(process, log, lambda: log.read_text() != "", 10, "stubborn")
    assert not alive(process)


def test_a_child_that_ends_early_is_unsupported_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        pytest.raises(Unsupported, match="server ended with status 3: no such model"),
        children.child(command, tmp_path / "log") as process,
    ):
        children.await_ready(process, tmp_path / "log", lambda: False, 10, "server")


def test_a_child_that_is_never_ready_is_unsupported_in_time(tmp_path):
    started = time.monotonic()
    with (
        pytest.raises(Unsupported, match=r"server was not ready after 0\.3 s"),
        children.child(sleeper(), tmp_path / "log") as process,
    ):
        children.await_ready(process, tmp_path / "log", lambda: False, 0.3, "server")
    assert time.monotonic() - started < 5


# --- the study ------------------------------------------------------------------------------------


@pytest.fixture
def external(monkeypatch):
    """An upstream named in OPENAI_BASE_URL, and a proxy without encoder, which starts faster."""
    with fake_openai.serving() as upstream:
        monkeypatch.setenv("OPENAI_BASE_URL", upstream.url)
        monkeypatch.setattr(
            measuring,
            "_proxy_command",
            lambda url, _factors: [
                *(sys.executable, "-m", "kvbench.caching.proxy"),
                *("--upstream", url, "--listen", "127.0.0.1:0"),
            ],
        )
        yield upstream


def run(tmp_path, **factors):
    options = defaults() | {"prompts": 2, "repeats": 3, "model": "m"} | factors
    return llm_api.STUDY.measure(options, Context(tmp_path, seed=1))


def test_repeats_are_hits_and_everything_else_reaches_the_server(external, tmp_path):
    rows = {row["call"]: row for row in run(tmp_path).rows}
    assert rows["repeated"]["calls"] == rows["repeated"]["hits"] == 6
    assert rows["stream_repeated"]["hits"] == 2
    for call in ("direct", "first", "no_store", "near_miss", "stream_first"):
        assert rows[call]["hits"] == 0
    for row in rows.values():
        assert row["right"] == row["calls"]
    # Two warm-ups, and per prompt: direct, first, paraphrase, near miss, no-store, stream; and the
    # controls of direct, first and stream.
    assert external.calls == 2 + 2 * (6 + 3)


def test_every_question_is_a_round_of_all_ways_in_an_order_drawn_anew(external, tmp_path):
    arms = run(tmp_path, prompts=6).samples["arms"]
    assert arms["direct"]["round"] == arms["first"]["round"] == list(range(6))
    assert arms["repeated"]["round"] == [number for number in range(6) for _ in range(3)]
    first_is_later = {
        first > direct
        for first, direct in zip(arms["first"]["slot"], arms["direct"]["slot"], strict=True)
    }
    assert first_is_later == {True, False}


def test_the_calls_that_others_are_compared_with_are_made_twice_and_shown_once(external, tmp_path):
    found = run(tmp_path)
    for name in ("direct", "first", "stream_first"):
        control = found.samples["arms"][control_of(name)]
        assert control["round"] == [0, 1] and control["cache"].count("hit") == 0
    assert {row["call"] for row in found.rows} == set(llm_api.CALLS)


def test_a_server_may_take_as_long_as_the_call_may():
    """62 s for an answer are fine if 200 are allowed: no other limit of the proxy is shorter."""
    factors = defaults() | {"call_timeout_s": 200}
    command = measuring._proxy_command("http://127.0.0.1:9/v1", factors)
    settings = cli.settings_of(cli.parser().parse_args(command[3:]))
    assert settings.total_timeout_s == 200
    assert settings.read_timeout_s is None


def test_a_server_that_fails_is_unsupported_in_one_line(external, tmp_path):
    external.mode = "error"
    with pytest.raises(Unsupported, match="does not answer a chat request") as error:
        run(tmp_path)
    assert "\n" not in str(error.value)


def test_an_external_server_needs_a_model_name(external, tmp_path):
    with pytest.raises(Unsupported, match=r"llm_api\.model"):
        run(tmp_path, model=None)


def test_without_a_local_model_the_cell_is_unsupported(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(Unsupported, match="no local model"):
        run(tmp_path)


def test_without_server_packages_the_cell_is_unsupported(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    find = measuring.importlib.util.find_spec
    monkeypatch.setattr(
        measuring.importlib.util,
        "find_spec",
        lambda name: None if name == "uvicorn" else find(name),
    )
    with pytest.raises(Unsupported, match="transformers serve needs uvicorn"):
        run(tmp_path)


def test_a_model_folder_without_a_model_is_unsupported(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    # A server that looks for its model and ends, as transformers serve does.
    monkeypatch.setattr(serving, "_healthy", lambda _port: False)
    monkeypatch.setattr(measuring, "_proxy_command", lambda *_: [sys.executable, "-c", "1/0"])
    monkeypatch.setattr(processes, "STOP_S", 0.2)
    options = defaults() | {"startup_timeout_s": 5}
    with pytest.raises(Unsupported, match="ZeroDivisionError"):
        llm_api.STUDY.measure(options, Context(tmp_path, seed=1, model_dir=tmp_path))
    assert {path.suffix for path in tmp_path.iterdir()} == {".log"}


STARTED = """
import sys, transformers.cli.transformers as program
from kvbench.engines import transformers_serve
def main():
    import transformers.generation.utils, transformers.quantizers.auto
    print(sys.argv[1:], {"hqq", "sklearn", "scipy"} & set(sys.modules))
program.main = main
transformers_serve.main()
"""


def test_the_server_starts_with_its_arguments_and_without_packages_that_it_has_no_use_for():
    done = subprocess.run(
        [sys.executable, "-c", STARTED, "serve", "model"],
        env=children.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "['serve', 'model'] set()\n", done.stderr


# --- values ---------------------------------------------------------------------------------------


def sample(seconds, cache="miss", kind="", right=True):
    return {"seconds": seconds, "cache": cache, "kind": kind, "right": right}


def calls(seconds, cache="miss", kind="", rounds=range(12)):
    count = len(rounds)
    return {
        "round": list(rounds),
        "seconds": [seconds] * count,
        "cache": [cache] * count,
        "kind": [kind] * count,
        "right": [True] * count,
    }


@pytest.fixture
def table():
    arms = {
        "direct": calls(1.0),
        "first": calls(1.25),
        "repeated": calls(0.005, "hit", "exact", [number // 3 for number in range(36)]),
        "paraphrased": calls(0.01, "hit", "semantic", range(3)),
        "near_miss": calls(1.25),
    }
    rows = [measuring._row(name, arm, "external") for name, arm in arms.items()]
    return pd.DataFrame(llm_api.aggregate({"rows": rows, "samples": {"arms": arms}}))


def test_values_come_from_the_rows(table):
    values = llm_api.STUDY.values(table)
    assert values["llm_api_repeated_speedup"].value == pytest.approx(250)
    assert values["llm_api_miss_overhead_ms"].value == pytest.approx(250)
    assert values["llm_api_repeated_ms"].value == pytest.approx(5)
    # Twelve questions for the exact hits, three for the others: too few for an interval.
    assert values["llm_api_repeated_speedup"].ci == pytest.approx((250, 250))
    assert values["llm_api_paraphrased_hit_speedup"].value == pytest.approx(125)
    assert values["llm_api_paraphrased_hit_speedup"].ci is None
    assert set(table.columns) <= set(llm_api.STUDY.columns)


def test_values_of_an_empty_table_are_missing():
    values = llm_api.STUDY.values(pd.DataFrame())
    measured = {name: v.value for name, v in values.items() if "published" not in name}
    assert set(measured.values()) == {None}
    assert all(name.startswith("llm_api_") for name in values)


def test_a_hit_on_a_near_miss_counts_as_wrong():
    def of(answer: str, cache: str = "hit"):
        return {"round": [0], "cache": [cache], "answer": [answer]}

    arms = {"direct": of("x", ""), "near_miss": of("x"), "paraphrased": of("x")}
    judged = measuring._judged(arms)
    assert (judged["near_miss"]["right"], judged["paraphrased"]["right"]) == ([False], [True])
    assert measuring._judged(arms | {"paraphrased": of("y")})["paraphrased"]["right"] == [False]


@pytest.mark.parametrize("change", [{"threshold": 1.1}, {"prompts": 0}, {"call_timeout_s": 0}])
def test_options_outside_their_bounds_are_refused(change):
    jsonschema.validate(defaults(), llm_api.STUDY.options)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(defaults() | change, llm_api.STUDY.options)


@pytest.mark.parametrize("language", ["en", "pt"])
def test_the_paragraph_renders_with_and_without_numbers(table, language):
    for rows in (table, table.iloc[:0]):
        values = llm_api.STUDY.values(rows)
        text = sections.study_tex("llm_api", values, language, PAPER.parent)
        assert text.startswith("\\subsection{")
        assert "\\label{sec:llm_api}" in text
        for shown in (
            text,
            sections.study_tex("llm_api", values, language, PAPER.parent, "tables"),
        ):
            assert "Value(" not in shown
            assert shown.count("\\begin{") == shown.count("\\end{")
