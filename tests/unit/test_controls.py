"""The control of an application study: its reference twice in every round, and no row of its own."""

from __future__ import annotations

import pytest
import study_runs
from kvbench.studies import control_of, get

SMALL = {"rounds": 3, "requests": 50, "uncached_requests": 5, "keys": 10}

#: Study, its changed options, a cell, the arms that are compared with, and the column of the arms.
STUDIES = [
    pytest.param(
        "memoization", {"n": [10], "repeats": 3}, "n10", ("plain", "lru_cache", "lru_128")
    ),
    pytest.param(
        "http",
        {"clients": ["none", "dict"], "requests": [2], "repeats": 3},
        "max_age",
        ("none",),
    ),
    pytest.param("layered", {"workers": [1], **SMALL}, "service1ms-workers1", ("source", "l2")),
    pytest.param(
        "response_cache",
        {"backends": ["none", "memory"], "exponents": [0.9], **SMALL},
        "latency",
        ("none",),
    ),
    pytest.param(
        "write_policy",
        {
            "policies": ["write_through", "write_around"],
            "write_shares": [0.5],
            "external_shares": [0],
            "rounds": 3,
            "operations": 60,
            "crashes": 0,
        },
        "writes-0.5",
        ("write_through",),
    ),
    pytest.param(
        "expiry",
        {"invalidations": ["event", "version"], "invalidation_keys": [100], "updates": 3},
        "invalidation-100",
        ("event",),
    ),
]


def arms_of(record):
    """The arms of a record that has one group of them."""
    arms = record["samples"].get("arms", record["samples"])
    return arms if any("round" in arm for arm in arms.values()) else next(iter(arms.values()))


@pytest.mark.parametrize(("study", "changed", "cell", "references"), STUDIES)
def test_what_others_are_compared_with_takes_two_turns_a_round_and_has_one_row(
    study, changed, cell, references, tmp_path
):
    found = study_runs.records(study, tmp_path, only=lambda name, _: name == cell, **changed)[cell]
    arms = arms_of(found)
    assert {name for name in arms if name.startswith("control")} == set(map(control_of, references))
    for name in references:
        assert arms[control_of(name)]["round"] == arms[name]["round"] == [0, 1, 2]
    assert not any("control" in str(held) for row in found["rows"] for held in row.values())


@pytest.mark.parametrize(("study", "changed", "cell", "references"), STUDIES)
def test_the_control_stands_in_every_row_that_is_compared(
    study, changed, cell, references, tmp_path
):
    found = study_runs.records(study, tmp_path, only=lambda name, _: name == cell, **changed)[cell]
    rows = [row for row in get(study).aggregate(found) if any("_not_judged" in key for key in row)]
    assert rows
    for row in rows:
        ratios = [key.removesuffix("_rounds") for key in row if key.endswith("_rounds")]
        assert all(row[f"{name}_control_ratio"] > 0 for name in ratios)
