"""BurstGPT CSV: moments and lengths of requests to a hosted model, without contents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from kvbench.traffic.readers.base import Request, Table, length, seconds


class BurstGPT(Table):
    """``Timestamp, Model, Request tokens, Response tokens``; newer files name the session too."""

    name = "burstgpt"
    title = "BurstGPT CSV (Timestamp, Request tokens, Response tokens)"
    rank = 2
    columns: ClassVar = {
        "time": ("timestamp",),
        "input": ("request tokens",),
        "output": ("response tokens",),
        "session": ("session id",),
    }
    required = ("time", "input", "output")

    def request(self, row: Mapping[str, str]) -> Request:
        """The request of one row; a failed one has no response tokens and stays a request."""
        return Request(
            time_s=seconds(row["time"], "Timestamp"),
            client=row.get("session"),
            input_tokens=length(row["input"], "Request tokens"),
            output_tokens=length(row["output"], "Response tokens"),
        )
