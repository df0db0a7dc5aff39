"""From the KV tables to the paper's named numbers, and from those to the templates' context."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from kvbench import documents
from kvbench.analysis import instrument, metrics, paired, published, selection
from kvbench.analysis.claims.pages import entries, outcomes, reason_text, say
from kvbench.analysis.claims.verdict import VERDICTS
from kvbench.analysis.claims.writing import plain
from kvbench.analysis.selection import HEADLINE_SCENARIO, SWEEP_SCENARIO, Group
from kvbench.analysis.statistics import Interval
from kvbench.errors import InputError
from kvbench.paper.values import Value
from kvbench.records.identity import CONTROL, HERE, record_paths, replicates_of
from kvbench.strategies import REFERENCE

#: Strategies of the source document; their headline values exist even where nothing was measured.
PUBLISHED_STRATEGIES = ("none", "dynamic", "static")

#: Value's ending -> (column of the summary, unit). Columns with a ``_median`` carry an interval.
MEASURES = {
    "e2e": ("e2e_s_median", "s"),
    "ttft": ("ttft_s_median", "s"),
    "tpot": ("tpot_s_median", "s"),
    "output_tokens_per_s": ("output_tokens_per_s_median", "tokens/s"),
    "peak_memory": ("peak_memory_mib", "MiB"),
    "kv": ("kv_mib", "MiB"),
    "kv_predicted": ("kv_mib_predicted", "MiB"),
    "speedup_vs_none": ("speedup_vs_none", "x"),
    "speedup_vs_dynamic": ("speedup_vs_dynamic", "x"),
    "control": ("control_ratio", "x"),
    "smallest_difference": ("smallest_difference", ""),
    "smallest_difference_vs_none": ("smallest_difference_vs_none", ""),
    "tokens_match": ("tokens_match_reference", ""),
    "roofline_fraction": ("roofline_fraction", ""),
    "cold_e2e": ("cold_e2e_s", "s"),
    "compile": ("compile_s", "s"),
}

#: What every scenario tells; the headline and the widest cell tell all of ``MEASURES``.
PER_SCENARIO = (
    "e2e",
    "peak_memory",
    "kv",
    "speedup_vs_none",
    "speedup_vs_dynamic",
    "tokens_match",
)

STATUSES = ("ok", "mixed", "unsupported", "out_of_memory", "failed")


def snake(text: str) -> str:
    """A name for values: lower case, one underscore for every run of other characters."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def prefix(machine: str) -> str:
    """What a value's name starts with: nothing for this machine, its name for a recorded one."""
    return "" if machine == HERE else f"{snake(machine)}_"


def digits_for(value: float | None, significant: int = 3) -> int:
    """Decimals that show ``significant`` figures of a value, at least none and at most six."""
    if value is None or value == 0:
        return 0 if value is None else 1
    return min(6, max(0, significant - 1 - math.floor(math.log10(abs(value)))))


def _number(entry: object) -> float | None:
    if entry is None or pd.isna(entry):
        return None
    number = float(entry)
    return number if math.isfinite(number) else None


def _text(entry: object) -> str | None:
    return None if entry is None or pd.isna(entry) or not str(entry) else str(entry)


def _measure(row: Mapping[str, Any] | None, measure: str, cells: Sequence[str]) -> Value:
    column, unit = MEASURES[measure]
    if row is None:
        return Value(None, unit=unit)
    value = _number(row.get(column)) if row["status"] in selection.TIMED else None
    if value is None:
        return Value(None, unit=unit, cells=tuple(cells))
    stem = column.removesuffix("_median").removesuffix("_ratio")
    ends = (_number(row.get(f"{stem}_ci_low")), _number(row.get(f"{stem}_ci_high")))
    if column in selection.NOT_JUDGED and _text(row.get(selection.NOT_JUDGED[column])):
        # Too few rounds, or a control that is off: a value from which nothing is concluded.
        ends = (None, None)
    digits = digits_for(value, 4 if unit == "s" and value >= 1 else 3)
    if unit == "x":
        digits = max(2, digits_for(value)) if value < 1 else 2
    return Value(value, None if None in ends else ends, unit, digits, tuple(cells))


def _flag(series: pd.Series) -> pd.Series:
    """A column of True, False, their words in CSV, or nothing, as booleans (nothing is False)."""
    said = series.map(lambda entry: entry is True or str(entry).lower() in {"true", "1", "1.0"})
    # Of no rows at all, map keeps the type, and strings would choose columns instead of rows.
    return said.astype(bool)


