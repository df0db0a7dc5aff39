"""libCacheSim CSV: a time, a key and perhaps a size of every request, columns named in a header."""

from __future__ import annotations

from collections.abc import Mapping

from kvbench.traffic.readers.base import Malformed, Request, Table, length, seconds


class LibCacheSimCsv(Table):
    """Columns ``time``, ``obj_id`` and ``obj_size`` by any of their usual names."""

    name = "libcachesim-csv"
    title = "libCacheSim CSV (header with obj_id, and time or obj_size)"
    rank = 1
    columns = {
        "time": ("time", "timestamp", "clock_time", "ts", "#time", "# time"),
        "key": ("obj_id", "obj-id", "objid", "id", "key", "lbn", "object"),
        "size": ("obj_size", "obj-size", "objsize", "size", "value_size"),
    }
    required = ("key",)

    @classmethod
    def matches(cls, lines):
        """Whether the header names a key and at least one thing more."""
        return "," in lines[0] and super().matches(lines) and len(cls._find_first(lines)) > 1

    @classmethod
    def _find_first(cls, lines):
        return cls._find(lines[0].split(","))

    def request(self, row: Mapping[str, str]) -> Request:
        """The request of one row."""
        if not row["key"]:
            raise Malformed("the key is empty")
        return Request(
            identity=row["key"],
            time_s=seconds(row["time"], "time") if "time" in row else None,
            answer_bytes=length(row["size"], "size") if "size" in row else None,
        )
