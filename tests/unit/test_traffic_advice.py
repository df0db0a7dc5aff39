"""Advice on a log: verdicts from shares, words in two languages, files that give nothing away."""

from __future__ import annotations

import copy
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from kvbench import cli, documents, figures
from kvbench.analysis import capacity
from kvbench.errors import InputError
from kvbench.figures import _language, style
from kvbench.inputs import configuration
from kvbench.traffic import advise, cells, columns, example, replay, tables, verdicts, worth
from kvbench.traffic import log as logs
from matplotlib import pyplot as plt
from test_traffic_readers import LOGS
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = capacity.architecture("embedded")


class Words:
    """An encoder for tests: one place per word, so that equal words are close."""

    def encode(self, texts):
        rows = np.zeros((len(texts), 256), dtype=np.float32)
        for place, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                rows[place, sum(word.encode()) % 256] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def fits(self, text):
        return True


def setting(**change) -> replay.Setting:
    options = {"ceilings": worth.ceilings("1TFLOP/s,50GB/s"), "price": worth.price("1/4")}
    return replay.Setting("log", "embedded", EMBEDDED, 16 * 2**20, **options | change)


@pytest.fixture(scope="module")
def record() -> dict:
    """The shipped log, replayed."""
    return replay.run(logs.read([example.PATH]), setting(), Words())


@pytest.fixture
def lengths(tmp_path) -> dict:
    """A log of lengths only, replayed."""
    path = tmp_path / "azure.csv"
    rows = [f"2024-05-01 10:00:{n:02d},{100 + n},{10}\n" for n in range(30)]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(rows))
    return replay.run(logs.read([path]), setting(), None)


@pytest.fixture
def keys(tmp_path) -> dict:
    """A log of keys only, none of them repeated."""
    path = tmp_path / "keys.txt"
    path.write_text("".join(f"k{n}\n" for n in range(30)))
    return replay.run(logs.read([path]), setting(), None)


# ------------------------------------------------------------------ the shipped log


def test_the_shipped_log_is_what_the_study_s_stream_gives():
    import gzip

    assert gzip.decompress(example.PATH.read_bytes()) == gzip.decompress(example.packed())


def test_a_replay_of_the_same_log_gives_the_same_bytes(record):
    again = replay.run(logs.read([example.PATH]), setting(), Words())
    assert json.dumps(again, sort_keys=True) == json.dumps(record, sort_keys=True)


def test_every_value_has_a_described_column(record):
    assert list(record["summary"]) == list(columns.SUMMARY)
    assert set(record["tables"]) == set(columns.TABLES)
    assert all(record["tables"].values()), "the shipped log shows every part"


def test_shares_are_shares(record):
    for name, value in record["summary"].items():
        if name.endswith(("_share", "_ratio")) and value is not None:
            assert 0 <= value <= 1, name


def test_a_record_keeps_its_contract(record, tmp_path):
    cell = {"suite": "traffic", "log": "log", "model": "embedded"}
    cell |= {"memory_bytes": 2**24, "dtype": "bfloat16"}
    whole = {"schema": cells.SCHEMA, "cell": cell, **record, "code_digest": "0" * 16}
    cells.write(tmp_path / "r.json", whole)
    assert cells.read(tmp_path / "r.json") == json.loads(json.dumps(whole))
    with pytest.raises(InputError, match="missing key"):
        cells.write(tmp_path / "r.json", {**record, "schema": cells.SCHEMA})


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("memory", [2**10, 2**40])
def test_the_smallest_log_of_every_format_is_advised_on(name, memory, tmp_path):
    path = tmp_path / "log"
    path.write_text(LOGS[name])
    found = replay.run(logs.read([path]), replay.Setting("l", "m", EMBEDDED, memory), Words())
    json.dumps(found, allow_nan=False)
    for language in advise.LANGUAGES:
        assert "None" not in advise.advice(found, language)


# ------------------------------------------------------------------ verdicts


def with_shares(record: dict, **shares) -> dict:
    changed = copy.deepcopy(record)
    changed["summary"] |= shares
    return changed


NOTHING = {"exact_hit_ratio": 0.001, "prefix_token_share": 0.002, "semantic_share": 0.003}


