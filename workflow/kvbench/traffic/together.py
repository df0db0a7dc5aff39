"""All caches at once, in the order a request meets them: exact, then semantic, then prefix."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvbench.traffic import exact, prefix
from kvbench.traffic.log import Log


def replay(
    log: Log,
    entries: int,
    asked: prefix.Blocks | None,
    capacity: int,
    semantic: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """What each stage answers or saves of what reaches it.

    Parameters
    ----------
    entries:
        Capacity of the exact cache (LRU).
    asked, capacity:
        Blocks of the log, and how many the prefix cache holds (LRU); None without contents.
    semantic:
        Whether a semantic cache answers the request, for as many requests as it was replayed on;
        the rows then describe these requests only.

    Returns
    -------
    Rows of ``stage``, ``requests_seen``, ``requests_answered``, ``request_share`` of all requests,
    ``tokens_saved``, ``token_share`` of all input tokens.
    """
    assert log.keys is not None
    count = log.requests if semantic is None else len(semantic)
    keys = log.keys[:count]
    tokens = log.input_tokens[:count] if log.input_tokens is not None else np.zeros(count, int)
    total = max(1, int(tokens.sum()))
    rows = []
    left = np.ones(count, dtype=bool)

    def note(stage: str, seen: int, answered: int, saved: int) -> None:
        rows.append(
            {
                "stage": stage,
                "requests_seen": seen,
                "requests_answered": answered,
                "request_share": answered / count,
                "tokens_saved": saved,
                "token_share": saved / total,
            }
        )

    hits = exact.outcomes(keys, "lru", entries)
    note("exact", count, int(hits.sum()), int(tokens[hits].sum()))
    left &= ~hits
    if semantic is not None:
        hits = semantic & left
        note("semantic", int(left.sum()), int(hits.sum()), int(tokens[hits].sum()))
        left &= ~hits
    if asked is not None and capacity >= 1:
        reached = asked.head(count).where(left)
        reuse = prefix.replay(reached, "lru", capacity)
        saved = int(reuse.tokens.sum())
        note("prefix", int(left.sum()), 0, saved)
        rest = int(tokens[left].sum()) - saved
    else:
        rest = int(tokens[left].sum())
    note("model", int(left.sum()), int(left.sum()), 0)
    rows[-1]["tokens_saved"] = None
    rows[-1]["token_share"] = rest / total
    return rows
