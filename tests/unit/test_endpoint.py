"""Loads on an endpoint: what a client sees, how faults are told, what a service level counts."""

from __future__ import annotations

import asyncio
import random
from contextlib import contextmanager
from pathlib import Path

import fake_openai
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import study_runs
from kvbench import studies
from kvbench.caching.resilience import refused_port
from kvbench.engines import endpoint
from kvbench.errors import Unsupported
from kvbench.figures import _language, app_endpoint
from kvbench.paper import tex
from kvbench.studies.endpoint import LOADS, SERVERS
from kvbench.studies.measuring import endpoint as measuring

PAPER = Path(__file__).parents[2] / "paper"
TALK = ["one two three", "four five"]


@pytest.fixture
def upstream():
    with fake_openai.serving() as server:
        server.usage = {
            "prompt_tokens": 100,
            "completion_tokens": 7,
            "total_tokens": 107,
            "prompt_tokens_details": {"cached_tokens": 60},
        }
        yield server


def target(server, **changed) -> endpoint.Target:
    return endpoint.Target(server.url, "m", **{"limit_s": 5.0, **changed})


def closed(server, conversations, open_at_once=1, **changed):
    return asyncio.run(
        endpoint.closed_loop(target(server, **changed), conversations, open_at_once)
    )[0]


def test_an_answer_has_times_tokens_and_reuse(upstream):
    sample = closed(upstream, [TALK[:1]])[0]
    assert sample.error is None
    assert 0 < sample.ttft_s <= sample.e2e_s
    assert len(sample.itl_s) == sample.pieces - 1
    assert (sample.prompt_tokens, sample.cached_tokens) == (100, 60)
    assert sample.output_tokens == 7


def test_time_per_token_leaves_the_first_token_out():
    sample = endpoint.Sample(0, 0, 0.0, ttft_s=1.0, e2e_s=3.0, output_tokens=5)
    assert sample.tpot_s == pytest.approx(0.5)
    assert endpoint.Sample(0, 0, 0.0, ttft_s=1.0, e2e_s=1.0, output_tokens=1).tpot_s is None


def test_a_conversation_sends_its_whole_history(upstream):
    closed(upstream, [TALK])
    first, second = upstream.requests
    assert [message["content"] for message in first["messages"]] == TALK[:1]
    answer = fake_openai.answer_to(TALK[0])
    assert [message["content"] for message in second["messages"]] == [TALK[0], answer, TALK[1]]


def test_a_closed_loop_asks_every_question_once(upstream):
    samples = closed(upstream, [TALK] * 5, open_at_once=3)
    asked = sorted((sample.conversation, sample.turn) for sample in samples)
    assert asked == [(number, turn) for number in range(5) for turn in range(2)]


def test_an_open_loop_begins_each_conversation_at_its_moment(upstream):
    samples, _ = asyncio.run(endpoint.open_loop(target(upstream), [TALK[:1]] * 3, [0.0, 0.05, 0.1]))
    due = {sample.conversation: sample.due_s for sample in samples}
    assert due[1] >= 0.05
    assert due[2] >= 0.1


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("error", "status 500"),
        ("cut_stream", ""),
        ("stream_error", "chunks"),
        ("not_http", ""),
        ("rubbish", "before its end mark"),
    ],
)
def test_a_fault_is_one_line_in_its_sample(upstream, mode, words):
    upstream.mode = mode
    sample = closed(upstream, [TALK[:1]])[0]
    assert sample.error and words in sample.error
    assert "\n" not in sample.error


@pytest.mark.parametrize("mode", ["drip", "slow"])
def test_an_answer_that_does_not_end_is_given_up_at_its_limit(upstream, mode):
    upstream.mode = mode
    sample = closed(upstream, [TALK[:1]], limit_s=0.3)[0]
    assert sample.error == "no complete answer within 0.3 s"


def test_a_conversation_stops_at_its_first_failure(upstream):
    upstream.mode = "error"
    assert len(closed(upstream, [TALK])) == 1


