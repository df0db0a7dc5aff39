"""What an exact response cache saves, what its key must contain, and what it does to sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvbench.paper.values import Value
from kvbench.studies import Cell, Study, _paired
from kvbench.studies import _option as option
from kvbench.studies._estimates import p95, p95_columns, summary_columns
from kvbench.studies._values import first, milliseconds, number

if TYPE_CHECKING:
    import pandas as pd

BACKENDS = ("none", "memory", "sqlite", "server_unix", "server_tcp")
POLICIES = ("off", "skip", "seed", "pool", "freeze")

OPTIONS = option.schema(
    backends=option.choices("Where answers are stored; none is the run without a cache.", BACKENDS),
    exponents=option.numbers(
        "Zipf exponents of the popularity of requests; 0 is uniform.",
        [0, 0.9],
        minimum=0,
        maximum=3,
    ),
    value_kib=option.numbers(
        "Sizes of an answer's text, in KiB.", [2], minimum=0.0625, maximum=1024
    ),
    **option.streams(
        "every backend gets the same stream and begins with nothing stored", "one stream"
    ),
    service_ms=option.number(
        "Fixed service time of the source of answers, in ms; not a model.",
        2,
        minimum=0.1,
        maximum=10_000,
    ),
    key_prompts=option.integer(
        "Prompts of the test of key fields, each asked in every variant.", 25, minimum=1
    ),
    key_repeats=option.integer(
        "How often each request of the test of key fields is asked.", 2, minimum=2
    ),
    sampling_prompts=option.integer("Prompts of the test of sampling.", 10, minimum=1),
    sampling_repeats=option.integer(
        "How often each prompt of the test of sampling is asked.", 20, minimum=2
    ),
    temperatures=option.numbers(
        "Temperatures of the test of sampling.", [0, 0.7, 1], minimum=0, maximum=5
    ),
    sampling_policies=option.choices(
        "What is done with sampled answers; off is no cache.", POLICIES
    ),
    pool=option.integer("Draws kept per prompt by the policy pool.", 5, minimum=2),
    usd_per_million_tokens=option.number(
        "Price by which saved tokens become saved money; scales linearly.", 1, above=0
    ),
)


def plan(options: Mapping[str, Any]) -> dict[str, Cell]:
    """Return one timed cell for all backends, and one untimed cell each for key and sampling."""
    shared = (
        "backends",
        "exponents",
        "value_kib",
        "rounds",
        "requests",
        "uncached_requests",
        "keys",
        "service_ms",
        "usd_per_million_tokens",
    )
    cells = {"latency": Cell({"kind": "latency", **{name: options[name] for name in shared}})}
    cells["key"] = Cell(
        {"kind": "key", "prompts": options["key_prompts"], "repeats": options["key_repeats"]},
        timed=False,
    )
    cells["sampling"] = Cell(
        {
            "kind": "sampling",
            "prompts": options["sampling_prompts"],
            "repeats": options["sampling_repeats"],
            "temperatures": options["temperatures"],
            "pool": options["pool"],
            "policies": options["sampling_policies"],
        },
        timed=False,
    )
    return cells


def aggregate(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with their speed-up over no cache, paired within rounds.

    Records made before there were rounds keep the quotient of two means, without an interval.
    """
    arms = record["samples"].get("arms", {})
    rows = []
    for recorded in record["rows"]:
        row = dict(recorded)
        taken = arms.get(f"a{row.get('exponent')}-{row.get('value_kib')}kib", {})
        own = taken.get(row.get("backend"))
        if own:
            for part in ("hit", "miss"):
                row |= p95([t for turn in own[f"{part}_s"] for t in turn], f"{part}_p95_s")
        if own and row["backend"] != "none":
            row |= _paired.compare("speedup", taken, "none", row["backend"])
            row["speedup_limit"] = _paired.limit(taken, "none", row["backend"])
        rows.append(row)
    return rows


