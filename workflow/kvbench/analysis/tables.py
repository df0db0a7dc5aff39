"""From records to tidy tables: one row per sample, one row per cell, with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd

from kvbench import physics
from kvbench.analysis import statistics
from kvbench.analysis.selection import HERE
from kvbench.errors import InputError

MIB = 2**20

#: What identifies a row of ``kv_summary.csv``.
IDENTITY = ("machine", "model", "device", "dtype", "scenario", "strategy")

#: Column of ``kv_samples.csv`` to meaning and unit, in the table's order.
SAMPLE_COLUMNS = {
    "machine": "`here`, or the name of a recorded machine",
    "model": "name of a file in config/models",
    "device": "cpu or cuda",
    "dtype": "number format of weights and cache",
    "scenario": "id of a file in config/scenarios",
    "strategy": "KV-cache strategy",
    "replicate": "fresh process, counted from 1",
    "turn": "turn of the conversation or step of a fixed scenario, counted from 1",
    "iteration": "repeat inside the process, counted from 0",
    "prompt_tokens": "tokens of the whole prompt, history included",
    "new_tokens": "tokens generated",
    "reused_tokens": "prompt tokens whose keys and values were already cached",
    "e2e_s": "end-to-end latency of the turn (s)",
    "ttft_s": "time to first token (s)",
    "tpot_s": "time per output token after the first: (e2e_s - ttft_s)/(new_tokens - 1) (s)",
    "output_tokens_per_s": "new_tokens/e2e_s (tokens/s)",
    "peak_memory_mib": "peak memory of the turn above the loaded model (MiB), from a separate pass",
    "kv_mib": "bytes of the cache's own storage after the turn (MiB), from a separate pass",
    "kv_mib_predicted": "the same by the physics module (MiB)",
    "predicted_ttft_s": "least time to first token that the machine's ceilings allow (s)",
    "disturbed": "whether other processes took more than 10 % of a core meanwhile",
    "token_digest": "SHA-256 of the new tokens",
}

_INTERVALS = {
    "e2e_s": "end-to-end latency, mean over the turns of a conversation (s)",
    "ttft_s": "time to first token, mean over the turns (s)",
    "tpot_s": "time per output token after the first, over all turns (s)",
    "output_tokens_per_s": "new tokens of all turns over their end-to-end time (tokens/s)",
}
_RATIOS = {
    "speedup_vs_none": "E2E of `none` over this strategy's, geometric mean over turns",
    "speedup_vs_dynamic": "E2E of `dynamic` over this strategy's, geometric mean over turns",
}

#: Column of ``kv_summary.csv`` to meaning and unit, in the table's order.
SUMMARY_COLUMNS: dict[str, str] = {
    **{name: SAMPLE_COLUMNS[name] for name in IDENTITY},
    "threads": "threads of torch's operations",
    "status": "ok, unsupported, out_of_memory or failed; mixed if replicates differ",
    "reason": "one sentence when the status is not ok",
    "exact": "whether the strategy promises the tokens of recomputation in float32",
    "compiled": "whether the decoding step ran as a compiled graph",
    "turns": "turns or steps of the scenario that were measured",
    "replicates": "fresh processes that succeeded",
    "samples": "conversations that the medians are taken over",
    "success_rate": "succeeded over attempted turns; empty when unsupported",
}
for _name, _meaning in _INTERVALS.items():
    SUMMARY_COLUMNS[f"{_name}_median"] = f"median of: {_meaning}"
    SUMMARY_COLUMNS[f"{_name}_ci_low"] = "lower end of its 95 % interval"
    SUMMARY_COLUMNS[f"{_name}_ci_high"] = "upper end of its 95 % interval"
SUMMARY_COLUMNS |= {
    "peak_memory_mib": "highest peak of any turn above the loaded model (MiB)",
    "kv_mib": "largest cache after any turn (MiB)",
    "kv_mib_predicted": "the same by the physics module (MiB)",
}
for _name, _meaning in _RATIOS.items():
    SUMMARY_COLUMNS[_name] = _meaning
    SUMMARY_COLUMNS[f"{_name}_ci_low"] = "lower end of its 95 % interval"
    SUMMARY_COLUMNS[f"{_name}_ci_high"] = "upper end of its 95 % interval"
SUMMARY_COLUMNS |= {
    "tokens_match_reference": "share of turns with exactly the tokens of `dynamic`",
    "replies_exact": "share of turns whose shown reply is the scenario's reference (trained model)",
    "predicted_e2e_s": "least e2e_s the machine's ceilings allow, mean over the turns (s)",
    "roofline_fraction": "predicted_e2e_s over the measured median",
    "bound": "what the prediction waits for: memory or compute",
    "unstable": "spread of 10 % or more, or more than 20 % of the samples disturbed",
    "disturbed_share": "share of samples during which others took more than 10 % of a core",
    "compile_s": "seconds of compiling graphs or extensions, in no sample (s)",
    "cold_e2e_s": "e2e_s of the first conversation, kept out of the medians (s)",
    "code_digest": "digest of the measuring code",
}


def kv_tables(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    ceilings: Mapping[tuple[str, str, str], physics.Ceilings] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Build ``kv_samples`` and ``kv_summary``.

    Parameters
    ----------
    records:
        Machine to its kv records.
    ceilings:
        (machine, device, dtype) to what that machine can do; without it there is no roofline.

    Raises
    ------
    InputError
        Two records of one machine have the same identity and replicate.
    """
    ceilings = ceilings or {}
    samples: list[dict[str, Any]] = []
    groups: dict[tuple[str, ...], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for machine, found in records.items():
        for record in found:
            cell = record["cell"]
            identity = (machine, *(cell[name] for name in IDENTITY[1:]))
            if cell["replicate"] in groups[identity]:
                raise InputError(
                    f"machine {machine}: two records of {'/'.join(identity[1:])} "
                    f"r{cell['replicate']}; keep one"
                )
            groups[identity][cell["replicate"]] = record
            samples += _sample_rows(identity, record, ceilings)
    pools = {identity: _Pool(by_replicate) for identity, by_replicate in groups.items()}
    rows = [_summary_row(identity, pools, ceilings) for identity in sorted(pools)]
    sample_table = pd.DataFrame(samples, columns=list(SAMPLE_COLUMNS))
    summary = pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))
    order = [*IDENTITY, "replicate", "turn", "iteration"]
    return sample_table.sort_values(order, ignore_index=True), summary


