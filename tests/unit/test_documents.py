"""Reading, checking and writing files: whole or not at all, and one line when something is wrong."""

from __future__ import annotations

import errno
import os

import pytest
from kvbench import documents
from kvbench.errors import InputError

RULES = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$", "description": "Lower-case letters."},
        "count": {"type": "integer", "minimum": 1, "default": 3, "description": "How often."},
        "mode": {"enum": ["fast", "slow"]},
        "inner": {
            "type": "object",
            "default": {},
            "properties": {"list": {"type": "array", "items": {"type": "number"}, "default": [1]}},
        },
    },
}


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Writing --------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    documents.write_json(path, {"old": 1})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises((OSError, InputError)):
        documents.write_json(path, {"new": 2})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_full_disk_is_reported_with_the_file_that_could_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises((OSError, InputError), match=r"record\.json"):
        documents.write_json(tmp_path / "record.json", {})


def test_writing_makes_missing_folders_and_a_readable_file(tmp_path):
    path = tmp_path / "a" / "b" / "table.csv"
    documents.write_text_atomic(path, "x\n")
    assert path.read_text() == "x\n"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_json_without_a_meaning_is_refused_and_nothing_is_written(tmp_path, number):
    with pytest.raises(InputError, match=r"record\.json: turns\[1\]\.e2e_s is (nan|inf); "):
        documents.write_json(tmp_path / "record.json", {"turns": [{}, {"e2e_s": number}]})
    assert list(tmp_path.iterdir()) == []


def test_equal_documents_give_equal_bytes_whatever_the_order_of_their_keys(tmp_path):
    documents.write_json(tmp_path / "one.json", {"a": 1, "b": [1, 2]})
    documents.write_json(tmp_path / "two.json", {"b": [1, 2], "a": 1})
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


# Reading --------------------------------------------------------------------------------------


def test_malformed_yaml_names_file_and_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("kv:\n  device: cpu\n  seed: [1, 2\n")
    with pytest.raises(InputError) as error:
        documents.read_yaml(path)
    assert str(path) in one_line(error)
    assert "line 4" in one_line(error)


def test_yaml_in_another_encoding_is_one_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes("título: ação\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8") as error:
        documents.read_yaml(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize("read", [documents.read_yaml, documents.read_json])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(InputError, match="no such file") as error:
        read(tmp_path / "absent")
    assert str(tmp_path / "absent") in one_line(error)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b"[1,,2]"])
def test_corrupt_json_names_the_file_and_the_remedy(tmp_path, content):
    path = tmp_path / "r1.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="delete the file and run again") as error:
        documents.read_json(path)
    assert str(path) in one_line(error)


# Checking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"name": "a", "cuont": 1}, ["top level", "'cuont'", "count"]),
        ({"count": 2}, ["missing key 'name'"]),
        ({"name": "a", "count": 0}, ["count is 0", "at least 1", "How often"]),
        ({"name": "a", "count": "3"}, ["count is '3'", "integer"]),
        ({"name": "a", "count": True}, ["count is true", "integer"]),
        ({"name": "a", "mode": "quick"}, ["mode is 'quick'", "fast, slow"]),
        ({"name": "A"}, ["name is 'A'", "Lower-case letters"]),
        ({"name": "a", "inner": {"list": [1, "b"]}}, ["inner.list[1] is 'b'", "number"]),
        ([], ["top level is []", "mapping"]),
    ],
)
def test_a_violation_names_source_key_and_what_would_be_right(document, words):
    with pytest.raises(InputError) as error:
        documents.check(document, RULES, "config/x.yaml")
    text = one_line(error)
    assert text.startswith("config/x.yaml: ")
    for word in words:
        assert word in text


def test_defaults_are_filled_at_every_depth_without_touching_what_was_given():
    given = {"name": "a", "inner": {}}
    filled = documents.fill_defaults(given, RULES)
    assert filled == {"name": "a", "count": 3, "inner": {"list": [1]}}
    assert given == {"name": "a", "inner": {}}


def test_filled_defaults_are_not_shared_between_documents():
    first = documents.fill_defaults({"name": "a"}, RULES)
    first["inner"]["list"].append(2)
    assert documents.fill_defaults({"name": "b"}, RULES)["inner"]["list"] == [1]


# Digests --------------------------------------------------------------------------------------


def test_a_digest_depends_on_the_content_and_not_on_the_order():
    assert documents.digest({"a": 1, "b": 2}) == documents.digest({"b": 2, "a": 1})
    assert documents.digest({"a": 1}) != documents.digest({"a": 2})


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert documents.sha256_of_file(tmp_path / "x") == known


# What people write ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("suites: [kv]\n".encode("utf-16"), "not UTF-8 text; save it as UTF-8"),
        ("title: Condições\n".encode("latin-1"), "not UTF-8 text; save it as UTF-8"),
        (b"a: " + b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
        (b"a: 1\nb: 2\na: 3\n", "not valid YAML at line 3: the key 'a' stands twice"),
        (b"a:\n  - {x: 1, x: 2}\n", "line 2: the key 'x' stands twice"),
        (b"kv:\n  budget_s: .nan\n", "kv.budget_s is nan; it must be a finite number"),
        (b"list: [1, .inf]\n", "list[1] is inf; it must be a finite number"),
        (b"day: 2025-02-30\n", "not valid YAML"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused_in_one_line(tmp_path, content, told):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        documents.read_yaml(path)
    assert one_line(error).startswith(f"{path}: ")
    assert told in one_line(error)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(InputError, match="a folder; name a file"):
        documents.read_yaml(tmp_path)
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        documents.read_yaml(tmp_path / "none.yaml")


def test_merged_keys_may_be_overridden(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nown:\n  <<: *base\n  a: 3\n")
    assert documents.read_yaml(path)["own"] == {"a": 3, "b": 2}


def test_a_count_with_a_decimal_point_is_no_whole_number():
    with pytest.raises(InputError, match=r"x\.yaml: count is 3\.0; it must be of type integer"):
        documents.check({"name": "a", "count": 3.0}, RULES, "x.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 10_000 + "]" * 10_000, "nested too deeply"),
        ('{"turns": [{"e2e_s": NaN}]}', "turns[0].e2e_s is nan"),
        ('{"a": -Infinity}', "a is -inf"),
    ],
)
def test_a_file_of_the_program_that_was_damaged_names_file_and_place(tmp_path, text, told):
    path = tmp_path / "r1.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        documents.read_json(path)
    assert one_line(error).startswith(f"{path}: ")
    assert told in one_line(error)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "results").write_text("a file where a folder should be")
    with pytest.raises(InputError, match=r"table\.csv: cannot be written"):
        documents.write_text_atomic(tmp_path / "results" / "table.csv", "x")


# Fingerprints ---------------------------------------------------------------------------------


def test_a_fingerprint_sees_bytes_names_and_new_files_but_no_times(tmp_path):
    (tmp_path / "a.json").write_text("1")
    first = documents.fingerprint(tmp_path)
    os.utime(tmp_path / "a.json", (0, 0))
    assert documents.fingerprint(tmp_path) == first
    (tmp_path / "a.json").write_text("2")
    second = documents.fingerprint(tmp_path)
    (tmp_path / "b.json").write_text("")
    assert len({first, second, documents.fingerprint(tmp_path)}) == 3


def test_a_fingerprint_of_a_large_file_sees_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_READ_UP_TO", 4)
    path = tmp_path / "weights"
    path.write_text("12345")
    first = documents.fingerprint(path)
    os.utime(path, (0, 0))
    assert documents.fingerprint(path) != first
