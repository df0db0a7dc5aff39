"""What the source documents printed: one file, and quotients that follow from it."""

from __future__ import annotations

import pytest
from kvbench.analysis import published


def test_the_turn_stands_as_it_was_printed():
    assert {name: one["e2e_s"] for name, one in published.turn().items()} == {
        "none": 314.42,
        "dynamic": 58.71,
        "static": 56.52,
    }


@pytest.mark.parametrize(
    ("strategy", "base", "ratio"),
    [("dynamic", "none", 5.36), ("static", "none", 5.56), ("static", "dynamic", 1.04)],
)
def test_ratios_are_quotients_of_the_printed_times(strategy, base, ratio):
    assert published.ratio(strategy, base) == ratio


def test_nothing_that_is_handed_out_can_change_what_was_printed():
    published.turn()["none"]["e2e_s"] = 1.0
    assert published.turn()["none"]["e2e_s"] == 314.42