@pytest.mark.parametrize(
    ("shares", "part", "word"),
    [
        ({"exact_hit_ratio": 0.05}, "exact", "use"),
        ({"exact_hit_ratio": 0.049}, "exact", "little"),
        ({"exact_hit_ratio": 0.009}, "exact", "no"),
        ({"prefix_token_share": 0.3}, "prefix", "use"),
        ({"semantic_share": 0.2}, "semantic", "judge"),
        ({"semantic_share": 0.2, "semantic_false_high": 0.04}, "semantic", "use"),
        ({"semantic_share": 0.2, "semantic_false_high": 0.2}, "semantic", "no"),
        (NOTHING, "overall", "no"),
        (NOTHING | {"semantic_share": 0.2}, "overall", "judge"),
        (NOTHING | {"exact_hit_ratio": 0.02}, "overall", "little"),
        (NOTHING | {"exact_hit_ratio": 0.2}, "overall", "use"),
    ],
)
def test_a_share_decides(shares, part, word, record):
    assert verdicts.decide(with_shares(record, **shares))[part].word == word


def test_a_log_of_lengths_cannot_tell_and_says_why(lengths):
    found = verdicts.decide(lengths)
    assert {name: verdict.word for name, verdict in found.items()} == dict.fromkeys(
        found, "unknown"
    )
    assert found["prefix"].why == "no_contents"
    assert lengths["tables"]["plan"][0]["machines"] > 0, "the fleet is planned all the same"


def test_a_log_without_repeats_is_advised_against_an_exact_cache(keys):
    assert verdicts.decide(keys)["exact"] == verdicts.Verdict("no", 0.0, "no_repeats")


@pytest.mark.parametrize("language", advise.LANGUAGES)
def test_a_prefix_cache_that_would_pay_in_more_memory_is_said_first(language, record):
    small = copy.deepcopy(record)
    small["summary"]["prefix_token_share"] = 0.02
    rows = [
        r for r in small["tables"]["prefix"] if (r["policy"], r["sharing"]) == ("lru", "shared")
    ]
    for place, row in enumerate(rows):
        row |= {"token_share": 0.03 * (place + 1), "capacity_gib": 2.0 * (place + 1)}
    said = advise.advice(small, language).partition("|")[0]
    assert "4 GiB" in said.replace(",", ".") and re.search(r"\b6[.,]00 %", said)
    assert verdicts.more_memory(small)[1]["token_share"] == max(r["token_share"] for r in rows)


def test_a_cache_that_pays_as_it_is_needs_no_more_memory(record, lengths):
    assert record["summary"]["prefix_token_share"] >= verdicts.PAYS
    assert verdicts.more_memory(record) is None and verdicts.more_memory(lengths) is None


def test_a_log_of_keys_lacks_prompts_and_not_contents(keys):
    assert verdicts.decide(keys)["prefix"] == verdicts.Verdict("unknown", None, "no_prompts")
    assert "which requests are equal, but not their prompts" in advise.advice(keys, "en")


def test_policies_that_never_learn_are_not_advised(tmp_path):
    # Round and round: who keeps the beginning finds it again.
    path = tmp_path / "keys.txt"
    path.write_text("".join(f"k{n % 40}\n" for n in range(200)))
    found = replay.run(logs.read([path]), setting(), None)
    there = {r["policy"]: r["hit_ratio"] for r in found["tables"]["exact"] if r["capacity"] == 3}
    assert min(there["lifo"], there["mru"]) > there["lru"]
    assert found["summary"]["exact_best_policy"] == "lru"


def test_decay_is_a_fifth_less_at_the_end():
    def windows(*values):
        return {"tables": {"time": [{"hits": value} for value in values]}}

    assert verdicts.decays(windows(0.1, 0.5, 0.45, 0.39), "hits") == (0.5, 0.39)
    assert verdicts.decays(windows(0.1, 0.5, 0.45, 0.41), "hits") is None
    assert verdicts.decays(windows(0.1), "hits") is None


def test_memory_without_room_for_the_weights_leaves_no_prefix_cache():
    tight = replay.Setting("log", "embedded", EMBEDDED, 2**20)
    found = replay.run(logs.read([example.PATH]), tight, None)
    assert verdicts.decide(found)["prefix"] == verdicts.Verdict("unknown", None, "no_room")
    assert "no room" in advise.advice(found, "en")


