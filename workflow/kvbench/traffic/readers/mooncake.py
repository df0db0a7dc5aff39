"""Mooncake JSONL: lengths, and the identities of 512-token prefix blocks (FAST'25 traces)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from kvbench.traffic.readers.base import Format, Malformed, Request, document, length, seconds


class Mooncake(Format):
    """``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``: one object a line."""

    name = "mooncake"
    title = "Mooncake JSONL (timestamp, input_length, output_length, hash_ids)"
    rank = 3
    block_tokens = 512

    @classmethod
    def matches(cls, lines: Sequence[str]) -> bool:
        """Whether the first line is an object with ``hash_ids``."""
        try:
            first = json.loads(lines[0])
        except (ValueError, RecursionError):
            return False
        return isinstance(first, dict) and {"hash_ids", "input_length"} <= set(first)

    def parse(self, text: str) -> Iterable[Request]:
        """The request of one line."""
        found = document(text)
        for key in ("timestamp", "input_length", "output_length", "hash_ids"):
            if key not in found:
                raise Malformed(f"{key} is missing")
        ids = found["hash_ids"]
        if not isinstance(ids, list) or not all(
            type(one) is int and 0 <= one < 2**64 for one in ids
        ):
            raise Malformed("hash_ids must be a list of whole numbers that are not negative")
        tokens = length(found["input_length"], "input_length")
        needed = -(-tokens // self.block_tokens)
        if len(ids) != needed:
            raise Malformed(
                f"{len(ids)} hash_ids for {tokens} tokens; blocks of {self.block_tokens} tokens"
                f" make {needed}"
            )
        return [
            Request(
                identity=(tokens, *ids),
                time_s=seconds(found["timestamp"], scale=1e-3),
                client=None,
                input_tokens=tokens,
                output_tokens=length(found["output_length"], "output_length"),
                blocks=ids,
            )
        ]