def test_a_refused_connection_is_a_failure_not_an_end():
    with refused_port() as port:
        dead = endpoint.Target(f"http://127.0.0.1:{port}/v1", "m", limit_s=60)
        found = asyncio.run(endpoint.closed_loop(dead, [TALK], 1))[0]
    assert "Connect" in found[0].error


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1/v1",
        "http://127.0.0.1:99999/v1",
        "ftp://127.0.0.1/v1",
        "http://[bad/v1",
        "http://",
    ],
)
def test_an_address_that_is_none_is_refused_in_one_line(url, tmp_path):
    factors = study_runs.options("endpoint", url=url, model="m", servers=["configured"])
    with pytest.raises(Unsupported, match=r"is no address of a server; write it like") as caught:
        measuring.measure(factors, studies.Context(tmp_path, 1))
    assert "\n" not in str(caught.value)


def test_a_key_that_no_header_may_hold_is_named(upstream):
    assert "key" in closed(upstream, [TALK[:1]], key="schlüssel")[0].error


@pytest.mark.parametrize("said", ["7", -1, 2.5, None, True])
def test_a_count_that_is_none_is_as_if_unsaid(said, upstream):
    upstream.usage = {"completion_tokens": said, "prompt_tokens": said, "prompt_tokens_details": []}
    sample = closed(upstream, [TALK[:1]])[0]
    assert sample.error is None
    assert (sample.output_tokens, sample.prompt_tokens, sample.cached_tokens) == (None, None, None)
    assert sample.tpot_s > 0


def test_a_server_without_metrics_has_no_counters(upstream):
    assert endpoint.prefix_counters(target(upstream)) == {}


def test_the_study_measures_a_configured_server(upstream, tmp_path):
    table = study_runs.table(
        "endpoint",
        tmp_path / "run",
        servers=["configured"],
        url=upstream.url,
        model="m",
        open_conversations=[1, 3],
        rates_per_s=[200.0],
        conversations=4,
        rounds=2,
    )
    assert list(zip(table["load"], table["level"], strict=True)) == [
        ("closed", 1),
        ("closed", 3),
        ("open", 200),
    ]
    # Four conversations of two questions, twice.
    assert set(table["requests"]) == {16}
    assert set(table["failed"]) == {0}
    assert set(table["cached_share"]) == {0.6}
    assert (table["ttft_p50_s"] <= table["e2e_p50_s"]).all()


def test_failed_requests_are_never_good():
    factors = {"ttft_limit_s": 1.0, "tpot_limit_s": 0.1, "good_share": 0.5}
    request = {"ttft_s": 0.5, "tpot_s": 0.05, "e2e_s": 1.0, "itl_s": [0.1], "pieces": 2}
    request |= {"output_tokens": 2, "prompt_tokens": None, "cached_tokens": None, "hit": None}
    requests = [
        request | {"error": None},
        request | {"error": "status 500"},
        request | {"error": None, "ttft_s": 1.5},
        request | {"error": None, "tpot_s": 0.2},
    ]
    runs = [{"wall_s": 2.0, "counters": {}, "requests": requests}]
    row = measuring._row("proxy", factors, ("closed", 1), runs)
    assert (row["failed"], row["good_share"], row["good_per_s"]) == (1, 0.25, 0.5)
    assert row["borne"] is False


def test_a_server_that_answers_errors_is_unsupported_with_its_reason(upstream, tmp_path):
    upstream.mode = "error"
    factors = study_runs.options("endpoint", url=upstream.url, model="m", servers=["configured"])
    with pytest.raises(Unsupported, match="status 500"):
        measuring.measure(factors, studies.Context(tmp_path, 1))


def test_without_an_address_the_missing_keys_are_named(tmp_path):
    factors = study_runs.options("endpoint", servers=["configured"])
    with pytest.raises(Unsupported, match=r"app\.studies\.endpoint"):
        measuring.measure(factors, studies.Context(tmp_path, 1))


def row(server="vllm_serve", load="closed", level=1.0, borne=True, **changed):
    """A row of the study's table as it would be measured."""
    times = {
        f"{name}_{part}": value
        for name, value in (("ttft", 0.1), ("tpot", 0.02), ("e2e", 0.4))
        for part, value in (
            ("p50_s", value),
            ("p50_s_ci_low", 0.9 * value),
            ("p50_s_ci_high", 1.1 * value),
            ("p95_s", 1.5 * value),
            ("p99_s", 2 * value),
        )
    }
    known = {"machine": "here", "server": server, "load": load, "level": level, "borne": borne}
    known |= {"requests": 24, "failed": 0, "rounds": 2, "good_share": 1.0 if borne else 0.5}
    known |= {"good_per_s": 2.5, "cached_share": 0.4, "hit_share": None, "ttft_limit_s": 0.5}
    return known | times | {"tpot_limit_s": 0.1, "good_share_wanted": 0.95} | changed


