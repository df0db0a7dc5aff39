"""From records to tidy tables: one row per sample, one row per cell, with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd

from kvbench import physics, strategies
from kvbench.analysis import metrics, paired, statistics
from kvbench.analysis.metrics import Evidence
from kvbench.errors import InputError
from kvbench.records.identity import CONTROL, IDENTITY

MIB = 2**20

#: Column of ``kv_samples.csv`` to meaning and unit, in the table's order.
SAMPLE_COLUMNS = {
    "machine": "`here`, or the name of a recorded machine",
    "model": "name of a file in config/models",
    "device": "cpu or cuda",
    "dtype": "number format of weights and cache",
    "scenario": "id of a file in config/scenarios; of a batch followed by `-b<batch>` and, for mixed "
    "lengths, `-mixed`",
    "strategy": "KV-cache strategy",
    "batch": "requests that were generated for at once",
    "lengths": "prompts of a batch: equal, or mixed and padded; empty for one request",
    "replicate": "fresh process, counted from 1",
    "turn": "turn of the conversation or step of a fixed scenario, counted from 1",
    "block": "cells that took turns; empty where cells ran one after the other",
    "iteration": "repeat inside the process, counted from 0; equal to the round in a block",
    "round": "round of the block, counted from 0: what is compared is paired within it",
    "slot": "running position of the turn in the block, counted from 0",
    "prompt_tokens": "tokens of the whole prompt, history included; of a batch the longest",
    "new_tokens": "tokens generated, of a batch for each request",
    "reused_tokens": "prompt tokens whose keys and values were already cached",
    "e2e_s": "end-to-end latency of the turn (s)",
    "ttft_s": "time to first token (s), of a batch until every request has it",
    "tpot_s": "time per output token after the first, of a batch one step of all requests: "
    "(e2e_s - ttft_s)/(new_tokens - 1) (s)",
    "output_tokens_per_s": "batch * new_tokens/e2e_s (tokens/s)",
    "peak_memory_mib": "peak memory of the turn above the loaded model (MiB), from a separate pass",
    "kv_mib": "bytes of the cache's own storage after the turn (MiB), from a separate pass",
    "kv_mib_predicted": "the same by the physics module (MiB)",
    "predicted_ttft_s": "least time to first token that the machine's ceilings allow (s)",
    "disturbed": "whether other processes took more than 10 % of a core meanwhile",
    "token_digest": "SHA-256 of the new tokens, of a batch those of one request after the other",
}

_INTERVALS = {
    "e2e_s": "end-to-end latency, mean over the turns of a conversation (s), this machine during this run",
    "ttft_s": "time to first token, mean over the turns (s)",
    "tpot_s": "time per output token after the first, over all turns (s)",
    "output_tokens_per_s": "new tokens of all turns over their end-to-end time (tokens/s)",
}
_RATIOS = {
    f"speedup_vs_{name}": f"E2E of `{name}` over this strategy's: geometric mean over turns and rounds, "
    "paired in the same round of the same block"
    for name in ("none", strategies.REFERENCE)
}

#: Column of ``kv_summary.csv`` to meaning and unit, in the table's order.
SUMMARY_COLUMNS: dict[str, str] = {
    **{name: SAMPLE_COLUMNS[name] for name in IDENTITY},
    "batch": SAMPLE_COLUMNS["batch"],
    "lengths": SAMPLE_COLUMNS["lengths"],
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
for _end in ("median", "ci_low", "ci_high"):
    SUMMARY_COLUMNS[f"tokens_per_second_per_request_{_end}"] = (
        f"output_tokens_per_s_{_end} over batch: what one request gets (tokens/s)"
    )
SUMMARY_COLUMNS |= {
    "peak_memory_mib": "highest peak of any turn above the loaded model (MiB)",
    "kv_mib": "largest cache after any turn (MiB)",
    "kv_mib_predicted": "the same by the physics module (MiB)",
    "padding_mib": "what of it padded positions before shorter prompts take, by the physics module (MiB)",
    "reserved_memory_mib": "most that an allocator or engine reserved, whatever of it was used (MiB)",
}
for _name, _meaning in _RATIOS.items():
    SUMMARY_COLUMNS[_name] = _meaning
    SUMMARY_COLUMNS[f"{_name}_ci_low"] = "lower end of its 95 % interval; empty for one run"
    SUMMARY_COLUMNS[f"{_name}_ci_high"] = "upper end of its 95 % interval; empty for one run"
SUMMARY_COLUMNS |= {
    "rounds": f"rounds behind speedup_vs_{strategies.REFERENCE}; 0: one after the other, not paired",
    "blocks": "blocks that these rounds are of",
    "smallest_difference": f"what speedup_vs_{strategies.REFERENCE} would have shown nine times out of "
    "ten, as a share",
    "rounds_vs_none": "rounds behind speedup_vs_none, which are fewer where `none` takes part in few; 0: "
    "one after the other, not paired",
    "smallest_difference_vs_none": "what speedup_vs_none would have shown nine times out of ten, as a "
    "share",
    "control_ratio": "the reference over its own second run in the same rounds; 1 but for chance",
    "control_ci_low": "lower end of its 95 % interval",
    "control_ci_high": "upper end of its 95 % interval",
    "not_judged": f"why no verdict may rest on speedup_vs_{strategies.REFERENCE}; empty where one may",
    "not_judged_vs_none": "why no verdict may rest on speedup_vs_none; empty where one may",
    "tokens_match_reference": "share of turns with exactly the tokens of `dynamic`, in every request",
    "rows_as_alone": "share of a batch's replies with the tokens of the same prompt by itself: under "
    "`dynamic` where the strategy is exact, else under the strategy itself; empty for one request",
    "replies_exact": "share of turns whose shown reply is the scenario's reference (trained model)",
    "predicted_e2e_s": "least e2e_s the machine's ceilings allow, mean over the turns (s)",
    "predicted_tpot_s": "the same of tpot_s (s)",
    "predicted_output_tokens_per_s": "new tokens of all turns and requests over the least time (tokens/s)",
    "roofline_fraction": "predicted_e2e_s over the measured median",
    "bound": "what the prediction waits for: memory or compute",
    "unstable": "spread of 10 % or more, or more than 20 % of the samples disturbed",
    "disturbed_share": "share of samples during which others took more than 10 % of a core",
    "compile_s": "seconds of compiling graphs or extensions, in no sample (s)",
    "engine_start_s": "seconds until an engine of its own was ready, imports included, compilation not (s)",
    "cold_e2e_s": "e2e_s of the first conversation, kept out of the medians (s)",
    "code_digest": "digest of the measuring code",
}


def kv_tables(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    ceilings: Mapping[tuple[str, str, str], physics.Ceilings] | None = None,
    evidence: Mapping[str, Evidence] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Build ``kv_samples`` and ``kv_summary``.

    The control of a block is in the samples; in the summary it is no strategy but the columns
    ``control_*`` of those that it stood beside.

    Parameters
    ----------
    records:
        Machine to its kv records.
    ceilings:
        (machine, device, dtype) to what that machine can do; without it there is no roofline.
    evidence:
        Machine to the rounds and blocks that a verdict needs there.

    Raises
    ------
    InputError
        Two records of one machine have the same identity and replicate.
    """
    ceilings, evidence = ceilings or {}, evidence or {}
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
    rows = [
        _summary_row(identity, pools, ceilings, evidence.get(identity[0], Evidence()))
        for identity in sorted(pools)
        if identity[-1] != CONTROL
    ]
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
    block = record["block"]["id"] if record.get("block") else None
    batch = record["cell"].get("batch", 1)
    for turn, prediction in zip(record["turns"], predictions, strict=True):
        new = turn["new_tokens"]
        shared = {
            **fixed,
            "batch": batch,
            "lengths": record["cell"].get("lengths"),
            "replicate": record["cell"]["replicate"],
            "block": block,
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
                "round": sample.get("round"),
                "slot": sample.get("slot"),
                "e2e_s": sample["e2e_s"],
                "ttft_s": sample["ttft_s"],
                "tpot_s": metrics.tpot(sample["e2e_s"], sample["ttft_s"], new - 1),
                "output_tokens_per_s": metrics.throughput(batch * new, sample["e2e_s"]),
                "disturbed": sample["disturbed"],
            }


