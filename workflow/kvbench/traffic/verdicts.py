"""From the shares of a replay to a verdict on each cache: it pays, a little, not, or nobody knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: From this share of requests (exact, semantic) or input tokens (prefix) on, a cache is advised.
PAYS = 0.05
#: Below this share it is advised against: operating it costs more than it can save.
LITTLE = 0.01
#: A log of fewer requests is told to be too short to speak for others.
FEW = 200
#: Another policy than LRU is named when it is better by this much.
BETTER_POLICY = 0.01
#: A false-hit share whose interval reaches above this speaks against the semantic cache.
FALSE_HITS = 0.05


@dataclass(frozen=True)
class Verdict:
    """What is advised of one cache.

    Attributes
    ----------
    word:
        ``use``, ``little``, ``no``, ``judge`` (a person has to look first) or ``unknown``.
    share:
        The share that decides, or None.
    why:
        Code of the reason where there is no share, as in the replay's ``missing``.
    """

    word: str
    share: float | None = None
    why: str = ""


def decide(record: Mapping[str, Any]) -> dict[str, Verdict]:
    """Verdicts on ``exact``, ``prefix``, ``semantic`` and, of them all, ``overall``."""
    summary, missing = record["summary"], record["missing"]
    found = {
        "exact": _by_share(summary["exact_hit_ratio"], missing.get("exact", "")),
        "prefix": _by_share(
            summary["prefix_token_share"],
            missing.get("prefix", "") or missing.get("prefix_memory", ""),
        ),
        "semantic": _semantic(summary, missing.get("semantic", "")),
    }
    words = {verdict.word for verdict in found.values()}
    overall = next((w for w in ("use", "judge", "little") if w in words), "")
    if not overall:
        told = {found["exact"].word, found["prefix"].word} != {"unknown"}
        overall = "no" if told else "unknown"
    found["overall"] = Verdict(overall)
    return found


def _by_share(share: float | None, why: str) -> Verdict:
    if share is None:
        return Verdict("unknown", None, why)
    word = "use" if share >= PAYS else "little" if share >= LITTLE else "no"
    return Verdict(word, share, why)


def _semantic(summary: Mapping[str, Any], why: str) -> Verdict:
    share = summary["semantic_share"]
    if share is None:
        return Verdict("unknown", None, why)
    if share < LITTLE:
        return Verdict("no", share)
    if summary["semantic_false_high"] is None:
        return Verdict("judge", share)
    if summary["semantic_false_high"] <= FALSE_HITS:
        return Verdict("use", share)
    return Verdict("no", share, "false_hits")


def decays(record: Mapping[str, Any], column: str) -> tuple[float, float] | None:
    """Mean of the second quarter and of the last one, if the cache is worse at the end.

    The first quarter fills the cache and is left out. Worse is by a fifth and by a hundredth.
    """
    values = [row[column] for row in record["tables"]["time"] if row[column] is not None]
    quarter = len(values) // 4
    if not quarter:
        return None
    early = sum(values[quarter : 2 * quarter]) / quarter
    late = sum(values[-quarter:]) / quarter
    return (early, late) if late < 0.8 * early and early - late > 0.01 else None


def ttl_enough(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The shortest life that was tried and keeps nine tenths of the hits of no limit at all."""
    whole = record["summary"]["repeat_share"]
    rows = record["tables"]["ttl"]
    return next((row for row in rows if whole and row["hit_ratio"] >= 0.9 * whole), None)


def more_memory(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The least cache of prefixes that would pay (LRU), and the largest that was tried.

    None where the cache pays as it is, where none would, or where the log does not tell.
    """
    share = record["summary"]["prefix_token_share"]
    rows = [
        row
        for row in record["tables"]["prefix"]
        if (row["policy"], row["sharing"]) == ("lru", "shared")
    ]
    paying = [row for row in rows if row["token_share"] >= PAYS]
    if not paying or (share is not None and share >= PAYS):
        return None
    by_size = sorted(paying, key=lambda row: row["capacity_blocks"])
    return by_size[0], by_size[-1]
