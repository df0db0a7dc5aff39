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
    with pytest.raises(ValueError, match="JSON"):
        documents.write_json(tmp_path / "record.json", {"e2e_s": number})
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
        ({"name": "a", "count": True}, ["count is True", "integer"]),
        ({"name": "a", "mode": "quick"}, ["mode is 'quick'", "fast, slow"]),
        ({"name": "A"}, ["name is 'A'", "Lower-case letters"]),
        ({"name": "a", "inner": {"list": [1, "b"]}}, ["inner.list[1] is 'b'", "number"]),
        ([], ["top level is []", "object"]),
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