def test_prompts_shorter_than_a_block_have_no_prefix_to_share(tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n' * 3)
    found = replay.run(logs.read([path]), setting(), None)
    assert verdicts.decide(found)["prefix"] == verdicts.Verdict("unknown", None, "no_blocks")
    for language in advise.LANGUAGES:
        assert "None" not in advise.advice(found, language)


# ------------------------------------------------------------------ words


@pytest.mark.parametrize("language", advise.LANGUAGES)
@pytest.mark.parametrize("shares", [{}, NOTHING])
def test_the_advice_is_written_in_both_languages(language, shares, record):
    text = advise.advice(with_shares(record, **shares), language)
    assert text.startswith("# ") and "{{" not in text and "None" not in text
    headings = re.findall(r"^## ", text, re.MULTILINE)
    assert len(headings) == 8


@pytest.mark.parametrize("language", advise.LANGUAGES)
def test_what_a_log_cannot_tell_is_said_in_words(language, lengths, keys):
    for one in (lengths, keys):
        text = advise.advice(one, language)
        assert "None" not in text and "no_" not in text


@pytest.mark.parametrize(
    ("temperatures", "told", "told_pt"),
    [
        (["0", "0.0"], None, None),
        (["0.7", "null"], "All requests are sampled", "Todas as requisições são amostradas"),
        (["0", "1"], "50.00 % of the requests are", "50,00 % das requisições são"),
    ],
)
def test_an_exact_cache_of_sampled_answers_is_the_service_s_decision(
    temperatures, told, told_pt, tmp_path
):
    path, body = tmp_path / "log.jsonl", '{"messages": [{"role": "user", "content": "a"}]'
    lines = [f'{body}, "temperature": {value}}}\n' for value in temperatures] * 3
    # A body without a temperature is sampled too.
    path.write_text("".join(line.replace(', "temperature": null', "") for line in lines))
    found = replay.run(logs.read([path]), setting(), None)
    for language, sentence in (("en", told), ("pt", told_pt)):
        text = advise.advice(found, language)
        assert ("sampled**" in text or "amostradas**" in text) == (sentence is not None)
        assert sentence is None or sentence in text


@pytest.mark.parametrize(("count", "warned"), [(199, True), (200, False)])
def test_an_advice_on_few_requests_says_so_first(count, warned, tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("".join(f"k{n % 9}\n" for n in range(count)))
    found = replay.run(logs.read([path]), setting(), None)
    assert (f"These are {count} requests only." in advise.advice(found, "en")) == warned
    assert (f"São só {count} requisições." in advise.advice(found, "pt")) == warned


def test_no_cache_pays_is_an_advice(record):
    text = advise.advice(with_shares(record, **NOTHING), "en")
    assert "**No cache pays on this log.** That is an advice" in text


def test_marks_stand_with_their_interval(record):
    judged = {"semantic_false_share": 0.1, "semantic_false_low": 0.02, "semantic_false_high": 0.27}
    text = advise.advice(with_shares(record, **judged), "en")
    assert "10.00 % [2.00 %, 27.00 %] were false hits" in text


def test_numbers_are_written_as_the_language_writes_them(record):
    assert "28,985 input tokens" in advise.advice(record, "en")
    assert "28.985 tokens de entrada" in advise.advice(record, "pt")


def test_shares_are_printed_to_four_digits_and_a_dash_where_nothing_is_known(record, lengths):
    found = re.findall(r"0\.\d+$", advise.shares(record, "en"), re.MULTILINE)
    assert found and all(len(share) == 6 for share in found)
    assert re.search(r"exact repeats, per request +-$", advise.shares(lengths, "en"), re.MULTILINE)


def test_what_the_terminal_prints_is_in_the_reader_s_language(record):
    said = advise.shares(record, "pt")
    assert re.search(r"repetições exatas, por requisição +0,\d{4}$", said, re.MULTILINE)
    assert not re.search(r"\d\.\d{4}", said)


@pytest.mark.parametrize(
    ("bytes_", "words"),
    [(512, "512 B"), (1536, "1.5 KiB"), (1023.7, "1 KiB"), (2**20 - 1, "1 MiB"), (2**30, "1 GiB")],
)
def test_a_size_has_the_unit_that_makes_it_readable(bytes_, words, record):
    small = copy.deepcopy(record)
    for row in small["tables"]["prefix"]:
        row["capacity_gib"] = bytes_ / 2**30
    local = words.replace(".", ",")
    assert words in advise.shares(small, "en") and local in advise.shares(small, "pt")


@pytest.mark.parametrize("language", advise.LANGUAGES)
def test_a_small_cache_that_would_pay_is_not_called_nothing(language, record):
    small = copy.deepcopy(record)
    small["summary"]["prefix_token_share"] = 0.0
    for row in small["tables"]["prefix"]:
        row |= {"token_share": 0.3, "capacity_gib": 3 * 2.0**-20}
    said = advise.advice(small, language)
    assert "3 KiB" in said.partition("|")[0] and not re.search(r"\b0[.,]00\d* GiB", said)


def test_the_axis_of_memory_has_the_unit_of_the_largest_cache(record):
    from kvbench.figures import traffic_prefix

    table = tables.frames([record])["traffic_prefix"]
    table["capacity_gib"] *= 2.0**-11 / table["capacity_gib"].max()
    assert traffic_prefix.draw(table).axes[0].get_xlabel() == "memory of the cache (KiB)"


@pytest.mark.parametrize("language", advise.LANGUAGES)
def test_a_short_time_is_no_power_of_ten(language, record):
    for value in (3e-7, 2e-5, 0.004, 0.2, 7.0):
        assert "e-" not in advise._filters(language)["seconds"](value)


def test_what_saw_the_whole_log_is_not_said_to_have_seen_its_beginning(record):
    assert record["summary"]["semantic_requests"] == record["summary"]["requests"]
    assert "beginning of the log" not in advise.advice(record, "en")
    longer = with_shares(record, requests=10**6)
    assert "saw the beginning of the log only" in advise.advice(longer, "en")


def test_a_life_as_long_as_the_log_is_not_recommended(record):
    one = copy.deepcopy(record)
    one["tables"]["ttl"] = [{"ttl_s": 60.0, "hit_ratio": 1.0}]
    one["summary"]["span_s"] = 45.0
    assert "none shorter than the log" in advise.advice(one, "en")
    one["summary"]["span_s"] = 4500.0
    assert "Entries that live 60 s keep" in advise.advice(one, "en")


def test_pairs_are_offered_for_judgement_only_where_there_are_some(record):
    bare = copy.deepcopy(record)
    bare["summary"] |= {"semantic_requests": 3, "semantic_share": 0.0}
    bare["tables"]["pairs"] = []
    assert "traffic_pairs.csv" not in advise.advice(bare, "en")
    bare["tables"]["pairs"] = [{}, {}]
    assert "the riskiest pairs (2) stand in `traffic_pairs.csv`" in advise.advice(bare, "en")


@pytest.mark.parametrize("language", advise.LANGUAGES)
def test_limits_speak_of_nothing_that_the_log_does_not_have(language, lengths):
    limits = advise.advice(lengths, language).partition("## Limit")[2]
    assert limits and "tokens" not in limits and "Zipf" not in limits


# ------------------------------------------------------------------ figures and tables


@pytest.fixture(autouse=True)
def _closed():
    style.apply()
    yield
    plt.close("all")


@pytest.mark.parametrize("name", advise.figure_names())
@pytest.mark.parametrize("which", ["record", "lengths"])
def test_every_figure_is_drawn_whatever_the_log_tells(name, which, request, tmp_path):
    import importlib

    found = tables.frames([request.getfixturevalue(which)])
    module = importlib.import_module(f"kvbench.figures.{name}")
    drawn = [module.draw(*(found[t] for t in figures.tables_of(name, ()))) for _ in range(2)]
    first, second = (style.save(one, tmp_path / f"{n}") for n, one in enumerate(drawn))
    for left, right in zip(first, second, strict=True):
        assert left.read_bytes() == right.read_bytes()
    assert module.QUESTION.endswith("?")


@pytest.mark.parametrize("which", ["record", "lengths"])
def test_every_word_of_a_figure_is_said_in_portuguese(which, request):
    import importlib

    found = tables.frames([request.getfixturevalue(which)])
    for name in advise.figure_names():
        module = importlib.import_module(f"kvbench.figures.{name}")
        drawn = module.draw(*(found[t] for t in figures.tables_of(name, ())))
        left = set(_language.localise(drawn, "pt"))
        policies = {"LRU", "LFU", "FIFO", "S3-FIFO", "ARC", "SIEVE", "W-TinyLFU", "OPT"}
        assert left <= policies | {"log"}, name


def test_figures_of_replays_are_drawn_only_where_a_log_is_replayed():
    assert not any(name.startswith("traffic_") for name in figures.drawable([], traffic=False))
    assert set(advise.figure_names()) <= set(figures.drawable([]))


def test_a_figure_shows_one_log(record):
    other = copy.deepcopy(record)
    other["log"]["name"] = "other"
    from kvbench.figures import traffic_prefix

    table = tables.frames([record, other])["traffic_prefix"]
    assert set(table["log"]) == {"log", "other"}
    drawn = traffic_prefix.draw(table)
    assert "other" not in drawn.get_suptitle()


# ------------------------------------------------------------------ the command


def command(*words: str):
    return CliRunner().invoke(cli.app, ["advise", *words])


@pytest.fixture
def asked(tmp_path) -> Path:
    path = tmp_path / "service.jsonl"
    questions = ["What is the secret word?", "Open an account", "What is the secret word?"] * 5
    body = [{"messages": [{"role": "user", "content": q}], "user": "mallory"} for q in questions]
    path.write_text("".join(json.dumps(one) + "\n" for one in body))
    return path


OPTIONS = ("--model", "embedded", "--memory", "16MiB", "--no-semantic")


def test_the_command_writes_advice_tables_and_figures(asked, tmp_path):
    folder = tmp_path / "out"
    done = command(str(asked), *OPTIONS, "--output", str(folder), "--language", "pt")
    assert done.exit_code == 0, done.output
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"advice.pt.md", "advice.pt.html"} <= written
    assert {f"{name}.csv" for name in columns.described()} <= written
    assert {
        f"figures/{n}.pt.{s}" for n in advise.figure_names() for s in ("pdf", "svg", "png")
    } <= written
    assert "repetições exatas, por requisição" in done.output


def test_the_page_holds_its_figures_and_points_nowhere(asked, tmp_path):
    command(str(asked), *OPTIONS, "--output", str(tmp_path))
    page = (tmp_path / "advice.en.html").read_text()
    assert page.count("data:image/png;base64,") == page.count("<img ") >= 4
    assert 'src="figures' not in page and "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_nothing_that_is_written_holds_a_text_or_a_name_of_the_log(asked, tmp_path):
    command(str(asked), *OPTIONS, "--output", str(tmp_path / "out"))
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"secret" not in data and b"mallory" not in data, path.name


def test_nothing_of_the_log_leaves_the_machine(asked, tmp_path, monkeypatch):
    reached = []

    def refuse(sock, address, *_):
        reached.append(address)
        raise OSError("no network here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    done = command(
        str(asked), "--model", "embedded", "--memory", "16MiB", "--output", str(tmp_path)
    )
    assert done.exit_code == 0, done.output
    assert reached == []


def test_a_mistake_ends_in_one_line(asked, tmp_path, capsys, monkeypatch):
    asked.write_text("prose without a format\n")
    words = ["kvbench", "advise", str(asked), *OPTIONS, "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "nobody"}, "nobody"),
        ({"memory": "much"}, "much"),
        ({"language": "fr"}, "choose one of en, pt"),
        ({"dtype": "int3"}, "int3"),
        ({"price": "free"}, "price"),
        ({"rates": "fast"}, "ceilings"),
        ({"conversations": 0}, "conversations"),
    ],
)
def test_what_cannot_be_is_refused(change, words, asked, tmp_path):
    options = {"model": "embedded", "memory": "16MiB", "output": tmp_path / "out"} | change
    with pytest.raises(InputError, match=words):
        advise.run([asked], with_semantic=False, **options)