def table(*rows) -> pd.DataFrame:
    columns = ["machine", *studies.get("endpoint").columns]
    return pd.DataFrame(rows).reindex(columns=columns)


LOADED = table(
    row(level=1),
    row(level=8),
    row(level=16, borne=False),
    row(load="open", level=0.5, borne=False),
    row(server="proxy", level=1, hit_share=0.25, failed=3),
    row(server="proxy", level=2, hit_share=0.25),
)


def test_what_is_borne_above_a_load_that_was_not_is_chance():
    rows = table(row(level=1), row(level=2, borne=False), row(level=4))
    values = studies.get("endpoint").values(rows)
    assert values["endpoint_vllm_serve_closed_highest"].value == 1
    assert values["endpoint_vllm_serve_closed_full_level"].value == 4


def test_a_server_that_bears_nothing_has_no_highest_load():
    values = studies.get("endpoint").values(LOADED)
    assert values["endpoint_vllm_serve_open_highest"].value is None
    assert values["endpoint_servers"].value == "proxy, vllm_serve"


@pytest.mark.parametrize(
    ("lang", "said"),
    [
        ("en", "the highest load that is borne is 8 open conversations; towards 16"),
        ("pt", "a maior carga suportada é de 8 conversas abertas; até 16"),
    ],
)
def test_the_paper_says_what_each_server_bears(lang, said):
    text, tables = (paper(LOADED, lang, part) for part in ("text", "tables"))
    assert said in text
    assert r"25\,\%" in text
    assert {"en": "complete answer: 3 ", "pt": "resposta completa: 3 "}[lang] in text
    # Two loads of the proxy; of vLLM the lowest and the highest, and one that is open.
    assert tables.count(r"\\") - 1 == 5


def test_without_a_server_the_paper_says_so():
    assert "No server could be run here" in paper(table(), "en", "text")
    assert r"\begin{tabular}" not in paper(table(), "en", "tables")


def paper(rows: pd.DataFrame, lang: str, part: str) -> str:
    """The study's part of the paper, in one line."""
    context = {"v": studies.get("endpoint").values(rows), "lang": lang, "part": part}
    context |= {"figures": ["app_endpoint"], "main_figures": []}
    page = tex.environment(PAPER, lang).from_string(
        r"\BLOCK{ import 'macros.tex.j2' as t with context }"
        r"\BLOCK{ include 'studies/endpoint.tex.j2' }"
    )
    return " ".join(page.render(context).split())


@pytest.mark.parametrize("lang", ["en", "pt"])
def test_the_figure_knows_every_server_and_is_said_in_both_languages(lang):
    rows = [row(server=server, load=load) for server in SERVERS for load in LOADS]
    figure = app_endpoint.draw(table(*rows))
    assert list(_language.localise(figure, lang)) == []
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(legend) == len(SERVERS) + 2
    plt.close(figure)


def test_conversations_are_like_none_before_but_for_the_repeated_ones():
    supply = measuring._Conversations(2, 0.25, random.Random(1))
    loads = [supply.take(8)[0] for _ in range(3)]
    for talks in loads:
        assert len({talk[0] for talk in talks}) == 6
    first = {talk[0] for talks in loads for talk in talks}
    assert len(first) == 18


def test_servers_that_are_compared_get_the_same_questions_under_numbers_of_their_own():
    supply = measuring._Conversations(2, 0.5, random.Random(1), copies=2)
    for one, other in (supply.take(4) for _ in range(3)):
        assert [talk[0].split(". ", 1)[1] for talk in one] == [
            talk[0].split(". ", 1)[1] for talk in other
        ]
        assert not {talk[0] for talk in one} & {talk[0] for talk in other}


def test_one_conversation_is_a_new_one_however_many_are_repeated():
    supply = measuring._Conversations(1, 1.0, random.Random(1))
    assert supply.take(1) != supply.take(1)


def test_a_proxy_and_the_server_behind_it_share_a_cell_and_engines_do_not():
    cells = studies.get("endpoint").plan(study_runs.options("endpoint", servers=list(SERVERS)))
    assert {name: cell.factors["servers"] for name, cell in cells.items()} == {
        "transformers": ["transformers_serve", "proxy"],
        "vllm": ["vllm_serve", "vllm_proxy"],
        "configured": ["configured"],
    }


