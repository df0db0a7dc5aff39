"""Columns of the tables of replayed logs, with their meaning and unit; light, for planning."""

from __future__ import annotations

from collections.abc import Mapping

from kvbench.analysis.capacity import FLEET_COLUMNS
from kvbench.caching.guards import GUARDS

#: Tables of a replay: name to columns with their meaning. Each row also names log, model, memory.
TABLES: Mapping[str, Mapping[str, str]] = {
    "repeats": {
        "quantile": "share of the repeats that come at most this long after what they repeat",
        "gap_requests": "requests between a repeat and the request it repeats",
        "gap_s": "seconds between them",
        "rank_share": "share of the distinct requests, most popular first",
        "request_share": "share of all requests that ask for them",
    },
    "exact": {
        "policy": "eviction policy; opt is Belady's limit, which knows the future",
        "capacity": "entries of the cache",
        "bytes": "bytes of so many answers with their keys, from the mean answer (bytes)",
        "hit_ratio": "requests answered from the cache, per request",
    },
    "ttl": {
        "ttl_s": "fixed life of an entry in a cache without a bound (s)",
        "hit_ratio": "requests answered from the cache, per request",
    },
    "time": {
        "window": "window of the log, windows have equally many requests",
        "until_s": "end of the window since the first request (s)",
        "requests": "requests of the window",
        "exact_hit_ratio": "requests answered by an exact LRU cache, per request of the window",
        "prefix_token_share": "input tokens reused by an LRU prefix cache of the memory, per token",
    },
    "prefix": {
        "policy": "eviction policy; unlimited gives nothing up",
        "sharing": "shared: one cache for all clients; per_client: nobody finds another's blocks",
        "block_tokens": "tokens of a block",
        "capacity_blocks": "blocks of the cache",
        "capacity_gib": "the same for the chosen model and precision (GiB)",
        "fits": "whether it fits beside the weights",
        "block_share": "blocks found, in a leading run or not, per block asked for",
        "token_share": "input tokens that need no prefill, per input token",
    },
    "semantic": {
        "threshold": "least cosine of a hit",
        "requests": "requests that the semantic part was replayed on",
        "exact_share": "of these, word for word in the cache; what was answered alike is not",
        "candidate_share": "of these, answered alike after the guards: right or wrong is not known",
        "unguarded_share": "of these, with a stored question this close, before the guards",
        **{f"refused_{name}": f"pairs that the guard of {name} refuses" for name in GUARDS},
    },
    "together": {
        "stage": "exact, semantic, prefix, model: the order in which a request meets them",
        "requests_seen": "requests that reach the stage",
        "requests_answered": "requests that end there",
        "request_share": "the same per request of the log",
        "tokens_saved": "input tokens that need no prefill because of the stage",
        "token_share": "the same per input token of the log; of model: tokens left to compute",
    },
    "fleet": {
        "replicas": "machines, each with a prefix cache of the whole free memory (LRU)",
        "routing": "random, or cache_aware: longest leading run, within a limit on load",
        "requests": "requests that were routed",
        "token_share": "input tokens that need no prefill, per input token",
        "imbalance": "computed tokens of the busiest machine over the mean",
    },
    "plan": FLEET_COLUMNS,
    "pairs": {
        "pair": "number, riskiest first",
        "asked_at": "file and record of the question",
        "stored_at": "file and record of the question whose answer it would get",
        "asked": "the question, or what stands for it",
        "stored": "the stored question, or what stands for it",
        "cosine": "closeness of the two",
        "words_changed": "words that only one of them has",
        "refused_by": "guard that refuses the pair",
        "false_hit": "for a person: yes if the two need different answers, else no",
    },
}

#: Columns in front of every table.
IDENTITY: Mapping[str, str] = {
    "log": "name of the log",
    "model": "model file",
    "memory_bytes": "memory of one machine (bytes)",
}

#: Columns of the summary: one row per log, model and memory.
SUMMARY: Mapping[str, str] = {
    "format": "format of the log",
    "requests": "requests that were replayed",
    "skipped": "malformed records that were left out",
    "span_s": "seconds from the first to the last request",
    "clients": "clients that the log tells apart",
    "input_tokens": "input tokens of all requests",
    "output_tokens": "output tokens of all requests",
    "tokens_from": "log: as stated; tokenizer: counted; estimate: four bytes a token",
    "sampled_share": "requests with a temperature above 0, or none given, which means 1",
    "distinct": "requests that are asked at least once, each counted once",
    "repeat_share": "requests that repeat an earlier one exactly, per request",
    "median_gap_requests": "median requests between a repeat and what it repeats",
    "median_gap_s": "median seconds between them",
    "zipf_exponent": "popularity p_i ~ i^-a of the distinct requests, maximum likelihood",
    "zipf_low": "lower end of its 95 % profile interval",
    "zipf_high": "upper end of its 95 % profile interval",
    "top_tenth_share": "requests that ask for the most popular tenth",
    "exact_hit_ratio": "hit ratio of an exact LRU cache of exact_capacity entries",
    "exact_capacity": "least capacity that reaches 95 % of the hits of an unbounded one (LRU)",
    "exact_bytes": "bytes of that many answers",
    "exact_best_policy": "best policy at a tenth of the distinct requests; not opt, lifo, mru",
    "exact_best_gain": "its hit ratio less LRU's there",
    "exact_opt_hit_ratio": "Belady's limit there",
    "exact_tokens_saved": "input tokens of the requests answered by that cache",
    "exact_output_tokens_saved": "output tokens that need not be generated",
    "exact_prefill_s_saved": "least time of their prefill (s)",
    "exact_decode_s_saved": "least time of their decoding, one at a time (s)",
    "exact_usd_saved": "at the given price (USD)",
    "block_tokens": "tokens of a block in the shares below",
    "block_bytes": "bytes of a block for the model and precision",
    "blocks_fit": "blocks that fit beside the weights",
    "prefix_token_share": "input tokens that need no prefill, LRU cache of blocks_fit blocks",
    "prefix_unlimited_share": "the same with a cache that gives nothing up",
    "prefix_client_share": "the same without sharing between clients",
    "prefix_best_policy": "best policy at the capacity nearest to blocks_fit",
    "prefix_best_gain": "its share less LRU's there",
    "prefix_capacity": "least capacity that reaches 95 % of the share at blocks_fit (LRU, blocks)",
    "prefix_capacity_gib": "the same in GiB",
    "prefix_tokens_saved": "input tokens that need no prefill",
    "prefix_flops_share": "prefill work saved, per prefill work",
    "prefill_s": "least time of the log's whole prefill on the ceilings (s)",
    "prefix_prefill_s_saved": "of this, saved by the prefix cache (s)",
    "prefix_usd_saved": "at the full price of an input token (USD)",
    "ceilings": "where the rates come from",
    "semantic_requests": "requests that the semantic part was replayed on",
    "semantic_share": "of these, candidate hits that repeat nothing, at the sheet's threshold (0.80)",
    "semantic_false_share": "share of false hits among the pairs a person marked",
    "semantic_false_low": "lower end of its 95 % interval",
    "semantic_false_high": "upper end of its 95 % interval",
    "left_share": "input tokens left to compute with all caches together",
}


def described() -> dict[str, dict[str, str]]:
    """Every table of the suite by name, with all its columns."""
    return {
        f"traffic_{name}": {**IDENTITY, **columns}
        for name, columns in {**TABLES, "summary": SUMMARY}.items()
    }
