"""libCacheSim CSV: a time, a key and perhaps a size of every request, columns named in a header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from kvbench.traffic.readers.base import Malformed, Request, Table, cells, length, seconds


class LibCacheSimCsv(Table):
    """Columns ``time``, ``obj_id`` and ``obj_size`` by any of their usual names."""

    name = "libcachesim-csv"
    title = "libCacheSim CSV (header with obj_id, and time or obj_size)"
    rank = 1
    columns: ClassVar = {
        "time": ("time", "timestamp", "clock_time", "ts", "#time", "# time"),
        "key": ("obj_id", "obj-id", "objid", "id", "key", "lbn", "object"),
        "size": ("obj_size", "obj-size", "objsize", "size", "value_size"),
    }
    required = ("key",)

    @classmethod
    def matches(cls, lines: Sequence[str]) -> bool:
        """Whether the header names a key and at least one thing more."""
        return super().matches(lines) and len(cls._find(cells(lines[0]))) > 1

    def request(self, row: Mapping[str, str]) -> Request:
        """The request of one row."""
        if not row["key"]:
            raise Malformed("the key is empty")
        return Request(
            identity=row["key"],
            time_s=seconds(row["time"], "time") if "time" in row else None,
            answer_bytes=length(row["size"], "size") if "size" in row else None,
        )