@pytest.fixture
def pair(upstream, tmp_path, monkeypatch):
    """The record of a proxy and of the server behind it, both played by one that answers at once."""

    @contextmanager
    def targets(factors, _context):
        yield {server: target(upstream) for server in factors["servers"]}

    monkeypatch.setattr(measuring, "_targets", targets)
    return study_runs.records(
        "endpoint",
        tmp_path,
        open_conversations=[1, 2],
        rates_per_s=[500.0],
        conversations=2,
        turns=1,
        rounds=3,
    )["transformers"]


def test_the_servers_of_an_engine_take_turns_under_each_load(pair):
    arms = pair["samples"]["arms"]
    for load in ("closed-1", "closed-2", "open-500"):
        servers = ("transformers_serve", "proxy", "control-transformers_serve")
        own = [arms[f"{server}-{load}"] for server in servers]
        assert all(arm["round"] == [0, 1, 2] for arm in own)
        # Nothing else comes between the turns that are compared.
        slots = zip(*(arm["slot"] for arm in own), strict=True)
        assert all(max(turn) - min(turn) == 2 for turn in slots)


def test_a_server_alone_has_no_control(upstream, tmp_path):
    found = study_runs.records(
        "endpoint",
        tmp_path,
        servers=["configured"],
        url=upstream.url,
        model="m",
        open_conversations=[1],
        rates_per_s=[500.0],
        conversations=1,
        rounds=1,
    )["configured"]
    assert set(found["samples"]["arms"]) == {"configured-closed-1", "configured-open-500"}


def test_a_proxy_is_compared_with_its_server_within_rounds(pair):
    weather = np.linspace(1, 3, 12)
    for name, arm in pair["samples"]["arms"].items():
        pace = 0.8 if name.startswith("proxy") else 1.0
        arm["round"], arm["disturbed"] = list(range(12)), [False] * 12
        for measured in ("ttft_mean_s", "tpot_mean_s", "e2e_mean_s"):
            arm[measured] = list(pace * weather)
    rows = studies.get("endpoint").aggregate(pair)
    assert {row["server"]: row.get("ttft_ratio") for row in rows} == {
        "transformers_serve": None,
        "proxy": pytest.approx(0.8),
    }
    assert all(row["e2e_ratio_ci_high"] < 1 for row in rows if row["server"] == "proxy")


def test_a_turn_without_a_complete_answer_is_no_round_of_a_ratio(pair):
    for name, arm in pair["samples"]["arms"].items():
        arm["ttft_mean_s"] = [None, 1.0, 1.0] if name == "proxy-closed-1" else [1.0] * 3
    rows = {(row["server"], row["level"]): row for row in studies.get("endpoint").aggregate(pair)}
    assert rows["proxy", 1]["ttft_ratio_rounds"] == 2
    assert rows["proxy", 2]["ttft_ratio_rounds"] == 3


def test_few_rounds_give_a_ratio_without_an_interval(pair):
    values = studies.get("endpoint").values(table(*studies.get("endpoint").aggregate(pair)))
    assert values["endpoint_proxy_closed_full_ttft_ratio"].value is not None
    assert values["endpoint_proxy_closed_full_ttft_ratio"].ci is None
    assert "endpoint_transformers_serve_closed_full_ttft_ratio" not in values


@pytest.mark.parametrize(("lang", "said"), [("en", "without the proxy"), ("pt", "sem o proxy")])
def test_the_paper_gives_a_proxys_ratio_only_with_its_interval(lang, said):
    ratios = {
        f"{name}_ratio{end}": value
        for name in ("ttft", "e2e")
        for end, value in (("", 0.8), ("_ci_low", 0.7), ("_ci_high", 0.9), ("_rounds", 12))
    }
    server = row(server="transformers_serve")
    assert said in paper(table(server, row(server="proxy", **ratios)), lang, "text")
    del ratios["ttft_ratio_ci_low"]
    assert said not in paper(table(server, row(server="proxy", **ratios)), lang, "text")


@pytest.mark.parametrize(
    ("headers", "hit"), [({}, None), ({"x-cache": "hit"}, True), ({"x-cache": "miss"}, False)]
)
def test_what_a_proxy_had_is_told_apart(headers, hit, upstream):
    upstream.headers = headers
    assert closed(upstream, [TALK[:1]])[0].hit is hit
