"""A key holds everything that can change an answer, without ambiguity."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvbench.caching.keys import FIELDS, Request, canonical_json, digest, request_key

WORKFLOW = Path(__file__).parents[2] / "workflow"

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
MAPPINGS = st.dictionaries(TEXT, JSON, max_size=4)
REQUESTS = st.builds(
    Request,
    model=TEXT,
    prompt=TEXT,
    revision=TEXT,
    system=TEXT,
    history=st.lists(MAPPINGS, max_size=3),
    tools=st.lists(MAPPINGS, max_size=2),
    parameters=MAPPINGS,
    versions=st.dictionaries(TEXT, TEXT, max_size=3),
    namespace=TEXT,
)


def reordered(value):
    """The same value with every mapping's keys in the opposite order of insertion."""
    if isinstance(value, dict):
        return {name: reordered(value[name]) for name in reversed(list(value))}
    if isinstance(value, list):
        return [reordered(item) for item in value]
    return value


def same(left, right):
    """Equality as the key sees it: of type as well as of value, signed zeros apart."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and repr(left) == repr(right)


@given(JSON)
def test_the_order_of_keys_does_not_matter_at_any_depth(value):
    assert digest(reordered(value)) == digest(value)


@given(JSON, JSON)
def test_two_values_share_a_digest_only_if_they_are_the_same(left, right):
    assert (digest(left) == digest(right)) == same(left, right)


@given(JSON)
def test_canonical_json_reads_back_as_the_value(value):
    assert same(json.loads(canonical_json(value)), value)


@given(REQUESTS, REQUESTS)
def test_any_changed_field_changes_the_key(request, other):
    for name in FIELDS:
        changed = replace(request, **{name: getattr(other, name)})
        equal = same(getattr(request, name), getattr(other, name))
        assert (request_key(changed) == request_key(request)) == equal


@given(REQUESTS)
def test_the_order_of_parameters_does_not_matter(request):
    changed = replace(
        request,
        parameters=reordered(request.parameters),
        versions=reordered(request.versions),
        tools=reordered(request.tools),
        history=reordered(request.history),
    )
    assert request_key(changed) == request_key(request)


def test_text_moved_from_one_field_to_the_next_changes_the_key():
    assert request_key(Request("m", "c", system="ab")) != request_key(
        Request("m", "bc", system="a")
    )


def test_one_in_four_spellings_is_four_values():
    spellings = [1, 1.0, True, "1"]
    assert len({digest({"n": value}) for value in spellings}) == 4


def test_composed_and_decomposed_unicode_are_two_texts():
    assert digest("\u00e9") != digest("e\u0301")


def test_a_missing_value_is_not_an_empty_one():
    assert len({digest(value) for value in (None, "", 0, False, [], {})}) == 6


def test_tuples_and_lists_are_the_same_array():
    assert digest({"stop": ("a", "b")}) == digest({"stop": ["a", "b"]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "\ud800"])
def test_values_without_json_are_refused(value):
    with pytest.raises(ValueError):
        digest({"a": [value]})


@pytest.mark.parametrize("value", [{1: "a"}, {None: 1}, {"a": {2: 3}}, b"a", {1, 2}, object()])
def test_types_that_json_would_blur_are_refused(value):
    with pytest.raises(TypeError):
        digest(value)


def test_a_circular_value_is_refused():
    circle: list = []
    circle.append(circle)
    with pytest.raises(ValueError, match="circular"):
        digest(circle)


def test_unknown_key_fields_are_refused():
    with pytest.raises(ValueError, match="promt"):
        request_key(Request("m", "p"), {"promt"})


def test_the_key_is_the_same_in_another_process():
    request = Request("m", "père", parameters={"temperature": 0, "stop": ["a"]})
    program = (
        "from kvbench.caching.keys import Request, request_key\n"
        "print(request_key(Request('m', 'p\\u00e8re', parameters="
        "{'stop': ['a'], 'temperature': 0})))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(WORKFLOW), "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == request_key(request)


@pytest.mark.parametrize(
    ("parameters", "sampled"),
    [({}, True), ({"temperature": None}, True), ({"temperature": 0}, False),
     ({"temperature": 0.0}, False), ({"temperature": 0.2}, True)],
)  # fmt: skip
def test_a_request_is_sampled_unless_its_temperature_is_zero(parameters, sampled):
    assert Request("m", "p", parameters=parameters).sampled is sampled


@pytest.mark.parametrize("mark", ["\u0301", "\u0316\u0301", "\u0f73"])
@pytest.mark.parametrize("before", [0, 1, 16_375, 16_383, 16_384])
def test_marks_heaped_up_without_end_have_no_normal_form(mark, before):
    """Their number squared is the time that it would take, in which nothing else runs."""
    canonical_json("x" * before + (mark * 30)[:30], normalise=True)
    with pytest.raises(ValueError, match="combining marks"):
        canonical_json("x" * before + (mark * 31)[:31], normalise=True)