class _Writer:
    """Collects values; a name given twice is an error of the caller."""

    def __init__(self, samples: pd.DataFrame) -> None:
        self.values: dict[str, Value] = {}
        self.samples = samples
        self.replicates = replicates_of(samples)

    def put(self, name: str, value: Value) -> None:
        if name in self.values:
            raise InputError(
                f"values.json: two numbers are called {name!r}; "
                "a recorded machine's name and a scenario's collide: rename the machine"
            )
        self.values[name] = value

    def cell(self, stem: str, row: Mapping[str, Any] | None, measures: Iterable[str]) -> None:
        """All values of one summary row (or their absence)."""
        cells = () if row is None else record_paths(self.replicates, row)
        self.put(f"{stem}_status", Value("not planned" if row is None else str(row["status"])))
        reason = None if row is None or pd.isna(row.get("reason")) else str(row["reason"])
        self.put(f"{stem}_reason", Value(reason, cells=cells))
        why_not = None if row is None else _text(row.get("not_judged"))
        self.put(f"{stem}_not_judged", Value(why_not, cells=cells))
        for measure in measures:
            self.put(f"{stem}_{measure}", _measure(row, measure, cells))


def kv_values(
    summary: pd.DataFrame,
    samples: pd.DataFrame,
    claims: pd.DataFrame | Sequence[Mapping[str, Any]] | None = None,
    environment: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Value]:
    """Name every number that the paper's KV section may print.

    Names are lower_snake; those of a recorded machine start with its name, those of this machine
    with nothing. Per machine: ``headline_<strategy>_<measure>`` (the published cell),
    ``widest_<strategy>_<measure>`` (the cell with the most strategies),
    ``<scenario>_<strategy>_<measure>``, counts ``cells_*``, ``exact_*``, ``stability``, facts
    ``machine_<fact>``. A number that could not be measured is ``Value(None)``.

    Parameters
    ----------
    summary, samples:
        The tables ``kv_summary`` and ``kv_samples``.
    claims:
        Rows of ``claims.csv``; counted by verdict.
    environment:
        Machine to its facts, as in ``kvbench.measurement.environment.describe`` plus ``date``
        (ISO 8601, of the latest record). Plain ones become ``machine_<fact>`` with nested keys
        joined; ``commit`` and ``date`` also feed the provenance line.

    Raises
    ------
    InputError
        If two numbers would get the same name.
    """
    out = _Writer(samples)
    environment = environment or {}
    machines = selection.machines(summary)
    out.put("machines", Value(", ".join(machines)))
    for strategy, numbers in published.turn().items():
        for key, unit in (("e2e_s", "s"), ("output_tokens_per_s", "tokens/s")):
            value = Value(numbers[key], unit=unit, digits=_printed(numbers[key]))
            out.put(f"published_{strategy}_{'e2e' if key == 'e2e_s' else key}", value)
    for one, base in (("dynamic", "none"), ("static", "none"), ("static", "dynamic")):
        value = Value(published.ratio(one, base), unit="x", digits=2)
        out.put(f"published_{one}_vs_{base}", value)
    chosen = selection.choices(summary, samples)
    for machine in dict.fromkeys([HERE, *machines]):
        _machine_values(out, summary, machine, chosen.get(machine))
    _counts(out, "all_", summary)
    rounds = summary["rounds"].max() if "rounds" in summary and len(summary) else None
    out.put("all_rounds", Value(None if _number(rounds) is None else int(rounds), digits=0))
    _controls(out, summary)
    for name, entry in app_control_values({}).items():
        # Filled by kvbench.paper.sections where studies were measured.
        out.put(name, entry)
    timed = selection.measured(summary)
    highest = timed["roofline_fraction"].max() if len(timed) else None
    out.put("all_roofline_highest", Value(_number(highest), digits=2))
    for name in (
        "reuse_strategies",
        "quality_strategies",
        "profile_strategies",
        "swept_options",
        "batch_sweeps",
    ):
        # Filled by kvbench.paper.sections where such strategies were measured.
        out.put(name, Value(""))
    for name, entry in _claim_counts(claims).items():
        out.put(name, entry)
    _provenance(out, summary, environment)
    return out.values