def _sample_rows(
    identity: tuple[str, ...],
    record: Mapping[str, Any],
    ceilings: Mapping[tuple[str, str, str], physics.Ceilings],
) -> Iterable[dict[str, Any]]:
    fixed = dict(zip(IDENTITY, identity, strict=True))
    predictions = _predictions(identity, record, ceilings)
    for turn, prediction in zip(record["turns"], predictions, strict=True):
        new = turn["new_tokens"]
        shared = {
            **fixed,
            "replicate": record["cell"]["replicate"],
            "turn": turn["turn"],
            "prompt_tokens": turn["prompt_tokens"],
            "new_tokens": new,
            "reused_tokens": turn["reused_tokens"],
            "peak_memory_mib": _mib(turn["peak_memory_bytes"]),
            "kv_mib": _mib(turn["kv_bytes"]),
            "kv_mib_predicted": _mib(turn["kv_bytes_predicted"]),
            "predicted_ttft_s": prediction.ttft_s if prediction else math.nan,
            "token_digest": turn["token_digest"],
        }
        for sample in turn["samples"]:
            yield {
                **shared,
                "iteration": sample["iteration"],
                "e2e_s": sample["e2e_s"],
                "ttft_s": sample["ttft_s"],
                "tpot_s": tpot(sample["e2e_s"], sample["ttft_s"], new),
                "output_tokens_per_s": new / sample["e2e_s"],
                "disturbed": sample["disturbed"],
            }


def tpot(e2e_s: float, ttft_s: float, new_tokens: int) -> float:
    """Time per output token after the first (s); NaN for a single token."""
    return (e2e_s - ttft_s) / (new_tokens - 1) if new_tokens > 1 else math.nan


def _mib(size: int | None) -> float:
    return math.nan if size is None else size / MIB


