"""A prefix (KV) cache on a log: the share of input tokens that need no prefill.

Each request looks its blocks up in order. Its leading run, up to the first block that is missing,
is reused; a missing block is put in, a block that is touched becomes the newest. Reused tokens are
the run times the block's tokens, and never more than the request has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from kvbench.errors import InputError
from kvbench.traffic import simulators
from kvbench.traffic.log import Log, renumbered

POLICIES = ("lru", "lfu", "fifo", "s3_fifo")
#: Largest cache that is simulated (blocks), so that a replay stays within its memory.
MOST_BLOCKS = 2_000_000
#: Requests that are looked at together.
_CHUNK = 2**16


@dataclass(frozen=True)
class Blocks:
    """The blocks that a log's requests ask for, at one block size.

    Attributes
    ----------
    ids:
        Block numbers of all requests, one after the other.
    offsets:
        Where a request's blocks begin, shape (requests + 1,).
    input_tokens:
        Length of each request.
    tokens:
        Tokens of a block.
    cut_tokens:
        Length of each request in the unit that its blocks were cut in; see
        :class:`~kvbench.traffic.log.Log`.
    """

    ids: np.ndarray
    offsets: np.ndarray
    input_tokens: np.ndarray
    tokens: int
    cut_tokens: np.ndarray

    @property
    def requests(self) -> int:
        """Requests of the log."""
        return len(self.offsets) - 1

    def head(self, requests: int) -> Blocks:
        """The first requests only."""
        if requests >= self.requests:
            return self
        offsets = self.offsets[: requests + 1]
        return Blocks(
            self.ids[: offsets[-1]],
            offsets,
            self.input_tokens[:requests],
            self.tokens,
            self.cut_tokens[:requests],
        )

    def where(self, kept: np.ndarray) -> Blocks:
        """The requests for which ``kept`` is true."""
        lengths = np.diff(self.offsets)
        offsets = np.concatenate([[0], np.cumsum(lengths[kept])])
        return Blocks(
            self.ids[np.repeat(kept, lengths)],
            offsets,
            self.input_tokens[kept],
            self.tokens,
            self.cut_tokens[kept],
        )


def blocks(log: Log, tokens: int | None = None) -> Blocks | None:
    """The log's blocks at a size of ``tokens``; None where the log does not show contents.

    Raises
    ------
    InputError
        If the size is no multiple of the log's own.
    """
    if log.blocks is None or log.input_tokens is None or log.block_tokens is None:
        return None
    assert log.offsets is not None and log.cut_tokens is not None
    step, rest = divmod(tokens or log.block_tokens, log.block_tokens)
    if rest or step < 1:
        raise InputError(
            f"blocks of {tokens} tokens: this log's are of {log.block_tokens}; ask for a multiple"
        )
    size = step * log.block_tokens
    if step == 1:
        return Blocks(log.blocks, log.offsets, log.input_tokens, size, log.cut_tokens)
    lengths = np.diff(log.offsets)
    starts = np.repeat(log.offsets[:-1].astype(np.uint32), lengths)
    place = np.arange(len(log.blocks), dtype=np.uint32) - starts
    kept = place % step == step - 1
    if log.partial_blocks:
        kept[log.offsets[1:][lengths > 0] - 1] = True
    del place, starts
    counts = np.zeros(len(lengths) + 1, dtype=np.int64)
    total = np.cumsum(kept, dtype=np.uint32)
    # A request without blocks at the beginning of the log ends before the first one.
    ends = log.offsets[1:]
    counts[1:] = np.where(ends > 0, total[ends - 1], 0)
    return Blocks(log.blocks[kept], counts, log.input_tokens, size, log.cut_tokens)


def sizes(log: Log) -> list[int]:
    """Block sizes that this log can be replayed at: 16 to 512 tokens, or multiples of its own."""
    if log.block_tokens is None:
        return []
    found = [s for s in (16, 32, 64, 128, 256, 512) if s % log.block_tokens == 0]
    return found if len(found) > 1 else [log.block_tokens * n for n in (1, 2, 4)]


@dataclass(frozen=True)
class Reuse:
    """What a replay found.

    Attributes
    ----------
    tokens:
        Reused input tokens of each request, shape (requests,).
    block_share:
        Blocks found, in a leading run or not, per block asked for.
    token_share:
        Reused tokens per input token.
    """

    tokens: np.ndarray
    block_share: float
    token_share: float


def _reuse(asked: Blocks, runs: np.ndarray, hits: int) -> Reuse:
    reused = np.minimum(runs * asked.tokens, asked.cut_tokens)
    # Back into the tokens that the log states; whole numbers, so that equal units change nothing.
    reused = reused * asked.input_tokens // np.maximum(asked.cut_tokens, 1)
    total = int(asked.input_tokens.sum())
    return Reuse(
        reused,
        hits / len(asked.ids) if len(asked.ids) else 0.0,
        float(reused.sum() / total) if total else 0.0,
    )


def replay(asked: Blocks, policy: str, capacity: int, *, own: bool = False) -> Reuse:
    """Replay a log against a cache of ``capacity`` blocks that begins empty.

    Parameters
    ----------
    own:
        Take our implementation of the policy even where libCacheSim has one.
    """
    ask = simulators.requester(policy, capacity, own=own)
    runs = np.zeros(asked.requests, dtype=np.int64)
    hits = 0
    edges = asked.offsets.tolist()
    for number in range(asked.requests):
        found = list(map(ask, asked.ids[edges[number] : edges[number + 1]].tolist()))
        count = sum(found)
        hits += count
        # A run ends at the first block that is missing, whatever comes after it.
        runs[number] = count if count == len(found) else found.index(False)
    return _reuse(asked, runs, hits)


def unlimited(asked: Blocks) -> Reuse:
    """Replay a log against a cache that never gives anything up."""
    runs = np.zeros(asked.requests, dtype=np.int64)
    hits = 0
    if len(asked.ids):
        # Where each block is first asked for: what comes later finds it. 32 bits, because a log
        # may ask for tens of millions.
        first = np.empty(int(asked.ids.max()) + 1, dtype=np.uint32)
        first[asked.ids[::-1]] = np.arange(len(asked.ids) - 1, -1, -1, dtype=np.uint32)
    for start in range(0, asked.requests, _CHUNK):
        edges = asked.offsets[start : start + _CHUNK + 1]
        ids, lengths = asked.ids[edges[0] : edges[-1]], np.diff(edges)
        if not len(ids):
            continue
        found = first[ids] < np.arange(edges[0], edges[-1])
        hits += int(found.sum())
        part = lengths.copy()
        missing = np.flatnonzero(~found)
        owner = np.repeat(np.arange(len(lengths)), lengths)[missing]
        np.minimum.at(part, owner, missing - (edges[:-1] - edges[0])[owner])
        runs[start : start + _CHUNK] = part
    return _reuse(asked, runs, hits)


def per_client(asked: Blocks, clients: np.ndarray) -> Blocks:
    """The same requests, but no client finds another's blocks."""
    owner = np.repeat(clients.astype(np.int64), np.diff(asked.offsets))
    width = int(asked.ids.max()) + 1 if len(asked.ids) else 1
    mixed = owner * width + asked.ids
    return replace(asked, ids=renumbered(mixed))


def distinct(asked: Blocks) -> int:
    """Different blocks that are asked for."""
    if not len(asked.ids):
        return 0
    seen = np.zeros(int(asked.ids.max()) + 1, dtype=bool)
    seen[asked.ids] = True
    return int(seen.sum())


def capacities(asked: Blocks, points: int = 10) -> list[int]:
    """Round capacities up to what the log ever asks for, the largest last (blocks)."""
    most = min(distinct(asked), MOST_BLOCKS)
    return simulators.series(max(1, most / 500), most)[-points:]


def distinct_share(asked: Blocks, together: int, windows: int = 16) -> float:
    """Distinct blocks per block asked for among ``together`` requests in a row, mean of windows."""
    together = max(1, min(together, asked.requests))
    last = asked.requests - together
    starts = np.unique(np.linspace(0, last, min(windows, last + 1)).astype(int))
    shares = []
    for start in starts:
        part = asked.ids[asked.offsets[start] : asked.offsets[start + together]]
        if len(part):
            shares.append(len(np.unique(part)) / len(part))
    return float(np.mean(shares)) if shares else 1.0
