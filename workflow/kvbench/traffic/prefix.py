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
from kvbench.traffic.log import Log

POLICIES = ("lru", "lfu", "fifo", "s3_fifo")
#: Largest cache that is simulated (blocks), so that a replay stays within its memory.
MOST_BLOCKS = 2_000_000


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
    place = np.arange(len(log.blocks)) - np.repeat(log.offsets[:-1], lengths)
    kept = place % step == step - 1
    if log.partial_blocks:
        kept[log.offsets[1:][lengths > 0] - 1] = True
    counts = np.zeros(len(lengths) + 1, dtype=np.int64)
    counts[1:] = np.cumsum(kept)[log.offsets[1:] - 1] if len(kept) else 0
    counts[1:][log.offsets[1:] == 0] = 0
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
    if asked.cut_tokens is not asked.input_tokens:
        share = reused / np.maximum(asked.cut_tokens, 1)
        reused = np.floor(share * asked.input_tokens).astype(np.int64)
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
    found = simulators.previous_uses(asked.ids) >= 0
    lengths = np.diff(asked.offsets)
    place = np.arange(len(asked.ids)) - np.repeat(asked.offsets[:-1], lengths)
    runs = lengths.copy()
    missing = np.flatnonzero(~found)
    owner = np.repeat(np.arange(asked.requests), lengths)[missing]
    np.minimum.at(runs, owner, place[missing])
    return _reuse(asked, runs, int(found.sum()))


def per_client(asked: Blocks, clients: np.ndarray) -> Blocks:
    """The same requests, but no client finds another's blocks."""
    owner = np.repeat(clients.astype(np.int64), np.diff(asked.offsets))
    width = int(asked.ids.max()) + 1 if len(asked.ids) else 1
    mixed = owner * width + asked.ids
    return replace(asked, ids=np.unique(mixed, return_inverse=True)[1])


def distinct(asked: Blocks) -> int:
    """Different blocks that are asked for."""
    return len(np.unique(asked.ids))


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