class _Pool:
    """The replicates of one cell, with the samples that count."""

    def __init__(self, by_replicate: Mapping[int, Mapping[str, Any]]) -> None:
        self.records = [by_replicate[key] for key in sorted(by_replicate)]
        self.good = [record for record in self.records if record["status"] == "ok"]
        # An iteration counts whole or not at all, so that all turns have the same iterations.
        self.kept = [self._kept(record) for record in self.good]

    @staticmethod
    def _kept(record: Mapping[str, Any]) -> list[int]:
        """Iterations that nothing disturbed; all of them when there is not even one such."""
        count = min((len(turn["samples"]) for turn in record["turns"]), default=0)
        clean = [
            number
            for number in range(count)
            if not any(turn["samples"][number]["disturbed"] for turn in record["turns"])
        ]
        return clean or list(range(count))

    def by_turn(self) -> dict[tuple[str, int], list[list[float]]]:
        """E2E by (scenario, turn): replicates of iterations."""
        pooled: dict[tuple[str, int], list[list[float]]] = defaultdict(list)
        for record, kept in zip(self.good, self.kept, strict=True):
            for turn in record["turns"]:
                key = (record["cell"]["scenario"], turn["turn"])
                pooled[key].append([turn["samples"][number]["e2e_s"] for number in kept])
        return pooled

    def conversations(self) -> dict[str, list[list[float]]]:
        """Metric to replicates of iterations, one number per conversation."""
        metrics: dict[str, list[list[float]]] = {name: [] for name in _INTERVALS}
        for record, kept in zip(self.good, self.kept, strict=True):
            turns = record["turns"]
            new = sum(turn["new_tokens"] for turn in turns)
            gaps = sum(turn["new_tokens"] - 1 for turn in turns)
            row: dict[str, list[float]] = {name: [] for name in _INTERVALS}
            for number in kept:
                e2e = sum(turn["samples"][number]["e2e_s"] for turn in turns)
                ttft = sum(turn["samples"][number]["ttft_s"] for turn in turns)
                row["e2e_s"].append(e2e / len(turns))
                row["ttft_s"].append(ttft / len(turns))
                row["tpot_s"].append((e2e - ttft) / gaps if gaps else math.nan)
                row["output_tokens_per_s"].append(new / e2e)
            for name, values in row.items():
                metrics[name].append(values)
        return metrics

    def digests(self) -> dict[tuple[int, int], str]:
        """(replicate, turn) to the digest of its tokens."""
        return {
            (record["cell"]["replicate"], turn["turn"]): turn["token_digest"]
            for record in self.good
            for turn in record["turns"]
        }


def _summary_row(
    identity: tuple[str, ...],
    pools: Mapping[tuple[str, ...], _Pool],
    ceilings: Mapping[tuple[str, str, str], physics.Ceilings],
) -> dict[str, Any]:
    pool = pools[identity]
    statuses = sorted({record["status"] for record in pool.records})
    first = pool.records[0]
    row: dict[str, Any] = {
        **dict(zip(IDENTITY, identity, strict=True)),
        "threads": first["cell"]["threads"],
        "status": statuses[0] if len(statuses) == 1 else "mixed",
        "reason": next((r["reason"] for r in pool.records if r["reason"]), None),
        "exact": first["strategy_info"]["exact"],
        "compiled": first["strategy_info"]["compiled"],
        "turns": first["cell"]["turns"],
        "replicates": len(pool.good),
        "samples": sum(map(len, pool.kept)),
        "success_rate": _success_rate(pool.records),
        "code_digest": "+".join(sorted({record["code_digest"] for record in pool.records})),
    }
    if not pool.good:
        return row
    conversations = pool.conversations()
    for name, values in conversations.items():
        if any(math.isnan(value) for replicate in values for value in replicate):
            continue
        interval = statistics.median_interval(values)
        row[f"{name}_median"] = interval.value
        row[f"{name}_ci_low"], row[f"{name}_ci_high"] = interval.as_tuple()
    turns = [turn for record in pool.good for turn in record["turns"]]
    for column, field in (
        ("peak_memory_mib", "peak_memory_bytes"),
        ("kv_mib", "kv_bytes"),
        ("kv_mib_predicted", "kv_bytes_predicted"),
    ):
        sizes = [turn[field] for turn in turns if turn[field] is not None]
        row[column] = max(sizes) / MIB if sizes else math.nan
    own = pool.by_turn()
    for reference in ("none", "dynamic"):
        other = pools.get((*identity[:-1], reference))
        if other is None or not other.good:
            continue
        column = f"speedup_vs_{reference}"
        if other is pool:
            row[column] = row[f"{column}_ci_low"] = row[f"{column}_ci_high"] = 1.0
            continue
        ratio = statistics.ratio_interval(other.by_turn(), own)
        row[column] = ratio.value
        row[f"{column}_ci_low"], row[f"{column}_ci_high"] = ratio.as_tuple()
    reference_pool = pools.get((*identity[:-1], "dynamic"))
    if reference_pool is not None and reference_pool.good:
        row["tokens_match_reference"] = _match(pool.digests(), reference_pool.digests())
    recited = [turn["reply_exact"] for turn in turns if turn.get("reply_exact") is not None]
    row["replies_exact"] = sum(recited) / len(recited) if recited else math.nan
    samples = [sample for turn in turns for sample in turn["samples"]]
    row["disturbed_share"] = sum(sample["disturbed"] for sample in samples) / len(samples)
    row["unstable"] = statistics.stability(conversations["e2e_s"], row["disturbed_share"])
    row["compile_s"] = max(record["compile"]["seconds"] for record in pool.good)
    cold = [turn["cold"][0]["e2e_s"] for turn in pool.good[0]["turns"] if turn.get("cold")]
    row["cold_e2e_s"] = sum(cold) / len(cold) if cold else math.nan
    _add_roofline(row, identity, pool.good[0], ceilings)
    return row


