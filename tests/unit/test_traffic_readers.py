"""Request logs: each format is recognised and read, and what is wrong is said in one line."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from kvbench.errors import InputError
from kvbench.traffic import log as logs
from kvbench.traffic import readers
from kvbench.traffic.readers import base

MOONCAKE = [
    {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
    {"timestamp": 1500, "input_length": 512, "output_length": 7, "hash_ids": [0]},
    {"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
]
BURST = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,a,1.5,ChatGPT,472,18,490,Conversation log\n"
    "45,b,0.5,GPT-4,1087,230,1317,Conversation log\n"
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:04.0319600,3180,8\n"
)
SHAREGPT = [
    {
        "id": "c1",
        "conversations": [
            {"from": "human", "value": "What is a cache?"},
            {"from": "gpt", "value": "A store of answers."},
            {"from": "human", "value": "And a prefix cache?"},
            {"from": "gpt", "value": "One of keys and values."},
        ],
    },
    {"id": "c2", "conversations": [{"from": "human", "value": "What is a cache?"}]},
]


def body(text: str, **more) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


OPENAI = [
    body("one", timestamp=10, user="u1", usage={"prompt_tokens": 4, "completion_tokens": 2}),
    body("two", timestamp=12, user="u2", usage={"prompt_tokens": 5, "completion_tokens": 2}),
    body("one", timestamp=15, user="u2", usage={"prompt_tokens": 4, "completion_tokens": 2}),
]


def jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, text: str | bytes, name: str = "log") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(folder: Path, text: str | bytes, **options) -> logs.Log:
    return logs.read([write(folder, text)], **options)


LOGS = {
    "mooncake": jsonl(MOONCAKE),
    "burstgpt": BURST,
    "azure": AZURE,
    "sharegpt": json.dumps(SHAREGPT),
    "openai": jsonl(OPENAI),
    "libcachesim-text": "a\nb\na\n",
    "libcachesim-csv": "time,obj_id,obj_size\n0,a,10\n1,b,20\n2,a,10\n",
}


@pytest.mark.parametrize("name", LOGS)
def test_a_format_is_known_by_its_content(name, tmp_path):
    assert read(tmp_path, LOGS[name]).format == name


def test_every_format_has_an_example_here():
    assert set(readers.formats()) == set(LOGS)


def test_mooncake_gives_blocks_times_and_lengths(tmp_path):
    log = read(tmp_path, LOGS["mooncake"])
    assert log.block_tokens == 512 and log.partial_blocks
    assert log.blocks.tolist() == [0, 1, 0, 0, 1]
    assert log.offsets.tolist() == [0, 2, 3, 5]
    assert log.times_s.tolist() == [0, 1.5, 1.5]
    assert log.keys.tolist() == [0, 1, 0]


def test_logs_of_lengths_alone_have_no_contents(tmp_path):
    for name in ("burstgpt", "azure"):
        log = read(tmp_path, LOGS[name])
        assert log.keys is None and log.blocks is None
    assert log.times_s[1] == pytest.approx(0.052)
    assert log.input_tokens.tolist() == [4808, 3180]


def test_burstgpt_sessions_are_clients(tmp_path):
    assert read(tmp_path, BURST).clients.tolist() == [0, 1]


def test_a_question_of_a_shared_conversation_carries_its_history(tmp_path):
    log = read(tmp_path, LOGS["sharegpt"])
    assert log.requests == 3 and log.times_s is None
    assert log.keys.tolist() == [0, 1, 0], "the first question is asked twice, without history"
    assert log.cut_tokens[1] > log.cut_tokens[0]


def test_objects_of_a_list_are_read_one_by_one_however_they_are_wrapped(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", 7)
    pretty = read(tmp_path, json.dumps(SHAREGPT, indent=2))
    lines = read(tmp_path, jsonl(SHAREGPT))
    assert pretty.keys.tolist() == lines.keys.tolist() == [0, 1, 0]


def test_openai_bodies_may_lack_everything_but_their_messages(tmp_path):
    log = read(tmp_path, jsonl([body("one"), body("two"), body("one")]))
    assert log.keys.tolist() == [0, 1, 0]
    assert log.times_s is None and log.clients is None and log.output_tokens is None
    assert log.tokens_from == "estimate"


@pytest.mark.parametrize("chunk", [7, 2**20])
@pytest.mark.parametrize("written", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_openai_bodies_may_stand_in_a_list(written, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_CHUNK", chunk)
    rows = [OPENAI[0], OPENAI[1] | {"user": "João"}, OPENAI[2]]
    listed = json.dumps(rows, **written).replace("\n", "\r\n").encode()
    lines, found = read(tmp_path, jsonl(rows)), read(tmp_path, b"\xef\xbb\xbf" + listed + b"\r\n")
    assert found.format == "openai"
    for name in ("keys", "times_s", "clients", "input_tokens", "output_tokens"):
        assert getattr(found, name).tolist() == getattr(lines, name).tolist()


def test_bad_items_of_a_list_can_be_left_out_and_are_counted(tmp_path):
    rows = [OPENAI[0], {"model": "m"}, OPENAI[1], None, OPENAI[2]]
    log = read(tmp_path, json.dumps(rows), skip_bad=True)
    assert log.requests == 3 and sum(log.skipped.values()) == 2
    assert [line.rpartition(":")[2] for line in log.lines] == ["1", "3", "5"]


def test_a_list_that_breaks_off_is_refused_even_where_bad_records_are_left_out(tmp_path):
    text = json.dumps(OPENAI)[:-1] + ", {oops}, " + json.dumps(OPENAI[2]) + "]"
    with pytest.raises(InputError, match=r"item 4: not JSON .*nothing behind it can be read"):
        read(tmp_path, text, skip_bad=True)


def test_a_list_is_read_in_a_stream(tmp_path):
    import tracemalloc

    path = write(tmp_path, json.dumps([body(f"{n} " + "y" * 20000) for n in range(600)]))
    logs.read([path], most_references=20_000)
    tracemalloc.start()
    logs.read([path], most_references=20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 1.5


def test_a_broken_line_of_conversations_costs_no_more_than_itself(tmp_path):
    lines = jsonl(SHAREGPT) + "{oops\n" + jsonl(SHAREGPT)
    log = read(tmp_path, lines, skip_bad=True)
    assert log.requests == 6 and sum(log.skipped.values()) == 1


def test_openai_bodies_may_be_wrapped(tmp_path):
    rows = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body("q")}
        for n in range(2)
    ]
    assert read(tmp_path, jsonl(rows)).keys.tolist() == [0, 0]


def test_bodies_of_the_responses_api_are_read_too(tmp_path):
    row = {
        "model": "m",
        "instructions": "be brief",
        "input": "one",
        "usage": {"input_tokens": 9, "output_tokens": 2},
    }
    spelled = row | {"input": [{"role": "user", "content": "one"}]}
    log = read(tmp_path, jsonl([row, spelled, row | {"instructions": "be long"}]))
    assert log.format == "openai"
    assert log.keys.tolist() == [0, 0, 1]
    assert log.input_tokens.tolist() == [9, 9, 9] and log.output_tokens.tolist() == [2, 2, 2]


@pytest.mark.parametrize("field", ["tools", "functions", "instructions", "system"])
def test_what_stands_before_the_first_message_is_part_of_the_prompt(field, tmp_path):
    long = "a description of many words " * 10
    alike = [body(text, **{field: long}) for text in ("one", "two")]
    log = read(tmp_path, jsonl([*alike, body("one", **{field: "another " + long})]))
    first, second, third = (
        log.blocks[start:end].tolist()
        for start, end in zip(log.offsets[:-1], log.offsets[1:], strict=True)
    )
    assert first[:3] == second[:3]
    assert not set(third) & set(first)


def test_calls_of_tools_are_part_of_a_message(tmp_path):
    def called(name: str) -> dict:
        said = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name}}]}
        return {"messages": [{"role": "user", "content": "do it"}, said]}

    assert read(tmp_path, jsonl([called("a"), called("b")])).keys.tolist() == [0, 1]


def test_the_size_of_an_answer_is_read_from_a_response(tmp_path):
    choice = {"choices": [{"message": {"role": "assistant", "content": "twelve bytes"}}]}
    rows = [body("q", response=choice), body("q", response="plain")]
    assert read(tmp_path, jsonl(rows)).answer_bytes.tolist() == [12, 5]


def test_a_streamed_response_counts_as_its_text_and_states_its_lengths(tmp_path):
    def event(text, **more):
        return "data: " + json.dumps(
            {"choices": [{"index": 0, "delta": {"content": text}}], **more}
        )

    last = "data: " + json.dumps(
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}
    )
    stream = "\n\n".join([event("twelve"), event(" bytes"), last, "data: [DONE]", ""])
    log = read(tmp_path, jsonl([body("q", stream=True, response=stream)] * 2))
    assert log.answer_bytes.tolist() == [12, 12]
    assert log.input_tokens.tolist() == [9, 9] and log.output_tokens.tolist() == [3, 3]


@pytest.mark.parametrize("change", [{"model": "n"}, {"temperature": 0.5}, {"seed": 3}])
def test_a_parameter_that_changes_the_answer_makes_another_request(change, tmp_path):
    log = read(tmp_path, jsonl([body("q"), body("q") | change]))
    assert log.keys.tolist() == [0, 1]


def test_who_asks_and_how_the_answer_travels_do_not(tmp_path):
    kept = {"created_at": 3, "request_id": "r1", "latency_ms": 7, "status": 200}
    log = read(
        tmp_path,
        jsonl([body("q", user="a", created_at=1), body("q", user="b", stream=True, **kept)]),
    )
    assert log.keys.tolist() == [0, 0]


def test_texts_that_begin_alike_share_blocks(tmp_path):
    start = "The same beginning of sixty-four bytes, which is one block long. "
    log = read(tmp_path, jsonl([body(start * 2 + "a" * 90), body(start * 2 + "b" * 90)]))
    first, second = (log.blocks[log.offsets[n] : log.offsets[n + 1]].tolist() for n in (0, 1))
    assert first[:2] == second[:2] and first[2:] != second[2:]


def test_a_tokenizer_cuts_texts_by_tokens(tmp_path):
    tokenizer = Path(__file__).parents[2] / "resources" / "embedded-llama" / "tokenizer.json"
    log = read(tmp_path, jsonl([body("word " * 40), body("word " * 40)]), tokenizer=tokenizer)
    assert log.tokens_from == "tokenizer"
    assert log.offsets[1] == log.input_tokens[0] // logs.FINEST_BLOCK


def test_parts_of_one_log_are_read_in_order(tmp_path):
    parts = [write(tmp_path, "a\nb\n", "log.1"), write(tmp_path, "b\n", "log.2")]
    assert logs.read(parts).keys.tolist() == [0, 1, 1]


def test_sizes_of_objects_are_no_tokens(tmp_path):
    log = read(tmp_path, LOGS["libcachesim-csv"])
    assert log.answer_bytes.tolist() == [10, 20, 10]
    assert log.output_tokens is None


def test_a_log_may_come_through_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(LOGS["mooncake"]))
    writer.start()
    log = logs.read([pipe])
    writer.join()
    assert log.requests == len(MOONCAKE)


@pytest.mark.parametrize("page", ["traffic.md", "traffic.pt-BR.md"])
def test_a_format_is_one_file_as_the_documentation_shows(page, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    ((name, code),) = re.findall(r"```python \S*/readers/(\w+)\.py\n(.*?)```", text, re.DOTALL)
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / f"{name}.py").write_text(code)
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(folder)])
    readers.formats.cache_clear()
    try:
        log = read(tmp_path, "0\tann\thow?\n1.5\tbob\twhy?\n2\tann\thow?\n")
        assert (log.format, log.keys.tolist()) == (name, [0, 1, 0])
        with pytest.raises(InputError, match="line 2: 2 columns where 3 are needed"):
            read(tmp_path, "0\tann\thow?\n1\tbob\n")
    finally:
        sys.modules.pop(f"{readers.__name__}.{name}", None)
        vars(readers).pop(name, None)
        readers.formats.cache_clear()
    monkeypatch.undo()
    assert set(readers.formats()) == set(LOGS)


# ------------------------------------------------------------------ packed logs


def zstd(data: bytes) -> bytes:
    import zstandard

    # Two frames, as appending to a log makes them.
    half = len(data) // 2
    return b"".join(
        zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])
    )


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gz", "zst"])
@pytest.mark.parametrize("name", LOGS)
def test_a_packed_log_gives_the_same(pack, name, tmp_path):
    plain = read(tmp_path, LOGS[name])
    packed = logs.read([write(tmp_path, pack(LOGS[name].encode()), "log.packed")])
    assert packed.requests == plain.requests and packed.digest == plain.digest


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gz", "zst"])
def test_a_packed_log_that_was_cut_short_is_refused(pack, tmp_path):
    data = pack("".join(f"key-{n}\n" for n in range(5000)).encode())
    with pytest.raises(InputError, match=r"cannot be unpacked"):
        read(tmp_path, data[: len(data) - 20])


# ------------------------------------------------------------------ what is wrong


def mooncake(**change) -> str:
    return jsonl([MOONCAKE[0], MOONCAKE[1] | change, MOONCAKE[2]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the log is empty"),
        (" \n\n", "the log is empty"),
        ("a\n", "one request only"),
        (LOGS["azure"].splitlines()[0] + "\n", "no request"),
        ("some prose that is no log\nat all\n", "not a log of a known format"),
        (jsonl(MOONCAKE[:1]) + "{broken\n", "line 2: not JSON"),
        (jsonl(MOONCAKE[:1]) + "[1]\n", "line 2: a JSON list where an object is needed"),
        (jsonl(MOONCAKE[:2]) + LOGS["libcachesim-text"], "line 3"),
        (mooncake(timestamp=-1), "line 2: the timestamp goes back by 0.001 s"),
        (mooncake(input_length=-3), "line 2: input_length is -3; a length cannot be negative"),
        (mooncake(input_length=float("nan")), "line 2: NaN is no number"),
        (mooncake(timestamp=float("inf")), "line 2: Infinity is no number"),
        (mooncake(timestamp=None), "line 2: timestamp is 'None'"),
        (mooncake(input_length=2.5), "line 2: input_length is 2.5; it must be a whole number"),
        (mooncake(hash_ids=[0, 1]), "line 2: 2 hash_ids for 512 tokens"),
        (mooncake(hash_ids=["x"]), "line 2: hash_ids must be a list"),
        (BURST.replace("472", "-472"), "line 2: Request tokens is -472"),
        (BURST.replace("472", "nan"), "line 2: Request tokens is nan"),
        (BURST.replace(",18,", ","), "line 2: 7 columns where the header has 8"),
        (AZURE.replace("18:17:04", "17:17:04"), "line 3: the timestamp goes back by 3599.95 s"),
        (AZURE.replace("2023-11-16 18:17:04.0319600", "noon"), "line 3: TIMESTAMP is 'noon'"),
        (
            jsonl([body("q"), {"model": "m", "messages": []}]),
            "line 2: messages is missing or empty",
        ),
        (jsonl([body("q", timestamp=1), body("q")]), "line 2: the timestamp is missing, and"),
        (jsonl([body("q"), body("q", timestamp=1)]), "line 2: a timestamp, and records"),
        ('[{"a": 1}, {"a": 2}]', "a JSON list of neither request bodies (messages) nor"),
        ("[]", "the log is empty"),
        (json.dumps({"data": OPENAI}), "a JSON object with a list under 'data'; give the list"),
        (json.dumps([*OPENAI, {"model": "m"}]), "item 4: messages is missing or empty"),
        (json.dumps([OPENAI[0], 5]), "item 2: a JSON int where an object is needed"),
        (json.dumps(OPENAI)[:-1], "item 3: the list has no end after it"),
        (json.dumps(OPENAI)[:-9], "item 3: not JSON"),
        (json.dumps(OPENAI[:1])[:-1] + ", oops, {}]", "item 2: not JSON"),
        ('{"a": ' * 9_000, "not a log of a known format"),
        ("[" + json.dumps(OPENAI[0]) + ", " + "[" * 200_000, "item 2"),
        (json.dumps(OPENAI[0], indent=1), "a JSON object over several lines"),
        (jsonl([{"prompt": ["a", "b"]}]), "line 1: prompt must be a text"),
        (b"BZh91AY&SY" + bytes(range(100, 200)), "a bzip2 file; unpack it"),
        (jsonl([body("q"), body("q", usage={"prompt_tokens": -1})]), "usage.prompt_tokens is -1"),
        ('[{"conversations": [{"from": "human"}]}]', "conversation 1: conversations"),
        ("a\nb c\n", "line 2: more than one word"),
        (b"a\n\xff\xfe\n", "line 2: not UTF-8 text"),
        ("a\nb\n".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (b"\x00\x01\x02\x03" * 20, "binary data"),
    ],
)
def test_a_mistake_is_one_line_with_place_and_reason(text, words, tmp_path):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value) and str(tmp_path / "log") in str(caught.value)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        logs.read([tmp_path / "absent"])


def test_a_folder_is_no_log(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        logs.read([tmp_path])


def test_logs_of_two_formats_are_refused(tmp_path):
    parts = [write(tmp_path, LOGS["azure"], "one"), write(tmp_path, LOGS["openai"], "two")]
    with pytest.raises(InputError, match="mixed formats"):
        logs.read(parts)


def test_bad_records_can_be_left_out_and_are_counted(tmp_path):
    text = jsonl(MOONCAKE[:2]) + "{broken\n" + mooncake(input_length=-1).splitlines()[1] + "\n"
    log = read(tmp_path, text + jsonl(MOONCAKE[2:]), skip_bad=True)
    assert log.requests == 3 and sum(log.skipped.values()) == 2
    assert log.offsets[-1] == len(log.blocks) == 5, "the columns stay in step"


def test_a_log_of_nothing_but_bad_records_is_refused(tmp_path):
    text = mooncake().splitlines()[0].replace("600", "-1") + "\n"
    with pytest.raises(InputError, match="all 1 records were left out"):
        read(tmp_path, text, skip_bad=True)
    with pytest.raises(InputError, match=r"one request only \(1 malformed left out\)"):
        read(tmp_path, text + jsonl(MOONCAKE[2:]), skip_bad=True)


def test_a_log_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, "a\nb\n")
    finished = logs.readers.Format.records

    def growing(self, stream):
        yield from finished(self, stream)
        with path.open("a") as file:
            file.write("c\n")

    monkeypatch.setattr(logs.readers.Format, "records", growing)
    with pytest.raises(InputError, match="changed while it was read"):
        logs.read([path])


def test_a_byte_order_mark_is_no_part_of_the_log(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbf" + LOGS["azure"].encode()).requests == 2


def test_a_message_never_holds_the_text_of_a_record(tmp_path):
    secret = "the user's secret question"
    text = jsonl([body("q")]) + json.dumps(body(secret))[:-5] + "\n"
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert "secret" not in str(caught.value)


def test_what_is_counted_never_holds_what_a_record_said(tmp_path):
    text = BURST.replace("472", "my secret; it").replace("1087", "'secret'") + "50,c,1,m,1,2,3,l\n"
    log = read(tmp_path, text + "51,c,1,m,1,2,3,l\n", skip_bad=True)
    assert sum(log.skipped.values()) == 2
    assert "secret" not in json.dumps(log.skipped)
    assert list(log.skipped) == ["Request tokens: it must be a whole number"]


@pytest.mark.parametrize("skip_bad", [False, True])
@given(data=some.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_log_holds_it_is_read_or_refused_in_one_line(skip_bad, data, tmp_path):
    name = data.draw(some.sampled_from(sorted(LOGS)))
    raw = bytearray(LOGS[name].encode())
    for _ in range(data.draw(some.integers(1, 4))):
        place = data.draw(some.integers(0, len(raw)))
        cut = data.draw(some.integers(0, 3))
        raw[place : place + cut] = data.draw(
            some.one_of(
                some.binary(max_size=3),
                some.sampled_from([b"-", b"1e400", b"null", b"[]", b"{}", b'"', b",", b"\\ud800"]),
            )
        )
    try:
        log = read(tmp_path, bytes(raw), skip_bad=skip_bad)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert log.requests >= 2
        for column in (log.keys, log.times_s, log.input_tokens, log.output_tokens):
            assert column is None or len(column) == log.requests


# ------------------------------------------------------------------ memory


def test_blocks_are_doubled_rather_than_held_without_a_bound(tmp_path):
    text = jsonl([body("x" * 2000 + str(n)) for n in range(40)])
    fine, coarse = read(tmp_path, text), read(tmp_path, text, most_references=300)
    assert fine.block_tokens == 16 and coarse.block_tokens > 16
    step = coarse.block_tokens // 16
    assert len(coarse.blocks) <= 300 + 64
    counts = np.diff(fine.offsets) // step
    assert np.diff(coarse.offsets).tolist() == counts.tolist()


def test_identities_of_any_size_are_renumbered(tmp_path):
    big = 2**64 - 1
    rows = [dict(row, hash_ids=[big - one for one in row["hash_ids"]]) for row in MOONCAKE]
    blocks = read(tmp_path, jsonl(rows)).blocks
    assert (blocks == blocks[0]).tolist() == [True, False, True, True, False]


@pytest.mark.skipif(os.name != "posix", reason="measures a child's memory by its resource usage")
def test_reading_streams_and_does_not_hold_the_texts(tmp_path):
    import tracemalloc

    path = write(tmp_path, jsonl([body(f"{n} " + "y" * 20000) for n in range(200)]))
    logs.read([path], most_references=20_000)
    tracemalloc.start()
    logs.read([path], most_references=20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2