def test_a_model_folder_without_its_configuration_is_refused(asked, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        advise.run([asked], str(tmp_path / "model"), "1GiB", tmp_path / "out")


# ------------------------------------------------------------------ the configuration


def planned(**change):
    entry = {
        "name": "one",
        "paths": [str(example.PATH)],
        "models": ["embedded"],
        "memories": ["16MiB", "1GiB"],
    }
    config = configuration.fill({"traffic": {"logs": [entry | change]}}, "config.yaml")
    models = configuration.read_models(ROOT / "config" / "models")
    return cells.plan(config, models, "config.yaml")


def test_a_cell_is_a_log_a_model_and_a_memory():
    assert list(planned()) == ["one/embedded-16MiB", "one/embedded-1GiB"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"models": ["nobody"]}, "traffic.logs[0].models: unknown model 'nobody'"),
        ({"memories": ["much"]}, "traffic.logs[0].memories"),
        ({"paths": ["absent.jsonl"]}, "absent.jsonl: no such file"),
        ({"marks": "absent.csv"}, "absent.csv: no such file"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_line(change, words):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        planned(**change)
    assert "\n" not in str(caught.value)


def test_two_logs_of_one_name_are_refused():
    config = documents.read_yaml(ROOT / "config" / "config.yaml")
    config["traffic"]["logs"] *= 2
    filled = configuration.fill(config, "config.yaml")
    with pytest.raises(InputError, match="twice"):
        cells.plan(filled, configuration.read_models(ROOT / "config" / "models"), "c", files=False)


def test_a_cell_is_replayed_from_its_plain_values():
    cell = planned()["one/embedded-16MiB"].as_dict() | {"semantic": False}
    found = cells.run(cell, [], "digest")
    assert found["cell"]["log"] == "one" and found["summary"]["requests"] == example.REQUESTS
    assert found["missing"]["semantic"] == "no_encoder"
