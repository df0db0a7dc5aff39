"""Unknown names: one wording everywhere, with the nearest name that there is."""

from __future__ import annotations

import pytest
from kvbench.errors import InputError, one_of


def message(*arguments: object, **more: str) -> str:
    with pytest.raises(InputError) as error:
        one_of(*arguments, **more)
    return str(error.value)


def test_a_known_name_passes():
    one_of("strategy", "none", ["dynamic", "none"])


def test_a_slip_is_answered_with_the_nearest_name():
    assert message("strategy", "dynmic", ["none", "dynamic"]) == (
        "unknown strategy 'dynmic' (did you mean 'dynamic'?); known: none, dynamic"
    )


def test_another_word_gets_the_list_only():
    assert message("study", 7, []) == "unknown study 7; known: none"


def test_file_key_and_remedy_stand_around_it():
    text = message("model", "gpt", ["embedded"], "config.yaml: app.model", "or add models/gpt.yaml")
    assert text == (
        "config.yaml: app.model: unknown model 'gpt'; known: embedded; or add models/gpt.yaml"
    )


def test_a_long_list_is_cut():
    assert len(message("claim", "x", [f"claim-{number}" for number in range(1000)])) < 700