def _success_rate(records: Sequence[Mapping[str, Any]]) -> float:
    """Succeeded over attempted turns; an unsupported cell attempted nothing."""
    attempted = [record for record in records if record["status"] != "unsupported"]
    turns = sum(record["cell"]["turns"] for record in attempted)
    return sum(len(record["turns"]) for record in attempted) / turns if turns else math.nan


def _match(own: Mapping[tuple[int, int], str], reference: Mapping[tuple[int, int], str]) -> float:
    """Share of turns with the reference's tokens; a replicate missing there meets its first one."""
    first = {turn: digest for (_, turn), digest in sorted(reference.items(), reverse=True)}
    expected = {key: reference.get(key, first.get(key[1])) for key in own}
    return sum(own[key] == expected[key] for key in own) / len(own)


def _add_roofline(
    row: dict[str, Any],
    identity: tuple[str, ...],
    record: Mapping[str, Any],
    ceilings: Mapping[tuple[str, str, str], physics.Ceilings],
) -> None:
    predictions = _predictions(identity, record, ceilings)
    if any(prediction is None for prediction in predictions):
        return
    row["predicted_e2e_s"] = sum(p.e2e_s for p in predictions) / len(predictions)
    row["roofline_fraction"] = row["predicted_e2e_s"] / row["e2e_s_median"]
    on_memory = sum(p.e2e_s for p in predictions if p.bound == "memory")
    row["bound"] = "memory" if on_memory * 2 >= sum(p.e2e_s for p in predictions) else "compute"


def _predictions(
    identity: tuple[str, ...],
    record: Mapping[str, Any],
    ceilings: Mapping[tuple[str, str, str], physics.Ceilings],
) -> list[physics.Prediction | None]:
    """Prediction of every turn; None where the machine's ceilings are unknown."""
    machine, _model, device, dtype = identity[:4]
    ceiling = ceilings.get((machine, device, dtype))
    sizes = record["model"].get("architecture")
    if ceiling is None or sizes is None or not record["turns"]:
        return [None] * len(record["turns"])
    architecture = physics.Architecture.from_dict(sizes)
    traffic = physics.read_traffic(record["strategy_info"]["traffic"])
    return [
        _predict(
            architecture,
            traffic,
            turn["prompt_tokens"],
            turn["new_tokens"],
            turn["reused_tokens"],
            physics.bytes_per_element(dtype),
            _Hashable(ceiling),
        )
        for turn in record["turns"]
    ]


class _Hashable:
    """Ceilings as a key of the prediction cache; equal when they are the same object."""

    def __init__(self, ceilings: physics.Ceilings) -> None:
        self.ceilings = ceilings

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and other.ceilings is self.ceilings

    def __hash__(self) -> int:
        return id(self.ceilings)


@lru_cache(maxsize=100_000)
def _predict(
    architecture: physics.Architecture,
    traffic: physics.Traffic,
    prompt_tokens: int,
    new_tokens: int,
    reused_tokens: int,
    element_bytes: int,
    ceilings: _Hashable,
) -> physics.Prediction | None:
    """The same lengths return in every cell of a scenario, so each is predicted once."""
    try:
        return physics.predicted_generation(
            architecture,
            traffic,
            prompt_tokens,
            new_tokens,
            element_bytes,
            ceilings.ceilings,
            reused_tokens=reused_tokens,
        )
    except InputError:
        # A ceiling that could not be measured: its reason stands in the ceilings' record.
        return None