def _mib(size: int | None) -> float:
    return math.nan if size is None else size / MIB


class _Pool:
    """The replicates of one cell, with their repeats."""

    def __init__(self, by_replicate: Mapping[int, Mapping[str, Any]]) -> None:
        self.records = [by_replicate[key] for key in sorted(by_replicate)]
        self.good = [record for record in self.records if record["status"] == "ok"]
        self.repeats = [metrics.repeats(record) for record in self.good]

    def conversations(self) -> dict[str, list[list[float]]]:
        """Metric to replicates of repeats, one number per conversation."""
        found = [repeats.conversations() for repeats in self.repeats]
        return {name: [one[name] for one in found] for name in metrics.CONVERSATION}

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
    needed: Evidence,
) -> dict[str, Any]:
    pool = pools[identity]
    statuses = sorted({record["status"] for record in pool.records})
    first = pool.records[0]
    row: dict[str, Any] = {
        **dict(zip(IDENTITY, identity, strict=True)),
        "batch": first["cell"].get("batch", 1),
        "lengths": first["cell"].get("lengths"),
        "threads": first["cell"]["threads"],
        "status": statuses[0] if len(statuses) == 1 else "mixed",
        "reason": next((r["reason"] for r in pool.records if r["reason"]), None),
        "exact": first["strategy_info"]["exact"],
        "compiled": first["strategy_info"]["compiled"],
        "turns": first["cell"]["turns"],
        "replicates": len(pool.good),
        "samples": sum(int(repeats.kept.sum()) for repeats in pool.repeats),
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
    for end in ("median", "ci_low", "ci_high"):
        if (speed := row.get(f"output_tokens_per_s_{end}")) is not None:
            row[f"tokens_per_second_per_request_{end}"] = speed / row["batch"]
    turns = [turn for record in pool.good for turn in record["turns"]]
    for column, field in (
        ("peak_memory_mib", "peak_memory_bytes"),
        ("kv_mib", "kv_bytes"),
        ("kv_mib_predicted", "kv_bytes_predicted"),
        ("padding_mib", "kv_bytes_padding"),
        ("reserved_memory_mib", "reserved_memory_bytes"),
    ):
        sizes = [turn[field] for turn in turns if turn.get(field) is not None]
        row[column] = max(sizes) / MIB if sizes else math.nan
    _add_ratios(row, identity, pools, needed)
    reference_pool = pools.get((*identity[:-1], strategies.REFERENCE))
    if reference_pool is not None and reference_pool.good:
        row["tokens_match_reference"] = _match(pool.digests(), reference_pool.digests())
    answers = [answer["as_alone"] for turn in turns for answer in turn.get("rows", ())]
    row["rows_as_alone"] = sum(answers) / len(answers) if answers else math.nan
    recited = [turn["reply_exact"] for turn in turns if turn.get("reply_exact") is not None]
    row["replies_exact"] = sum(recited) / len(recited) if recited else math.nan
    samples = [sample for turn in turns for sample in turn["samples"]]
    row["disturbed_share"] = sum(sample["disturbed"] for sample in samples) / len(samples)
    row["unstable"] = statistics.stability(conversations["e2e_s"], row["disturbed_share"])
    row["compile_s"] = max(record["compile"]["seconds"] for record in pool.good)
    engines = [record["engine"] for record in pool.good if "engine" in record]
    row["engine_start_s"] = max(
        (engine.get("import_s", 0.0) + engine["start_s"] for engine in engines), default=math.nan
    )
    cold = [turn["cold"][0]["e2e_s"] for turn in pool.good[0]["turns"] if turn.get("cold")]
    row["cold_e2e_s"] = sum(cold) / len(cold) if cold else math.nan
    _add_roofline(row, identity, pool.good[0], ceilings)
    return row


def _add_ratios(
    row: dict[str, Any],
    identity: tuple[str, ...],
    pools: Mapping[tuple[str, ...], _Pool],
    needed: Evidence,
) -> None:
    """Speed-ups, what they rest on, the control beside them, and whether they may be judged."""
    pool = pools[identity]

    def other(name: str) -> _Pool | None:
        found = pools.get((*identity[:-1], name))
        return found if found is not None and found.good else None

    compared = over_none = None
    for reference in ("none", strategies.REFERENCE):
        column, against = f"speedup_vs_{reference}", other(reference)
        if against is None:
            continue
        if against is pool:
            row[column] = row[f"{column}_ci_low"] = row[f"{column}_ci_high"] = 1.0
            # A reference rests on the rounds in which it stood beside its own second run.
            against = other(CONTROL) if reference == strategies.REFERENCE else None
            if against is not None:
                compared = metrics.speedup(against.repeats, pool.repeats)
            continue
        compared = metrics.speedup(against.repeats, pool.repeats)
        row[column] = compared.value
        row[f"{column}_ci_low"], row[f"{column}_ci_high"] = compared.interval.as_tuple()
        if reference == "none":
            over_none = compared
    row["rounds"] = compared.rounds if compared else 0
    row["blocks"] = compared.blocks if compared else 0
    row["smallest_difference"] = compared.smallest_difference if compared else math.nan
    beside = None
    control, reference_pool = other(CONTROL), other(strategies.REFERENCE)
    if control is not None and reference_pool is not None:
        mine = {repeats.block for repeats in pool.repeats}
        sides = [
            [repeats for repeats in side.repeats if repeats.block in mine]
            for side in (reference_pool, control)
        ]
        if all(sides):
            beside = metrics.compare(*sides).interval
            row["control_ratio"] = beside.value
            row["control_ci_low"], row["control_ci_high"] = beside.as_tuple()
    precision = _precision(pool.good)

    def why_not(found: metrics.Comparison | None) -> str | None:
        rounds, blocks = (found.rounds, found.blocks) if found else (0, 0)
        reason = found.reason if found else None
        return reason or metrics.why_not_judged(rounds, blocks, needed, beside, precision)

    row["not_judged"] = why_not(compared)
    if over_none is not None:
        # Rounds of their own: `none` may take part in few.
        row["rounds_vs_none"] = over_none.rounds
        row["smallest_difference_vs_none"] = over_none.smallest_difference
        row["not_judged_vs_none"] = why_not(over_none)


def _precision(records: Iterable[Mapping[str, Any]]) -> float:
    """The widest precision that the cell's blocks were measured to."""
    stated = [record["block"].get("precision") for record in records if record.get("block")]
    return max((one for one in stated if one), default=metrics.PRECISION)


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
    # Over the turns as measured times are: sums over sums.
    new = [turn["new_tokens"] for turn in record["turns"]]
    least = sum(p.e2e_s for p in predictions)
    waited = sum(p.ttft_s for p in predictions)
    row["predicted_tpot_s"] = metrics.tpot(least, waited, sum(new) - len(new))
    row["predicted_output_tokens_per_s"] = metrics.throughput(row["batch"] * sum(new), least)
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
    try:
        architecture = physics.Architecture.from_dict(sizes)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(
            f"the record of {record['cell']['strategy']} on {record['cell']['model']},"
            f" {record['cell']['scenario']}: model.architecture cannot be read; delete the file and"
            " run again to measure it anew"
        ) from None
    traffic = physics.read_traffic(record["strategy_info"]["traffic"])
    batch = record["cell"].get("batch", 1)
    return [
        _predict(
            architecture,
            traffic,
            _positions(turn),
            turn["new_tokens"],
            turn["reused_tokens"],
            physics.bytes_per_element(dtype),
            _Hashable(ceiling),
            batch,
        )
        for turn in record["turns"]
    ]


def _positions(turn: Mapping[str, Any]) -> int:
    """Positions of each row's prompt that are computed: padded ones are, by who pads.

    Of requests of different lengths that are not padded it is the mean, rounded down: what attention
    costs grows faster than the length, so that the least time of the mean is least for all of them.
    """
    lengths = [row["prompt_tokens"] for row in turn.get("rows", ())]
    if not lengths or turn["padded_tokens"]:
        return turn["prompt_tokens"]
    return sum(lengths) // len(lengths)


#: Column of ``kv_rounds.csv`` to meaning and unit: what the drift figure is drawn from.
ROUND_COLUMNS = {
    **{name: SAMPLE_COLUMNS[name] for name in IDENTITY},
    **{name: SAMPLE_COLUMNS[name] for name in ("replicate", "block", "round")},
    "probe_s": "a fixed computation timed in this round: the machine's speed alone (s)",
    "e2e_s": "end-to-end latency of the cell in this round, mean over the turns (s)",
    "ratio": f"`{strategies.REFERENCE}` over this strategy in this round, geometric mean over turns",
    "disturbed": "whether something else took the machine during one of the cell's turns",
}


def round_table(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    """Round by round what each cell of a block took, and the machine's own speed: ``kv_rounds``."""
    rows: list[dict[str, Any]] = []
    for machine, found in sorted(records.items()):
        blocks: dict[tuple, dict[str, Mapping[str, Any]]] = defaultdict(dict)
        for record in found:
            if record.get("block") and record["status"] == "ok":
                cell = record["cell"]
                place = tuple(cell[name] for name in ("model", "device", "dtype", "scenario"))
                blocks[(*place, record["block"]["id"])][cell["strategy"]] = record
        for (*place, block), cells in sorted(blocks.items()):
            model, device, dtype, scenario = place
            repeats = {name: metrics.repeats(record) for name, record in cells.items()}
            reference = repeats.get(strategies.REFERENCE)
            for name, own in sorted(repeats.items()):
                ratios = _ratios_by_round(reference, own)
                probes = cells[name]["block"].get("probe_s") or []
                for column, number in enumerate(own.rounds):
                    rows.append(
                        {
                            "machine": machine,
                            "model": model,
                            "device": device,
                            "dtype": dtype,
                            "scenario": scenario,
                            "strategy": name,
                            "replicate": cells[name]["cell"]["replicate"],
                            "block": block,
                            "round": number,
                            "probe_s": probes[number] if number < len(probes) else math.nan,
                            "e2e_s": float(own.e2e_s[:, column].mean()),
                            "ratio": ratios.get(number, math.nan),
                            "disturbed": not own.clean[column],
                        }
                    )
    return pd.DataFrame(rows, columns=list(ROUND_COLUMNS))


def _ratios_by_round(reference: metrics.Repeats | None, own: metrics.Repeats) -> dict[int, float]:
    """Round to the ratio of the reference over a cell; both sides' disturbed rounds included."""
    if reference is None or own is reference:
        return {}
    turns = [turn for turn in own.turns if turn in reference.turns]
    columns = {number: place for place, number in enumerate(reference.rounds)}
    found = {}
    for place, number in enumerate(own.rounds):
        if number in columns and turns:
            sides = [
                [side.e2e_s[side.turns.index(turn), column] for turn in turns]
                for side, column in ((reference, columns[number]), (own, place))
            ]
            found[number] = math.exp(paired.log_ratio(*sides))
    return found


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
    batch: int,
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
            batch=batch,
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

    Machines keep the order of ``records``: which stands first, stands for all in the figures.
    ``aggregate`` gives the rows of a record (:attr:`kvbench.studies.Study.aggregate`).

    A cell without rows (unsupported, failed) still has one line that says so.
    """
    rows = []
    for machine, found in records.items():
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


#: Column of ``kv_profile.csv`` to meaning and unit.
PROFILE_COLUMNS: dict[str, str] = {
    **{name: SAMPLE_COLUMNS[name] for name in IDENTITY},
    "reason": "why nothing was taken apart; empty where it was",
    "context_tokens": "tokens of context in the middle of the steps",
    "steps": "decoding steps under torch's profiler; as many without it took turns with them",
    "token_s": "time per token in the steps without the profiler (s)",
    "weights_s": "operators that multiply with weights, per token (s)",
    "attention_s": "operators of attention (s)",
    "cache_s": "operators that write, concatenate, pack or unpack keys and values (s)",
    "other_s": "all other operators: norms, activations, positions, masks, sampling (s)",
    "outside_s": "what token_s has beyond the operators: Python and dispatch (s)",
    "profiler_s": "what a token takes longer under the profiler; in none of the parts (s)",
    "roof_s": "least time the machine's read bandwidth allows for the token's bytes (s)",
    "roof_share": "roof_s over token_s",
}


def profile_table(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    ceilings: Mapping[tuple[str, str, str], physics.Ceilings] | None = None,
) -> pd.DataFrame:
    """Where the time of a decoded token goes: ``kv_profile``, one row per cell that was asked."""
    rows = []
    for machine, found in sorted(records.items()):
        for record in found:
            profile = record.get("profile")
            if profile is None:
                continue
            identity = (machine, *(record["cell"][name] for name in IDENTITY[1:]))
            row = {**dict(zip(IDENTITY, identity, strict=True)), "reason": profile["reason"]}
            rows.append(row)
            if profile["status"] != "ok":
                continue
            row |= {name: profile[name] for name in ("context_tokens", "steps", "token_s")}
            row |= {f"{part}_s": seconds for part, seconds in profile["parts_s"].items()}
            row["profiler_s"] = profile["profiled_token_s"] - profile["token_s"]
            row["roof_s"] = _token_roof(identity, record, ceilings or {})
            row["roof_share"] = row["roof_s"] / profile["token_s"]
    table = pd.DataFrame(rows, columns=list(PROFILE_COLUMNS))
    return table.sort_values(list(IDENTITY), ignore_index=True)


def _token_roof(
    identity: tuple[str, ...],
    record: Mapping[str, Any],
    ceilings: Mapping[tuple[str, str, str], physics.Ceilings],
) -> float:
    """Least seconds to read a token's bytes; NaN where they, or the bandwidth, are unknown."""
    machine, _model, device, dtype = identity[:4]
    ceiling = ceilings.get((machine, device, dtype))
    sizes = record["model"].get("architecture")
    traffic = physics.read_traffic(record["strategy_info"]["traffic"])
    bandwidth = ceiling.read_bytes_per_s if ceiling is not None else None
    if not bandwidth or sizes is None or traffic.recomputes:
        # Recomputing waits for arithmetic, not for bytes.
        return math.nan
    try:
        moved = physics.decode_bytes(
            physics.Architecture.from_dict(sizes),
            record["profile"]["context_tokens"],
            traffic,
            physics.bytes_per_element(dtype),
            decoded=record["profile"]["steps"],
        )
    except InputError:
        return math.nan
    return moved / bandwidth


#: Columns that every application table begins with.
APP_COLUMNS = {
    "machine": SAMPLE_COLUMNS["machine"],
    "cell": "id of the cell within the study",
    "status": "ok, unsupported, out_of_memory or failed",
    "reason": "one sentence when the status is not ok",
}