def _controls(out: _Writer, summary: pd.DataFrame) -> None:
    """What became of the reference over its own second run, everywhere that it ran twice in rounds."""
    columns = ["control_ratio", "control_ci_low", "control_ci_high"]
    rows = summary[summary["strategy"] == REFERENCE].reindex(columns=[*columns, "not_judged"])
    rows = rows.dropna(subset=columns)
    ratio, low, high = (rows[name].astype(float) for name in columns)
    why = rows["not_judged"].fillna("").astype(str)
    for name, hit in (
        ("controls", ratio.notna()),
        ("controls_holding", (low <= 1) & (high >= 1)),
        ("controls_off", why.map(lambda said: said.startswith(metrics.CONTROL_OFF)).astype(bool)),
    ):
        out.put(f"all_{name}", Value(int(hit.sum()), digits=0))
    for name, entry in (("lowest", ratio.min()), ("highest", ratio.max())):
        out.put(f"all_controls_{name}", Value(_number(entry), unit="x", digits=2))


#: How the columns of a control end, after the name of the ratio that it stands beside.
_CONTROL_ENDS = ("control_ratio", "control_ci_low", "control_ci_high")


def app_control_values(tables: Mapping[str, pd.DataFrame]) -> dict[str, Value]:
    """What became of the controls of the application studies, on all machines.

    One stands beside every ratio that has the same reference, and counts once.

    Parameters
    ----------
    tables:
        Study to its table.

    Returns
    -------
    dict
        ``all_app_controls`` with an interval, those ``_holding`` 1 and those ``_off``
        (:func:`kvbench.analysis.paired.off`), the ``_lowest`` and the ``_highest``.
    """
    held: set[tuple] = set()
    for study, table in tables.items():
        stems = [
            name.removesuffix("control_ratio") for name in table if name.endswith("_control_ratio")
        ]
        for stem in stems:
            columns = ["machine", "cell", *(f"{stem}{end}" for end in _CONTROL_ENDS)]
            rows = table.reindex(columns=columns).dropna()
            held |= {(study, *row) for row in rows.itertuples(index=False)}
    controls = [Interval(*map(float, row[-3:])) for row in held]
    counts = {
        "": len(controls),
        "_holding": sum(one.low <= 1 <= one.high for one in controls),
        "_off": sum(paired.off(one, metrics.PRECISION) for one in controls),
    }
    found = {f"all_app_controls{end}": Value(count, digits=0) for end, count in counts.items()}
    for name, pick in (("lowest", min), ("highest", max)):
        value = pick((one.value for one in controls), default=None)
        found[f"all_app_controls_{name}"] = Value(value, unit="x", digits=2)
    return found


def _machine_values(
    out: _Writer, summary: pd.DataFrame, machine: str, choice: selection.Choice | None
) -> None:
    start = prefix(machine)
    rows = summary[summary["machine"] == machine]
    _headline(out, start, summary, choice.headline if choice else None)
    _widest(out, start, summary, choice.widest if choice else None)
    planned = selection.in_order(rows["strategy"])
    out.put(f"{start}strategies", Value(", ".join(planned)))
    scenarios = sorted(set(rows["scenario"]))
    out.put(f"{start}scenarios", Value(", ".join(scenarios)))
    for scenario in scenarios:
        group = selection.nearest_to_published(summary, machine, scenario)
        own = selection.rows_of(summary, group, scenario)
        for row in own.to_dict("records"):
            # A median of E2E over the lengths of the sweep would mean nothing.
            told = [name for name in PER_SCENARIO if (name, scenario) != ("e2e", SWEEP_SCENARIO)]
            out.cell(f"{start}{scenario}_{row['strategy']}", row, told)
    _counts(out, start, rows)
    _growth(out, start, choice.conversation if choice else None)


def _headline(out: _Writer, start: str, summary: pd.DataFrame, group: Group | None) -> None:
    own = {}
    if group is not None:
        found = selection.rows_of(summary, group, HEADLINE_SCENARIO)
        own = {row["strategy"]: row for row in found.to_dict("records")}
    for fact in ("model", "device", "dtype"):
        out.put(f"{start}headline_{fact}", Value(getattr(group, fact, None)))
    for fact, column in (("prompt_tokens", "prompt_tokens"), ("new_tokens", "new_tokens")):
        taken = out.samples.iloc[:0]
        if group is not None:
            taken = selection.rows_of(out.samples, group, HEADLINE_SCENARIO)
        number = _number(taken[column].median()) if len(taken) else None
        out.put(f"{start}headline_{fact}", Value(None if number is None else int(number), digits=0))
    threads = next((_number(row.get("threads")) for row in own.values()), None)
    out.put(f"{start}headline_threads", Value(None if threads is None else int(threads), digits=0))
    for strategy in selection.in_order([*PUBLISHED_STRATEGIES, *own]):
        row = own.get(strategy)
        out.cell(f"{start}headline_{strategy}", row, MEASURES)
        count = None if row is None else _number(row.get("samples"))
        out.put(
            f"{start}headline_{strategy}_samples",
            Value(0 if count is None else int(count), digits=0),
        )
    out.put(f"{start}headline_strategies", Value(", ".join(selection.in_order(own))))