def columns_readme(tables: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown that says what each column of each table means and its unit."""
    lines = [
        "# Tables",
        "",
        "Made by the rules of `workflow/rules/analysis.smk` from the records in `results/cells` and",
        "`results/recorded`. `machine` is `here` or a recorded machine's name; empty means that",
        "nothing could be measured.",
    ]
    for name in sorted(tables):
        lines += ["", f"## {name}", "", "| column | meaning |", "|---|---|"]
        lines += [f"| `{column}` | {meaning} |" for column, meaning in tables[name].items()]
    return "\n".join(lines) + "\n"


def app_table(
    study_columns: Mapping[str, str],
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    aggregate: Callable[[Mapping[str, Any]], list[dict[str, Any]]],
) -> pd.DataFrame:
    """Table of one study: its rows with the machine, the cell and its status in front.

    ``aggregate`` gives the rows of a record (:attr:`kvbench.studies.Study.aggregate`).

    A cell without rows (unsupported, failed) still has one line that says so.
    """
    rows = []
    for machine, found in sorted(records.items()):
        for record in sorted(found, key=lambda record: record["cell"]["id"]):
            shared = {
                "machine": machine,
                "cell": record["cell"]["id"],
                "status": record["status"],
                "reason": record["reason"],
            }
            rows += [{**shared, **row} for row in aggregate(record)] or [
                {**shared, **dict(record["cell"]["factors"])}
            ]
    columns = ["machine", "cell", "status", "reason"]
    columns += [name for name in study_columns if name not in columns]
    return pd.DataFrame(rows, columns=columns)


#: Column of ``kv_replies.csv`` to meaning.
REPLY_COLUMNS = {
    **{name: SAMPLE_COLUMNS[name] for name in (*IDENTITY, "turn")},
    "response": "the reply, up to the token that ends it; first replicate",
    "reply_exact": "whether it is the scenario's reference, as far as the fixed length lets it go",
}


def reply_table(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """What the model answered, turn by turn: ``kv_replies``."""
    rows = []
    for machine, found in sorted(records.items()):
        for record in found:
            cell = record["cell"]
            if cell["replicate"] == 1 and cell.get("kind") == "conversation":
                identity = (machine, *(cell[name] for name in IDENTITY[1:]))
                rows += [
                    {
                        **dict(zip(IDENTITY, identity, strict=True)),
                        **{name: turn.get(name) for name in ("turn", "response", "reply_exact")},
                    }
                    for turn in record["turns"]
                ]
    table = pd.DataFrame(rows, columns=list(REPLY_COLUMNS))
    return table.sort_values([*IDENTITY, "turn"], ignore_index=True)


_QUALITY = {
    "kl_nats": "mean KL divergence of the next-token distribution from the exact cache's (nats)",
    "top1_share": "share of steps with the same likeliest token",
    "nll": "mean negative log-likelihood of a reference token (nats)",
    "nll_exact": "the same with the exact cache (nats)",
    "greedy_prefix": "leading tokens that greedy replies share with the exact cache's",
}

#: Column of ``kv_quality.csv`` to meaning and unit; medians over turns with their 95 % intervals.
QUALITY_COLUMNS: dict[str, str] = {name: SAMPLE_COLUMNS[name] for name in IDENTITY}
QUALITY_COLUMNS["reason"] = "why nothing was scored; empty where it was"
for _name, _meaning in _QUALITY.items():
    QUALITY_COLUMNS[_name] = _meaning
    QUALITY_COLUMNS[f"{_name}_ci_low"] = "lower end of its 95 % interval over turns"
    QUALITY_COLUMNS[f"{_name}_ci_high"] = "upper end of its 95 % interval over turns"
QUALITY_COLUMNS |= {
    "perplexity": "exp of the mean negative log-likelihood over all scored tokens",
    "perplexity_exact": "the same with the exact cache",
    "exact_reply_share": "share of turns whose greedy reply is the reference, as far as scored",
    "kv_bytes_per_token": "bytes of the cache per token of context at the last turn",
    "tpot_s": "time per output token after the first, from kv_summary (s)",
}


def quality_table(
    records: Mapping[str, Sequence[Mapping[str, Any]]], summary: pd.DataFrame
) -> pd.DataFrame:
    """What lossy caches cost in quality: ``kv_quality``, one row per scored cell."""
    tpots = summary.set_index(list(IDENTITY))["tpot_s_median"].to_dict()
    rows = []
    for machine, found in sorted(records.items()):
        for record in found:
            if "quality" not in record:
                continue
            identity = (machine, *(record["cell"][name] for name in IDENTITY[1:]))
            rows.append(
                {
                    **dict(zip(IDENTITY, identity, strict=True)),
                    "reason": record["quality"]["reason"],
                    "tpot_s": tpots.get(identity),
                    **record["quality"]["summary"],
                }
            )
    table = pd.DataFrame(rows, columns=list(QUALITY_COLUMNS))
    return table.sort_values(list(IDENTITY), ignore_index=True)


#: Columns that every application table begins with.
APP_COLUMNS = {
    "machine": SAMPLE_COLUMNS["machine"],
    "cell": "id of the cell within the study",
    "status": "ok, unsupported, out_of_memory or failed",
    "reason": "one sentence when the status is not ok",
}

__all__ = ["APP_COLUMNS", "HERE", "SAMPLE_COLUMNS", "SUMMARY_COLUMNS", "app_table", "kv_tables"]
