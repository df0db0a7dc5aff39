"""Azure LLM inference trace CSV: moments and lengths, without contents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from kvbench.traffic.readers.base import Request, Table, length, seconds


class Azure(Table):
    """``TIMESTAMP, ContextTokens, GeneratedTokens``; the moments are dates."""

    name = "azure"
    title = "Azure LLM trace CSV (TIMESTAMP, ContextTokens, GeneratedTokens)"
    rank = 2
    columns: ClassVar = {
        "time": ("timestamp",),
        "input": ("contexttokens",),
        "output": ("generatedtokens",),
    }
    required = ("time", "input", "output")

    def request(self, row: Mapping[str, str]) -> Request:
        """The request of one row."""
        return Request(
            time_s=seconds(row["time"], "TIMESTAMP"),
            input_tokens=length(row["input"], "ContextTokens"),
            output_tokens=length(row["output"], "GeneratedTokens"),
        )