def _widest(
    out: _Writer, start: str, summary: pd.DataFrame, best: tuple[Group, str] | None
) -> None:
    group, scenario = best if best is not None else (None, None)
    for fact in ("model", "device", "dtype"):
        out.put(f"{start}widest_{fact}", Value(getattr(group, fact, None)))
    out.put(f"{start}widest_scenario", Value(scenario))
    names: list[str] = []
    if best is not None:
        own = selection.rows_of(summary, group, scenario)
        rows = {row["strategy"]: row for row in own.to_dict("records")}
        names = selection.in_order(rows)
        for strategy in names:
            row = rows[strategy]
            stem = f"{start}widest_{strategy}"
            out.cell(stem, row, MEASURES)
            for flag in ("exact", "compiled", "unstable"):
                known = row.get(flag)
                known = (
                    None if known is None or pd.isna(known) else bool(_flag(pd.Series([known]))[0])
                )
                out.put(
                    f"{stem}_{flag}", Value(known if row["status"] in selection.TIMED else None)
                )
    out.put(f"{start}widest_strategies", Value(", ".join(names)))


def _counts(out: _Writer, start: str, rows: pd.DataFrame) -> None:
    """Counts over the rows of the summary: one row is one cell, whatever its replicates."""
    out.put(f"{start}cells_total", Value(len(rows), digits=0))
    for status in STATUSES:
        out.put(f"{start}cells_{status}", Value(int((rows["status"] == status).sum()), digits=0))
    ok = selection.measured(rows)
    out.put(f"{start}cells_unstable", Value(int(_flag(ok["unstable"]).sum()), digits=0))
    disturbed = _number(ok["disturbed_share"].median()) if len(ok) else None
    out.put(f"{start}disturbed_share", Value(disturbed, digits=3))
    success = _number(ok["success_rate"].min()) if len(ok) else None
    out.put(f"{start}success_rate_lowest", Value(success, digits=3))
    # Only float32 is held to equal tokens: in bfloat16 a different order of additions shows.
    judged = ok[(ok["dtype"] == "float32") & ok["tokens_match_reference"].notna()]
    exact = judged[_flag(judged["exact"])]
    out.put(f"{start}exact_cells", Value(len(exact), digits=0))
    same = int((exact["tokens_match_reference"] == 1).sum())
    out.put(f"{start}exact_cells_matching", Value(same, digits=0))
    lossy = judged[~_flag(judged["exact"])]
    low = _number(lossy["tokens_match_reference"].min()) if len(lossy) else None
    out.put(f"{start}lossy_tokens_match_lowest", Value(low, digits=3))
    stored = ok[ok["kv_mib"].notna() & ok["kv_mib_predicted"].notna()]
    off = (stored["kv_mib"] - stored["kv_mib_predicted"]).abs()
    # A table in MiB holds bytes times 2**-20; less than half a byte apart is the same byte count.
    out.put(f"{start}kv_cells_compared", Value(len(stored), digits=0))
    equal = int((off < 0.5 / 2**20).sum())
    out.put(f"{start}kv_cells_equal_to_prediction", Value(equal, digits=0))
    reasons: dict[str, list[str]] = {}
    for row in rows[rows["status"] != "ok"].to_dict("records"):
        why = str(row["reason"]) if pd.notna(row.get("reason")) else str(row["status"])
        reasons.setdefault(why, []).append(str(row["strategy"]))
    lines = [f"{', '.join(selection.in_order(who))}: {why}" for why, who in sorted(reasons.items())]
    out.put(f"{start}not_run", Value("\n".join(lines) or None))


