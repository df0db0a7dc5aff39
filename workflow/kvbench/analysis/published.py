"""What the source documents printed: their numbers, read from one file, and our quotients of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from kvbench import documents, layout


@cache
def _file() -> Mapping[str, Any]:
    return MappingProxyType(documents.read_yaml(layout.shipped("config") / "published.yaml"))


def turn() -> dict[str, dict[str, float]]:
    """Strategy to what was printed of the symposium's turn: ``e2e_s`` (s), ``output_tokens_per_s``."""
    return {name: dict(numbers) for name, numbers in _file()["symposium_turn"].items()}


def ratio(strategy: str, base: str) -> float:
    """How many times as fast as ``base`` a strategy was in print; the sources printed no ratio."""
    printed = turn()
    return round(printed[base]["e2e_s"] / printed[strategy]["e2e_s"], 2)


def api_call() -> dict[str, float]:
    """``first_s`` and ``repeated_s`` of a call to a model's API, in seconds."""
    return dict(_file()["api_call"])