def values(table: pd.DataFrame) -> dict[str, Value]:
    """Return latencies per backend, the break-even, and the counts of wrong answers."""
    named: dict[str, Value] = {}
    latency = table[table["kind"] == "latency"]
    cached = latency[latency["backend"] != "none"]
    for backend in BACKENDS[1:]:
        rows = cached[(cached["backend"] == backend) & (cached["hits"] > 0)]
        prefix = f"response_cache_{backend}"
        # The hardest stream for a latency bound is the one whose tail is slowest.
        worst = None if rows.empty else rows.loc[rows["hit_p99_s"].idxmax()]
        typical = None if rows.empty else rows.sort_values(["value_kib", "exponent"]).iloc[-1]
        named[f"{prefix}_hit_p50_ms"] = milliseconds(typical, "hit_p50_s")
        named[f"{prefix}_hit_p99_ms"] = milliseconds(worst, "hit_p99_s")
        named[f"{prefix}_hit_p95_ms"] = milliseconds(typical, "hit_p95_s")
        named[f"{prefix}_miss_overhead_ms"] = number(typical, "miss_overhead_s", "ms", 3, 1000)
        named[f"{prefix}_break_even"] = number(
            None if rows.empty else rows.loc[rows["break_even_hit_ratio"].idxmax()],
            "break_even_hit_ratio",
            "%",
            2,
            100,
        )
        named[f"{prefix}_bytes_per_entry"] = number(typical, "bytes_per_entry", "B", 0)
        named[f"{prefix}_speedup"] = _paired.value(typical, "speedup", "x", 1)
    hits = cached[cached["hits"] > 0]
    slowest = None if hits.empty else hits.loc[hits["hit_p99_s"].idxmax()]
    dearest = None if hits.empty else hits.loc[hits["break_even_hit_ratio"].idxmax()]
    named["response_cache_hit_p99_worst_ms"] = milliseconds(slowest, "hit_p99_s")
    named["response_cache_hit_slowest_backend"] = Value(
        None if slowest is None else slowest["backend"]
    )
    slow = None if hits.empty else hits.loc[hits["hit_p95_s"].idxmax()]
    named["response_cache_hit_p95_worst_ms"] = milliseconds(slow, "hit_p95_s")
    missed = None if cached.empty else cached.loc[cached["miss_p95_s"].idxmax()]
    named["response_cache_miss_p95_worst_ms"] = milliseconds(missed, "miss_p95_s")
    named["response_cache_break_even_worst"] = number(dearest, "break_even_hit_ratio", "%", 2, 100)
    named["response_cache_speedup_at_30"] = Value(
        None if hits.empty else float(min(_speedup_at(row, 0.3) for _, row in hits.iterrows())),
        unit="x",
        digits=2,
    )
    best = None if hits.empty else hits.loc[hits["hit_ratio"].idxmax()]
    named["response_cache_hit_ratio_best"] = number(best, "hit_ratio", "%", 1, 100)
    named["response_cache_exponent_best"] = number(best, "exponent", "", 1)
    named["response_cache_tokens_saved_best"] = number(best, "tokens_saved", "", 0)
    named["response_cache_usd_saved_best"] = number(best, "usd_saved", "USD", 3)
    named["response_cache_requests"] = number(best, "requests", "", 0)
    named["response_cache_service_ms"] = number(best, "service_s", "ms", 2, 1000)
    named["response_cache_speedups_beyond_limit"] = Value(
        None
        if cached.empty
        else _paired.beyond_limit(cached.to_dict("records"), "speedup", "speedup_limit"),
        digits=0,
    )
    named["response_cache_rounds"] = number(best, "speedup_rounds", "", 0)
    named["response_cache_wrong_answers"] = Value(
        None if cached.empty else int(cached["wrong_answers"].sum()), digits=0
    )
    named["response_cache_mean_prediction_error"] = Value(
        None
        if cached.empty
        else float((cached["mean_predicted_s"] / cached["mean_s"] - 1).abs().max() * 100),
        unit="%",
        digits=1,
    )

    keys = table[table["kind"] == "key"]
    for definition in ("every field", "guide md5", "prompt only", "with timestamp", "with user"):
        row = first(keys[keys["key_fields"] == definition])
        name = f"response_cache_key_{definition.replace(' ', '_')}"
        named[f"{name}_wrong"] = number(row, "wrong_answers", "", 0)
        named[f"{name}_hits_lost"] = number(row, "hits_lost", "", 0)
    omitted = keys[keys["key_fields"].astype(str).str.startswith("without ")]
    named["response_cache_key_requests"] = number(first(keys), "requests", "", 0)
    for name, pick in (("min", "min"), ("max", "max")):
        named[f"response_cache_key_one_field_wrong_{name}"] = Value(
            None if omitted.empty else int(getattr(omitted["wrong_answers"], pick)()), digits=0
        )

    sampling = table[table["kind"] == "sampling"]
    warm = sampling[sampling["temperature"] > 0]
    top = warm[warm["temperature"] == warm["temperature"].max()] if len(warm) else warm
    named["response_cache_sampling_temperature"] = number(first(top), "temperature", "", 1)
    for policy in POLICIES:
        row = first(top[top["policy"] == policy])
        named[f"response_cache_sampling_{policy}_distinct"] = number(row, "distinct_answers", "", 1)
        named[f"response_cache_sampling_{policy}_hit_ratio"] = number(row, "hit_ratio", "%", 0, 100)
    greedy = sampling[sampling["temperature"] == 0]
    named["response_cache_greedy_same"] = Value(
        None if greedy.empty else float(greedy["same_as_uncached"].min() * 100), unit="%", digits=0
    )
    return named