def _growth(out: _Writer, start: str, best: tuple[Group, str] | None) -> None:
    """How much slower the last turn is than the first, and how much longer its prompt."""
    scenario = best[1] if best else None
    out.put(f"{start}growth_scenario", Value(scenario))
    rows = out.samples.iloc[:0]
    if best:
        rows = metrics.counted(selection.rows_of(out.samples, *best))
        rows = rows[rows["strategy"] != CONTROL]
    turns = rows.groupby("turn")["prompt_tokens"].median()
    longer = _number(turns.iloc[-1] / turns.iloc[0]) if len(turns) > 1 else None
    out.put(f"{start}growth_prompt", Value(longer, unit="x", digits=2))
    for strategy in selection.in_order([*PUBLISHED_STRATEGIES, *rows["strategy"].unique()]):
        own = rows[rows["strategy"] == strategy].groupby("turn")["e2e_s"].median()
        slower = _number(own.iloc[-1] / own.iloc[0]) if len(own) > 1 else None
        cells: tuple[str, ...] = ()
        if slower is not None:
            identity = dict(zip(Group._fields, best[0], strict=True))
            cells = record_paths(
                out.replicates, identity | {"scenario": scenario, "strategy": strategy}
            )
        out.put(f"{start}growth_{strategy}", Value(slower, unit="x", digits=2, cells=cells))


def _claim_counts(
    claims: pd.DataFrame | Sequence[Mapping[str, Any]] | None,
) -> dict[str, Value]:
    rows = plain(claims)
    counts = {"claims_total": Value(len({row["id"] for row in rows}), digits=0)}
    for verdict in VERDICTS:
        count = sum(row["verdict"] == verdict for row in rows)
        counts[f"claims_{snake(verdict)}"] = Value(count, digits=0)
    for outcome, count in outcomes(rows).items():
        counts[f"claims_{outcome}"] = Value(count, digits=0)
    return counts


def _provenance(
    out: _Writer, summary: pd.DataFrame, environment: Mapping[str, Mapping[str, Any]]
) -> None:
    # A row that pools records of several digests joins them with a plus sign.
    joined = "+".join(map(str, summary["code_digest"].dropna()))
    digests = sorted({digest for digest in joined.split("+") if digest})
    out.put("code_digests", Value(", ".join(digests) or None))
    out.put("code_digest_count", Value(len(digests), digits=0))
    dates, commits = [], []
    for machine in dict.fromkeys([HERE, *selection.machines(summary), *environment]):
        facts = _flat(environment.get(machine, {}))
        start = prefix(machine)
        for key, fact in sorted(facts.items()):
            out.put(f"{start}machine_{key}", Value(fact, digits=digits_for_fact(fact)))
        date, commit = facts.get("date"), facts.get("commit")
        if date is not None:
            dates.append(str(date)[:10])
        if commit is not None:
            commits.append(str(commit))
    out.put("date", Value(max(dates) if dates else None))
    out.put("commits", Value(", ".join(dict.fromkeys(commits)) or None))


def _printed(number: float) -> int:
    """Decimals with which a published number was printed."""
    return len(str(number).partition(".")[2])


def digits_for_fact(fact: object) -> int:
    """Decimals of a machine's fact: none for counts, three figures otherwise."""
    if isinstance(fact, bool) or not isinstance(fact, float):
        return 0
    return 0 if fact.is_integer() else digits_for(fact)


