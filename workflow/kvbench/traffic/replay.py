"""One log replayed for one model and one memory: every cache, what it is worth, what is unknown."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kvbench import physics
from kvbench.analysis import capacity
from kvbench.errors import Unsupported
from kvbench.physics import Architecture, Ceilings
from kvbench.traffic import exact, fleet, prefix, semantic, together, worth
from kvbench.traffic.columns import SUMMARY, TABLES
from kvbench.traffic.log import Log
from kvbench.traffic.worth import Price

_LOG = logging.getLogger(__name__)
#: Policies that give up what came last: they keep the beginning of the log whatever comes, which a
#: short log rewards and a service does not. They are replayed, and never advised.
_NEVER_LEARN = ("lifo", "mru")


@dataclass(frozen=True)
class Setting:
    """What a log is replayed for.

    Attributes
    ----------
    name:
        Name of the log.
    model:
        Name of the model.
    memory_bytes, dtype:
        Memory of one machine; precision of weights and cache.
    conversations:
        Open conversations of the fleet that is planned.
    keep_text:
        Whether texts of the log may stand in what is written.
    """

    name: str
    model: str
    architecture: Architecture
    memory_bytes: int
    dtype: str = "bfloat16"
    ceilings: Ceilings | None = None
    price: Price | None = None
    conversations: int = 1_000_000
    keep_text: bool = False


def run(
    log: Log,
    setting: Setting,
    encoder: semantic.Encoder | None,
    judged: semantic.Judged | None = None,
) -> dict[str, Any]:
    """Replay a log.

    Parameters
    ----------
    encoder:
        Sentence encoder of the semantic part, or None to leave it out.
    judged:
        What a person marked on the sheet of an earlier replay.

    Returns
    -------
    ``log`` and ``setting`` (plain facts), ``summary`` and ``tables`` (rows by name), both with the
    columns of :mod:`kvbench.traffic.columns`, and ``missing`` (part to the reason why it is empty:
    ``no_contents``, ``no_prompts``, ``no_blocks``, ``no_repeats``, ``no_times``, ``no_clients``,
    ``no_texts``, ``no_encoder``, ``no_room``, ``no_lengths``).
    """
    replay = _Replay(log, setting)
    replay.lengths()
    replay.exact()
    replay.prefix()
    replay.semantic(encoder, judged)
    replay.time()
    replay.together()
    replay.fleet()
    return replay.record()


class _Replay:
    """The parts of a replay, in order; each fills in its tables and its columns of the summary."""

    def __init__(self, log: Log, setting: Setting) -> None:
        self.log, self.setting = log, setting
        self.tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        self.summary: dict[str, Any] = dict.fromkeys(SUMMARY)
        self.missing: dict[str, str] = {}
        self.size = physics.bytes_per_element(setting.dtype)
        self.free = setting.memory_bytes - physics.weight_bytes(setting.architecture, self.size)
        self.asked = prefix.blocks(log)
        self.fit = 0
        self.reuse: prefix.Reuse | None = None
        self.hits: np.ndarray | None = None
        self.served: np.ndarray | None = None

    def lengths(self) -> None:
        log, note = self.log, self.summary
        note |= {
            "format": log.format,
            "requests": log.requests,
            "skipped": sum(log.skipped.values()),
            "span_s": log.span_s,
            "clients": None if log.clients is None else int(log.clients.max()) + 1,
            "input_tokens": log.prompt_tokens,
            "output_tokens": None if log.output_tokens is None else int(log.output_tokens.sum()),
            "tokens_from": log.tokens_from if log.input_tokens is not None else None,
            "sampled_share": None if log.sampled is None else log.sampled / log.requests,
            "ceilings": self.setting.ceilings.machine if self.setting.ceilings else None,
        }
        rate = self.setting.ceilings and self.setting.ceilings.prefill_flops_per_s
        if log.input_tokens is None:
            self.missing["lengths"] = "no_lengths"
        elif rate:
            work = worth.prefill_flops(self.setting.architecture, log.input_tokens)
            note["prefill_s"] = work / rate

    def exact(self) -> None:
        log, note = self.log, self.summary
        if log.keys is None:
            self.missing |= dict.fromkeys(("repeats", "exact", "ttl"), "no_contents")
            return
        counts = np.bincount(log.keys)
        gaps, times = exact.spacing(log)
        note["distinct"], note["repeat_share"] = len(counts), len(gaps) / log.requests
        self._repeats(counts, gaps, times)
        fitted = exact.popularity(counts)
        if fitted is not None:
            note["zipf_exponent"] = fitted.exponent
            note["zipf_low"], note["zipf_high"] = fitted.low, fitted.high
            note["top_tenth_share"] = fitted.top_share
        if not len(gaps):
            self.missing |= dict.fromkeys(("exact", "ttl"), "no_repeats")
            note["exact_hit_ratio"] = 0.0
            return
        each = exact.entry_bytes(log)
        rows = exact.by_capacity(log.keys)
        for row in rows:
            row["bytes"] = None if each is None else row["capacity"] * each
        self.tables["exact"] = rows
        lru = [row for row in rows if row["policy"] == "lru"]
        enough = next(r for r in lru if r["hit_ratio"] >= 0.95 * note["repeat_share"])
        note["exact_hit_ratio"] = enough["hit_ratio"]
        note["exact_capacity"], note["exact_bytes"] = enough["capacity"], enough["bytes"]
        tenth = min(lru, key=lambda row: abs(row["capacity"] - len(counts) / 10))
        there = {r["policy"]: r["hit_ratio"] for r in rows if r["capacity"] == tenth["capacity"]}
        note["exact_opt_hit_ratio"] = there.pop("opt")
        # Among equals the simplest: LRU first.
        there = {name: ratio for name, ratio in there.items() if name not in _NEVER_LEARN}
        best = max(there, key=lambda name: (there[name], name == "lru"))
        note["exact_best_policy"] = best
        note["exact_best_gain"] = there[best] - tenth["hit_ratio"]
        self.hits = exact.outcomes(log.keys, "lru", int(enough["capacity"]))
        self._exact_worth()
        if log.times_s is None:
            self.missing["ttl"] = "no_times"
        else:
            spans = [ttl for ttl in exact.TTLS_S if ttl < 2 * (log.span_s or 0)] or [60.0]
            ratios = exact.by_ttl(log.keys, log.times_s, spans)
            self.tables["ttl"] = [
                {"ttl_s": ttl, "hit_ratio": ratio} for ttl, ratio in zip(spans, ratios, strict=True)
            ]

    def _repeats(self, counts: np.ndarray, gaps: np.ndarray, times: np.ndarray | None) -> None:
        note, rows = self.summary, self.tables["repeats"]
        if len(gaps):
            note["median_gap_requests"] = float(np.median(gaps))
            note["median_gap_s"] = None if times is None else float(np.median(times))
            for share in np.linspace(0, 1, 21).round(2):
                rows.append(
                    {
                        "quantile": float(share),
                        "gap_requests": float(np.quantile(gaps, share)),
                        "gap_s": None if times is None else float(np.quantile(times, share)),
                    }
                )
        ranked = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
        for share in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
            place = max(1, round(share * len(counts)))
            rows.append(
                {"rank_share": place / len(counts), "request_share": float(ranked[place - 1])}
            )

    def _exact_worth(self) -> None:
        log, note, setting = self.log, self.summary, self.setting
        if log.input_tokens is None or self.hits is None:
            return
        gain = worth.answers_saved(
            setting.architecture,
            self.size,
            log.input_tokens[self.hits],
            None if log.output_tokens is None else log.output_tokens[self.hits],
            setting.ceilings,
            setting.price,
        )
        note["exact_tokens_saved"] = gain["input_tokens_saved"]
        note["exact_output_tokens_saved"] = gain["output_tokens_saved"]
        note["exact_prefill_s_saved"] = gain["prefill_s_saved"]
        note["exact_decode_s_saved"] = gain["decode_s_saved"]
        note["exact_usd_saved"] = gain["usd_saved"]

    def prefix(self) -> None:
        log, note, setting = self.log, self.summary, self.setting
        if self.asked is None:
            self.missing["prefix"] = self._no_blocks()
            return
        arch = setting.architecture
        block = physics.kv_bytes(arch, self.asked.tokens, self.size)
        self.fit = max(0, int(self.free // block))
        note["block_tokens"], note["block_bytes"] = self.asked.tokens, block
        note["blocks_fit"] = self.fit
        most = prefix.distinct(self.asked)
        whole = prefix.unlimited(self.asked)
        note["prefix_unlimited_share"] = whole.token_share
        grid = prefix.capacities(self.asked)
        if 0 < self.fit < most:
            grid = sorted({*grid, min(self.fit, prefix.MOST_BLOCKS)})
        near = max((size for size in grid if size <= self.fit), default=grid[0])
        shares: dict[tuple[str, int], float] = {}
        fitting = whole
        for policy in prefix.POLICIES:
            for size in grid:
                _LOG.info("prefix cache: %s, %d blocks", policy, size)
                reuse = prefix.replay(self.asked, policy, size)
                self._prefix_row(policy, "shared", self.asked.tokens, size, reuse)
                shares[policy, size] = reuse.token_share
                # What each request reused is kept once: a million of them take 8 MB a replay.
                if (policy, size) == ("lru", near) and self.fit < most:
                    fitting = reuse
        self._prefix_row("unlimited", "shared", self.asked.tokens, most, whole)
        self._sharing(whole)
        for tokens in prefix.sizes(log):
            if tokens != self.asked.tokens:
                coarse = prefix.blocks(log, tokens)
                assert coarse is not None
                self._prefix_row(
                    "unlimited", "shared", tokens, prefix.distinct(coarse), prefix.unlimited(coarse)
                )
        if self.fit == 0:
            self.missing["prefix_memory"] = "no_room"
            return
        self.reuse = fitting
        note["prefix_token_share"] = self.reuse.token_share
        there = {policy: shares[policy, near] for policy in prefix.POLICIES}
        best = max(there, key=lambda name: (there[name], name == "lru"))
        note["prefix_best_policy"], note["prefix_best_gain"] = best, there[best] - there["lru"]
        wanted = 0.95 * self.reuse.token_share
        enough = next((n for n in grid if shares["lru", n] >= wanted), grid[-1])
        note["prefix_capacity"] = enough
        note["prefix_capacity_gib"] = enough * block / 2**30
        gain = worth.saved(
            arch, self.asked.input_tokens, self.reuse.tokens, setting.ceilings, setting.price
        )
        note["prefix_tokens_saved"] = gain["tokens_saved"]
        note["prefix_flops_share"] = gain["flops_share"]
        note["prefix_prefill_s_saved"] = gain["prefill_s_saved"]
        note["prefix_usd_saved"] = gain["usd_saved"]

    def _no_blocks(self) -> str:
        """Why there are no blocks: nothing of the prompts is known, or none is as long as one."""
        if self.log.keys is None:
            return "no_contents"
        return "no_prompts" if self.log.cut_tokens is None else "no_blocks"

    def _sharing(self, whole: prefix.Reuse) -> None:
        """Blocks per client: how much of the reuse is a client's own."""
        assert self.asked is not None
        if self.log.clients is None:
            self.missing["prefix_clients"] = "no_clients"
            return
        own = prefix.per_client(self.asked, self.log.clients)
        alone = prefix.unlimited(own)
        self.summary["prefix_client_share"] = alone.token_share
        self._prefix_row("unlimited", "per_client", own.tokens, prefix.distinct(own), alone)
        if self.fit > 0:
            size = min(self.fit, prefix.MOST_BLOCKS, prefix.distinct(own))
            self._prefix_row("lru", "per_client", own.tokens, size, prefix.replay(own, "lru", size))

    def _prefix_row(
        self, policy: str, sharing: str, tokens: int, capacity_: int, reuse: prefix.Reuse
    ) -> None:
        size = capacity_ * physics.kv_bytes(self.setting.architecture, tokens, self.size)
        self.tables["prefix"].append(
            {
                "policy": policy,
                "sharing": sharing,
                "block_tokens": tokens,
                "capacity_blocks": capacity_,
                "capacity_gib": size / 2**30,
                "fits": size <= self.free,
                "block_share": reuse.block_share,
                "token_share": reuse.token_share,
            }
        )

    def semantic(self, encoder: semantic.Encoder | None, judged: semantic.Judged | None) -> None:
        log, note = self.log, self.summary
        if not log.questions:
            self.missing["semantic"] = "no_texts"
            return
        if encoder is None:
            self.missing["semantic"] = "no_encoder"
            return
        cosines = semantic.similarities(log, encoder)
        chosen = None
        for threshold in semantic.THRESHOLDS:
            swept = semantic.sweep(log, cosines, threshold)
            if threshold == semantic.SHEET_THRESHOLD:
                chosen = swept
            count = swept.requests
            self.tables["semantic"].append(
                {
                    "threshold": threshold,
                    "requests": count,
                    "exact_share": swept.exact / count,
                    "candidate_share": swept.candidates / count,
                    "unguarded_share": swept.candidates_unguarded / count,
                    **{f"refused_{name}": number for name, number in swept.refused.items()},
                }
            )
        assert chosen is not None
        self.served = chosen.served
        note["semantic_requests"] = chosen.requests
        note["semantic_share"] = chosen.beyond / chosen.requests
        pairs = semantic.riskiest(log, chosen)
        self.tables["pairs"] = semantic.sheet(log, pairs, self.setting.keep_text)
        if judged is not None:
            note["semantic_false_share"] = judged.share
            note["semantic_false_low"], note["semantic_false_high"] = judged.low, judged.high

    def time(self) -> None:
        log = self.log
        edges = exact.windows(log.requests)
        for number, (start, end) in enumerate(pairwise(edges)):
            row: dict[str, Any] = {"window": number + 1, "requests": int(end - start)}
            row["until_s"] = None if log.times_s is None else float(log.times_s[end - 1])
            if self.hits is not None:
                row["exact_hit_ratio"] = float(self.hits[start:end].mean())
            if self.reuse is not None and self.asked is not None:
                asked = int(self.asked.input_tokens[start:end].sum())
                if asked:
                    row["prefix_token_share"] = int(self.reuse.tokens[start:end].sum()) / asked
            self.tables["time"].append(row)

    def together(self) -> None:
        if self.log.keys is None:
            self.missing["together"] = "no_contents"
            return
        entries = int(self.summary["exact_capacity"] or self.summary["distinct"])
        fit = min(self.fit, prefix.MOST_BLOCKS)
        rows = together.replay(self.log, entries, self.asked, fit, self.served)
        self.tables["together"] = rows
        self.summary["left_share"] = (
            rows[-1]["token_share"] if self.log.input_tokens is not None else None
        )

    def fleet(self) -> None:
        log, setting = self.log, self.setting
        if log.input_tokens is None:
            self.missing |= dict.fromkeys(("fleet", "plan"), "no_lengths")
            return
        asked = self.asked
        if asked is None or self.fit == 0:
            self.missing["fleet"] = self._no_blocks() if asked is None else "no_room"
        else:
            self.tables["fleet"] = fleet.sweep(asked, min(self.fit, prefix.MOST_BLOCKS))
        work = worth.prefill_flops(setting.architecture, log.input_tokens) / log.requests
        lighter = None
        if self.reuse is not None:
            lighter = worth.prefill_flops(setting.architecture, log.input_tokens, self.reuse.tokens)
        answers = 0.0 if log.output_tokens is None else float(log.output_tokens.mean())
        if not log.input_tokens.any():
            self.missing["plan"] = "no_lengths"
            return
        self.tables["plan"] = capacity.fleet(
            setting.architecture,
            setting.memory_bytes,
            float(log.input_tokens.mean()),
            answers,
            reused_share=None if self.reuse is None else self.reuse.token_share,
            held_share=None if asked is None else lambda count: prefix.distinct_share(asked, count),
            prefill_flops=work,
            prefill_flops_reusing=None if lighter is None else lighter / log.requests,
            most_concurrent=log.requests,
            dtype=setting.dtype,
            conversations=setting.conversations,
            ceilings=setting.ceilings,
        )

    def record(self) -> dict[str, Any]:
        setting, log = self.setting, self.log
        return {
            "log": {
                "name": setting.name,
                "parts": [Path(part).name for part in log.sources],
                "digest": log.digest,
                "format": log.format,
                "skipped": log.skipped,
            },
            "setting": {
                "model": setting.model,
                "memory_bytes": setting.memory_bytes,
                "dtype": setting.dtype,
                "conversations": setting.conversations,
                "price": None
                if setting.price is None
                else [setting.price.input_usd, setting.price.output_usd],
                "weight_bytes": physics.weight_bytes(setting.architecture, self.size),
                "keep_text": setting.keep_text,
            },
            "summary": self.summary,
            "tables": {
                name: [{column: row.get(column) for column in TABLES[name]} for row in rows]
                for name, rows in self.tables.items()
            },
            "missing": self.missing,
        }


def sentence_encoder() -> semantic.Encoder | None:
    """The embedded sentence encoder, or None where it is not installed."""
    try:
        from kvbench.caching.encoder import SentenceEncoder

        return SentenceEncoder()
    except (Unsupported, ImportError) as error:
        _LOG.info("no semantic part: %s", error)
        return None