def _speedup_at(row: Any, hit_ratio: float) -> float:
    """Mean without a cache over mean with one, at another hit ratio than the measured one."""
    miss_s = row["service_s"] + row["miss_overhead_s"]
    return row["service_s"] / (hit_ratio * row["hit_p50_s"] + (1 - hit_ratio) * miss_s)


STUDY = Study(
    name="response_cache",
    question="What does an exact response cache save, and what must its key contain?",
    options=OPTIONS,
    plan=plan,
    columns={
        "kind": "latency (a stream through a backend), key (fields of the key) or sampling",
        "backend": "where answers are stored; none: no cache",
        "exponent": "Zipf exponent of the requests' popularity",
        "value_kib": "size of an answer's text (KiB)",
        "key_fields": "which fields of a request make its key",
        "policy": "what is done with sampled answers; off: no cache",
        "temperature": "sampling temperature",
        "requests": "requests sent",
        "unique_requests": "different requests among them",
        "hits": "requests answered from the cache",
        "hit_ratio": "hits per request",
        "hit_ratio_limit": "1 - unique/requests: no exact cache that starts empty can do better",
        "wrong_answers": "answers that belong to a different request",
        "hits_lost": "hits that the full key has and this one has not",
        "service_s": "mean measured service time of the source (s)",
        "mean_s": "mean time of a request (s)",
        "mean_predicted_s": "sum of share times median over hits and misses (s)",
        "rounds": "streams sent, each to an empty cache",
        **_paired.meanings("speedup", "time without a cache over the time of a request"),
        "speedup_limit": "requests per miss, 1/(1 - hit ratio): a hit that costs nothing",
        **summary_columns("hit", "time of a hit, key computation and check included"),
        **summary_columns("miss", "time of a miss, service time included"),
        **p95_columns("hit_p95_s", "time of a hit"),
        **p95_columns("miss_p95_s", "time of a miss, service time included"),
        "miss_overhead_s": "median time of a miss beyond the service time (s)",
        "break_even_hit_ratio": "hit ratio above which the cache is faster than none",
        "bytes_per_entry": "bytes of an entry, key and bookkeeping included as the backend counts",
        "tokens_saved": "prompt and completion tokens of the answers served from the cache",
        "usd_saved": "tokens saved at the price of option usd_per_million_tokens (USD)",
        "generations": "calls of the source",
        "distinct_answers": "different answers per prompt, mean over prompts",
        "entropy_bits": "entropy of the answers to one prompt, mean over prompts (bit)",
        "same_as_uncached": "share of answers equal to the uncached source's, where that is fixed",
    },
    values=values,
    aggregate=aggregate,
)