def _flat(facts: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Plain facts with nested keys joined by underscores; lists and None are left out."""
    flat: dict[str, Any] = {}
    for key, fact in facts.items():
        name = f"{start}{snake(str(key))}"
        if isinstance(fact, Mapping):
            flat.update(_flat(fact, f"{name}_"))
        elif isinstance(fact, str | int | float | bool):
            flat[name] = fact
    return flat


def write_values(path: Path, values: Mapping[str, Value]) -> None:
    """Write ``values.json``: sorted names, the same bytes for the same values."""
    documents.write_json(path, {name: _plain(entry) for name, entry in values.items()})


def _plain(entry: Value) -> dict[str, Any]:
    record = entry.as_json()
    value = record["value"]
    if isinstance(value, float) and not math.isfinite(value):
        record["value"] = None
    return record


def read_values(path: Path) -> dict[str, Value]:
    """Read ``values.json``.

    Raises
    ------
    InputError
        If the file is missing, not JSON, or an entry lacks a field.
    """
    entries = documents.read_json(path)
    values = {}
    for name, entry in entries.items():
        try:
            ends = entry["ci"]
            values[name] = Value(
                value=entry["value"],
                ci=None if ends is None else (float(ends[0]), float(ends[1])),
                unit=entry["unit"],
                digits=int(entry["digits"]),
                cells=tuple(entry["cells"]),
                rounds=entry.get("rounds"),
                smallest_difference=entry.get("smallest_difference"),
                not_judged=entry.get("not_judged"),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"{path}: {name} is not a value ({error!r}); delete the file and run again"
            ) from None
    return values


def _listed(values: Mapping[str, Value], name: str) -> list[str]:
    entry = values.get(name)
    return [part for part in str(entry.value or "").split(", ") if part] if entry else []


#: A share of fewer independent comparisons than these says next to nothing.
FEWEST_PAIRS = 10


def _independent(row: Mapping[str, Any]) -> int:
    """Comparisons that share no cell with another one."""
    return int(row.get("independent") or row["comparisons"])


def aa_values(table: pd.DataFrame) -> dict[str, Value]:
    """Values of the A/A test: the rate of false alarms, and how often a slowdown was found.

    ``aa_sizes`` lists the numbers of rounds; each has ``aa_<n>_pairs``, ``..._false_alarms``,
    ``..._slowdowns_found`` (shares with their intervals), ``..._smallest_slowdown`` (a share) and
    ``..._seconds``. ``aa_enough`` is the fewest at which both aims are met, if any, and ``aa_shown``
    that or else the most that has enough comparisons to say something. ``aa_stopped_...`` are those of
    comparisons that end by the precision (``aa_precision``), as strategies rest in a block. Of the
    machine that stands for all, whole or not at all; nothing where none has the whole test.

    Parameters
    ----------
    table:
        The table ``aa_test``.
    """
    machine = instrument.machine_of(table)
    if machine is None:
        return {}
    rows = table[(table["machine"] == machine) & (table["blocks"] == 1)]
    same, slowed = (
        {int(row["rounds"]): row for row in rows[rows["arm"] == arm].to_dict("records")}
        for arm in (instrument.SAME, instrument.SLOWED)
    )
    sizes = sorted(set(same) & set(slowed))
    if not sizes:
        return {}
    enough = [
        size
        for size in sizes
        if same[size]["share"] <= instrument.FALSE_ALARMS
        and slowed[size]["share"] >= instrument.FOUND
        and _independent(same[size]) >= FEWEST_PAIRS
    ]
    shown = [size for size in sizes if _independent(same[size]) >= FEWEST_PAIRS]

    def share(row: Mapping[str, Any]) -> Value:
        return Value(row["share"], (row["share_ci_low"], row["share_ci_high"]), digits=3)

    def stopped(row: Mapping[str, Any]) -> Value:
        ends = (100 * row["stopped_ci_low"], 100 * row["stopped_ci_high"])
        return Value(100 * row["stopped_share"], ends, unit="%", digits=1)

    values = {
        "aa_machine": Value(machine),
        "aa_processes": Value(int(same[sizes[0]]["cells"]), digits=0),
        "aa_sizes": Value(", ".join(map(str, sizes))),
        "aa_slowdown": Value(float(slowed[sizes[0]]["slowdown"]), digits=3),
        "aa_enough": Value(enough[0] if enough else None, digits=0),
        "aa_shown": Value((enough or shown[-1:] or sizes[-1:])[0], digits=0),
    }
    if _number(same[sizes[0]].get("stopped_share")) is not None:
        values |= {
            "aa_precision": Value(instrument.PRECISION, digits=2),
            "aa_stopped_rounds": Value(float(same[sizes[0]]["stopped_rounds"]), digits=0),
            "aa_stopped_pairs": Value(_independent(same[sizes[0]]), digits=0),
            "aa_stopped_false_alarms": stopped(same[sizes[0]]),
            "aa_stopped_slowdowns_found": stopped(slowed[sizes[0]]),
        }
    for size in sizes:
        smallest = _number(same[size]["smallest_slowdown"])
        values |= {
            f"aa_{size}_pairs": Value(_independent(same[size]), digits=0),
            f"aa_{size}_false_alarms": share(same[size]),
            f"aa_{size}_slowdowns_found": share(slowed[size]),
            f"aa_{size}_smallest_slowdown": Value(smallest, digits=3),
            f"aa_{size}_seconds": Value(
                float(same[size]["measuring_s"]),
                unit="s",
                digits=digits_for(same[size]["measuring_s"]),
            ),
        }
    return values


#: Figures that stand among the text; the others are in the appendix.
MAIN_FIGURES = ("kv_turns", "app_semantic", "app_one_stream")
#: With a part for each machine; of more machines than these it would fill a page.
OVERVIEW, MOST_PARTS = "kv_overview", 2


def section_context(
    values: Mapping[str, Value],
    claims: pd.DataFrame | Sequence[Mapping[str, Any]] | None = None,
    *,
    lang: str = "en",
    figures: Iterable[str] = (),
    has_app: bool = False,
    labels: Mapping[str, str] | None = None,
    authors: str = "",
    untested: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Everything that the templates of the paper read.

    Parameters
    ----------
    values:
        The values by name; they are ``v`` in the templates.
    claims:
        Rows of ``claims.csv``, one per claim and machine: ``id, source, statement_<lang>, figure,
        machine, value, ci_low, ci_high, verdict, reason``; all but ``id`` and ``verdict`` optional.
    lang:
        ``en`` or ``pt``.
    figures:
        Names of the figures that exist (``kv_overview`` ...); others are not included.
    has_app:
        Whether ``app_section.<lang>.tex`` stands beside the document.
    untested:
        Rows of ``not_tested`` in ``claims.yaml``.
    labels:
        Strategy to what the reader sees; by default its name with spaces.
    authors:
        Line below the title.

    Raises
    ------
    InputError
        If a claim lacks its id or verdict.
    """
    labels = labels or {}
    machines = []
    for name in _listed(values, "machines"):
        start = prefix(name)
        not_run = getattr(values.get(f"{start}not_run"), "value", None)
        facts = f"{start}machine_"
        machines.append(
            {
                "name": name,
                "prefix": start,
                "here": name == HERE,
                "strategies": _listed(values, f"{start}widest_strategies"),
                "headline": _listed(values, f"{start}headline_strategies"),
                "alike": _model(values, start) in selection.MODEL_ORDER,
                "not_run": str(not_run or "").splitlines(),
                "facts": {
                    key.removeprefix(facts): _said(entry, lang)
                    for key, entry in sorted(values.items())
                    if key.startswith(facts) and entry.value is not None
                },
            }
        )
    strategies = [
        name
        for machine in _listed(values, "machines")
        for kind in ("strategies", "widest_strategies", "headline_strategies")
        for name in _listed(values, f"{prefix(machine)}{kind}")
    ]
    for kind in ("reuse", "quality", "profile"):
        strategies += _listed(values, f"{kind}_strategies")
    given = plain(claims)
    rows = [_claim(row, lang) for row in given]
    drawn = sorted(figures)
    sizes = _listed(values, "aa_sizes")
    return {
        "lang": lang,
        "v": dict(values),
        "machines": machines,
        "lead": _lead(machines, values),
        "here_is": _here_is(values, lang),
        "absent": _absent(machines, values),
        "claims": rows,
        "claim_entries": [
            {
                "claim": _claim(entry.claim, lang),
                "outcome": entry.outcome(),
                "tested": [_claim(row, lang) for row in entry.tested],
            }
            for entry in entries(given)
        ],
        "untested": [{**row, "place": say(row["place"], lang)} for row in untested],
        "shown_verdicts": [
            verdict for verdict in VERDICTS if any(row["verdict"] == verdict for row in rows)
        ],
        "figure_text": lambda claim: figure_text(claim["figure"], lang),
        "figures": drawn,
        "main_figures": (
            MAIN_FIGURES
            if sum(bool(machine["strategies"]) for machine in machines) > MOST_PARTS
            else (*MAIN_FIGURES, OVERVIEW)
        ),
        "symposium": [name.removeprefix(SYMPOSIUM) for name in drawn if name.startswith(SYMPOSIUM)],
        "has_app": has_app,
        "known": lambda name: name in values and values[name].value is not None,
        "aa_shown": str(values["aa_shown"].value) if sizes else None,
        "reuse_first": next(iter(_listed(values, "reuse_strategies")), None),
        "labels": {
            name: _label(labels, name)
            for name in selection.in_order([*PUBLISHED_STRATEGIES, *strategies])
        },
        "authors": authors,
    }


def _here_is(values: Mapping[str, Value], lang: str) -> str:
    """What this machine is, as LaTeX, for where its name says nothing."""
    from kvbench.paper import tex

    cpu, cores = (getattr(values.get(f"machine_{key}"), "value", None) for key in ("cpu", "cores"))
    if not cpu or not cores:
        return ""
    processor = str(cpu).replace(" (", ", ").replace(")", "")
    counted = f"{cores} { {'en': 'cores', 'pt': 'núcleos'}[lang] }"
    return tex.escape(f"{say(processor, lang)}; {counted}")


def _said(entry: Value, lang: str) -> Value:
    """A fact of a machine whose words are said in the language."""
    return replace(entry, value=say(entry.value, lang)) if isinstance(entry.value, str) else entry


def _model(values: Mapping[str, Value], start: str) -> object:
    """The model of a machine's published cell, or None."""
    found = values.get(f"{start}headline_model")
    return None if found is None else found.value


def _label(labels: Mapping[str, str], name: str) -> str:
    """What the reader sees for a strategy; the mapping may know more names than it lists."""
    try:
        return labels[name]
    except KeyError:
        return name.replace("_", " ")


#: What the names of the symposium's regenerated figures start with; a scenario follows.
SYMPOSIUM = "symposium_"


def _lead(
    machines: Sequence[Mapping[str, Any]], values: Mapping[str, Value]
) -> Mapping[str, Any] | None:
    """The machine that the abstract speaks of.

    The first with a model of the source's shape and a judged gain, else with one of the two.
    """
    able = [machine for machine in machines if machine["headline"]]

    def judged(machine: Mapping[str, Any]) -> bool:
        gain = values[f"{machine['prefix']}headline_dynamic_speedup_vs_none"]
        return gain.value is not None and gain.ci is not None

    def rank(machine: Mapping[str, Any]) -> tuple[bool, bool]:
        return (not machine["alike"], not judged(machine))

    return min(able, key=rank, default=None)


#: Word in the record's reason to the reason that the paper prints in its own words.
_WHY = {
    "cuda": "cuda",
    "package": "package",
    "transformers": "version",
    "memory": "memory",
    "packs": "packing",
}


def _absent(
    machines: Sequence[Mapping[str, Any]], values: Mapping[str, Value]
) -> list[dict[str, str]]:
    """Strategies that were planned and not measured, each once, with status and kind of reason."""
    found = {}
    for machine in machines:
        for name in machine["strategies"]:
            stem = f"{machine['prefix']}widest_{name}"
            status = str(values[f"{stem}_status"].value)
            if status in selection.TIMED or name in found:
                continue
            reason = str(values[f"{stem}_reason"].value or "")
            why = next((why for word, why in _WHY.items() if word in reason.lower()), "other")
            found[name] = {"strategy": name, "status": status, "why": why}
    return list(found.values())


def figure_text(figure: str, lang: str) -> str:
    """A source's number as LaTeX, in the notation of the language."""
    from kvbench.paper import tex

    if not any(map(str.isdigit, figure)):
        return tex.escape(say(figure, lang))
    if lang == "pt":
        swap = {",": ".", ".": ","}
        figure = re.sub(
            r"\d[\d.,]*\d", lambda number: "".join(swap.get(c, c) for c in number[0]), figure
        )
    text = tex.escape(figure)
    text = re.sub(r"(?<=\d)-(?=\d)", "--", text)
    text = re.sub(r"(?<=\d)x\b", r"$\\times$", text)
    return text.replace(" us", r"~\textmu{}s")


def _claim(row: Mapping[str, Any], lang: str) -> dict[str, Any]:
    """One row of the claims table, with the statement in the language of the paper."""
    for key in ("id", "verdict"):
        if row.get(key) is None:
            raise InputError(f"claims.csv: a row has no {key}: {dict(row)}")
    ends = (_number(row.get("ci_low")), _number(row.get("ci_high")))
    value = _number(row.get("value"))
    figure = row.get("figure")
    return {
        "id": str(row["id"]),
        "document": str(row.get("document") or ""),
        "kind": str(row.get("kind") or ""),
        "source": str(row.get("source") or ""),
        "statement": str(row.get(f"statement_{lang}") or row.get("statement") or row["id"]),
        "figure": "" if figure is None else str(figure),
        "machine": str(row.get("machine") or ""),
        "measured": Value(
            value,
            None if None in ends else ends,
            unit=str(row.get("unit") or ""),
            digits=digits_for(value),
        ),
        "smallest": _number(row.get("smallest_difference")),
        "verdict": str(row["verdict"]),
        "reason": reason_text({"reason": row.get("reason")}, lang),
    }
