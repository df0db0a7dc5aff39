"""From tables to the paper: all values by name, then the LaTeX text of each language."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from kvbench import documents, studies
from kvbench.analysis import batches, instrument, metrics, selection, statistics, sweeps
from kvbench.analysis.claims.measured import control_is_off
from kvbench.figures import names as figure_names
from kvbench.paper import numbers, tex
from kvbench.paper.values import Value
from kvbench.records.identity import record_paths, replicates_of, study_paths
from kvbench.strategies import looks, without_reuse

#: The order in which a reader meets the studies: from one function to a whole service.
STUDY_ORDER = (
    "memoization",
    "http",
    "eviction",
    "expiry",
    "write_policy",
    "response_cache",
    "layered",
    "stampede",
    "resilience",
    "semantic",
    "prefix",
    "llm_api",
    "endpoint",
    "one_stream",
)


def collect(
    summary: pd.DataFrame,
    samples: pd.DataFrame,
    quality: pd.DataFrame,
    profile: pd.DataFrame,
    study_tables: Mapping[str, pd.DataFrame],
    aa_table: pd.DataFrame,
    claims: pd.DataFrame,
    environments: Mapping[str, Mapping[str, Any]],
) -> dict[str, Value]:
    """Every value that the paper or a claim may name.

    Parameters
    ----------
    summary, samples, quality, profile, aa_table, claims:
        The tables of those names.
    study_tables:
        Study to its table.
    environments:
        Machine to its facts.
    """
    batch_sweeps = Value(len(batches.sweeps(summary)), digits=0)
    # What the paper says beside its figure is about one request.
    summary, samples = selection.single(summary), selection.single(samples)
    values = numbers.kv_values(summary, samples, claims, environments)
    values |= numbers.aa_values(aa_table)
    values |= numbers.app_control_values(study_tables)
    chosen = selection.choices(summary, samples, quality)
    needed = {machine: instrument.evidence(aa_table, machine) for machine in chosen}
    values |= reuse_values(summary, samples, chosen, needed)
    values |= quality_values(quality, chosen)
    values |= profile_values(profile)
    values["batch_sweeps"] = batch_sweeps
    values["swept_options"] = Value(len(sweeps.sweeps(summary)), digits=0)
    shown = [selection.one_machine(table) for table in study_tables.values() if len(table)]
    values["app_machine"] = Value(str(shown[0]["machine"].iloc[0]) if shown else None)
    for name, table in study_tables.items():
        rows = selection.one_machine(table)
        found = studies.get(name).values(rows)
        cells = ()
        if len(rows):
            cells = study_paths(str(rows["machine"].iloc[0]), name, rows["cell"].unique())
        values |= {
            key: value if value.cells else replace(value, cells=cells)
            for key, value in found.items()
        }
    return values


def reuse_values(
    summary: pd.DataFrame,
    samples: pd.DataFrame,
    chosen: Mapping[str, selection.Choice],
    needed: Mapping[str, metrics.Evidence] | None = None,
) -> dict[str, Value]:
    """What keeping the cache from turn to turn saves, at the last turn of the longest conversation.

    ``reuse_strategies`` lists those measured; each has ``reuse_<name>_ttft`` and its counterpart
    without reuse ``..._ttft_without`` (s), ``..._speedup`` (ratio of the two, with its interval),
    ``..._share`` (prompt tokens not read, over all turns) and ``..._held`` (MiB after the last turn).
    A ratio of fewer rounds than ``needed`` asks of its machine, or beside a control that is off, has no
    interval.
    """
    best = selection.first(choice.reuse for choice in chosen.values())
    if best is None:
        return {"reuse_strategies": Value("")}
    beside = selection.rows_of(summary, *best)
    rows = selection.measured(beside)
    rows = rows[rows["strategy"].map(lambda name: without_reuse(str(name)) is not None)]
    own = metrics.counted(selection.rows_of(samples, *best))
    last = own[own["turn"] == own["turn"].max()]
    names = [name for name in selection.in_order(rows["strategy"]) if name in set(own["strategy"])]
    replicates = replicates_of(samples)
    found = {
        "reuse_strategies": Value(", ".join(names)),
        "reuse_turns": Value(int(own["turn"].max()), digits=0),
        "reuse_scenario": Value(best[1]),
        "reuse_machine": Value(best[0].machine),
        "reuse_prompt_tokens": Value(int(last["prompt_tokens"].max()), digits=0),
    }
    for name in names:
        without = without_reuse(name)
        sides = {
            side: metrics.turn_replicates(last[last["strategy"] == side], "ttft_s")
            for side in (name, without)
        }
        cells = tuple(
            path
            for side in (name, without)
            for path in record_paths(
                replicates, {**best[0]._asdict(), "scenario": best[1], "strategy": side}
            )
        )
        mine = own[own["strategy"] == name].drop_duplicates(["replicate", "turn"])
        start = f"reuse_{name}"
        for key, side in (("ttft", name), ("ttft_without", without)):
            value = statistics.median_interval(sides[side]).value if sides[side] else None
            found[f"{start}_{key}"] = Value(value, unit="s", digits=4, cells=cells)
        ratio = None
        if all(sides.values()):
            compared = metrics.compare_rows(last, without, name, "ttft_s")
            ratio = compared.interval
            asked = (needed or {}).get(best[0].machine, metrics.Evidence())
            off = any(control_is_off(beside, side) for side in (name, without))
            if off or metrics.why_not_judged(compared.rounds, compared.blocks, asked):
                ratio = statistics.Interval(ratio.value, math.nan, math.nan)
        found[f"{start}_speedup"] = replace(_interval(ratio, "x", 1), cells=cells)
        share = mine["reused_tokens"].sum() / mine["prompt_tokens"].sum()
        found[f"{start}_share"] = Value(100 * share, unit="%", digits=0, cells=cells)
        held = last[last["strategy"] == name]["kv_mib"].max()
        found[f"{start}_held"] = Value(float(held), unit="MiB", digits=2, cells=cells)
    return found


def _interval(found: statistics.Interval | None, unit: str, digits: int) -> Value:
    if found is None:
        return Value(None, unit=unit, digits=digits)
    known = not (math.isnan(found.low) or math.isnan(found.high))
    return Value(found.value, found.as_tuple() if known else None, unit, digits)


#: Column of ``kv_quality`` to unit, factor and digits of its value.
_QUALITY = {
    "kl_nats": ("nats", 1, 6),
    "top1_share": ("%", 100, 1),
    "perplexity": ("", 1, 4),
    "exact_reply_share": ("%", 100, 0),
    "kv_bytes_per_token": ("bytes", 1, 0),
}


def quality_values(
    quality: pd.DataFrame, chosen: Mapping[str, selection.Choice]
) -> dict[str, Value]:
    """What lossy caches cost in quality: ``quality_<strategy>_<column>`` of the scored cells.

    Of several scored models and conversations the one with the most strategies counts.
    """
    best = selection.first(choice.quality for choice in chosen.values())
    if best is None:
        return {"quality_strategies": Value("")}
    scenario = best[1]
    rows = selection.rows_of(quality[quality["kl_nats"].notna()], *best).set_index("strategy")
    names = selection.in_order(rows.index)
    found = {
        "quality_strategies": Value(", ".join(names)),
        "quality_scenario": Value(scenario),
        "quality_machine": Value(best[0].machine),
        "quality_model": Value(best[0].model),
        "quality_perplexity_exact": Value(float(rows["perplexity_exact"].iloc[0]), digits=4),
    }
    for name in names:
        for column, (unit, factor, digits) in _QUALITY.items():
            ends = [rows.loc[name].get(f"{column}_ci_{end}") for end in ("low", "high")]
            known = all(isinstance(end, float) and not math.isnan(end) for end in ends)
            found[f"quality_{name}_{column}"] = Value(
                factor * float(rows.loc[name, column]),
                (factor * ends[0], factor * ends[1]) if known else None,
                unit,
                digits,
            )
    return found


#: Parts of a token's time, as columns of ``kv_profile`` without their unit.
_PARTS = ("weights", "attention", "cache", "other", "outside")


def profile_values(profile: pd.DataFrame) -> dict[str, Value]:
    """Where a token's time goes: ``profile_<strategy>_<part>`` (share of ``..._token``, which is in ms).

    Of several machines and models the first machine's largest model counts: that with the longest token.
    ``profile_<strategy>_roof`` is the share of the read bandwidth's least time.
    """
    rows = profile[profile["token_s"].notna()]
    rows = rows[rows["machine"] == (selection.machines(rows) or [None])[0]]
    if rows.empty:
        return {"profile_strategies": Value("")}
    slowest = rows.loc[rows["token_s"].astype(float).idxmax()]
    group = ["model", "device", "dtype", "scenario"]
    rows = rows[(rows[group] == slowest[group]).all(axis=1)].set_index("strategy")
    names = selection.in_order(rows.index)
    found = {
        "profile_strategies": Value(", ".join(names)),
        "profile_machine": Value(str(slowest["machine"])),
        "profile_model": Value(str(slowest["model"])),
        "profile_tokens": Value(int(slowest["context_tokens"]), digits=0),
    }
    for name in names:
        row, start = rows.loc[name], f"profile_{name}"
        token = float(row["token_s"])
        found[f"{start}_token"] = Value(1e3 * token, unit="ms", digits=1)
        for part in _PARTS:
            share = 100 * float(row[f"{part}_s"]) / token
            found[f"{start}_{part}"] = Value(share, unit="%", digits=1)
        roof = None if pd.isna(row["roof_share"]) else 100 * float(row["roof_share"])
        found[f"{start}_roof"] = Value(roof, unit="%", digits=0)
    return found


def study_sequence(names: Iterable[str]) -> list[str]:
    """Studies in the order of the paper; unknown ones follow, sorted."""
    given = set(names)
    known = [name for name in STUDY_ORDER if name in given]
    return [*known, *sorted(given - set(known))]


def render(
    values: Mapping[str, Value],
    claims: pd.DataFrame,
    language: str,
    study_names: Iterable[str],
    figures: Iterable[str],
    templates: Path,
    outputs: Mapping[str, Path],
    sources: Path = Path("config/claims.yaml"),
    citation: Path = Path("CITATION.cff"),
) -> None:
    """Write ``numbers``, ``section``, ``app_section``, ``appendix`` and ``main`` of one language.

    Parameters
    ----------
    sources:
        The file of claims; what it lists as not tested is printed with its reasons.
    citation:
        Where the authors are named.

    Raises
    ------
    InputError
        A template names a value that does not exist, or says what its words lack.
    """
    sequence = [
        name
        for name in study_sequence(study_names)
        if (templates / "studies" / f"{name}.tex.j2").exists()
    ]
    context = numbers.section_context(
        values,
        claims,
        lang=language,
        figures=figures,
        has_app=bool(sequence),
        labels=looks.labels(looks.LOOKS, language),
        authors=authors(citation),
        untested=documents.read_yaml(sources).get("not_tested", []),
    )
    words = documents.read_yaml(tex.words_file(templates, "main.tex.j2", language))
    context |= {
        "figures_dir": "../figures",
        "studies": sequence,
        "title_text": " ".join(words["title"].replace(r"\\", " ").split()),
    }
    documents.write_text_atomic(outputs["numbers"], tex.numbers_tex(values, language))
    for part in ("section", "app_section", "appendix", "main"):
        documents.write_text_atomic(
            outputs[part], tex.render(templates / f"{part}.tex.j2", context)
        )


def study_tex(
    name: str,
    values: Mapping[str, Value],
    language: str,
    templates: Path,
    part: str = "text",
) -> str:
    """What one study puts into the paper: its paragraph, or with ``part="tables"`` its appendix."""
    context = numbers.section_context(
        {"machines": Value(""), **values}, lang=language, figures=figure_names()
    )
    env = tex.environment(templates, language)
    page = env.from_string(
        r"\BLOCK{ import 'macros.tex.j2' as t with context }"
        rf"\BLOCK{{ include 'studies/{name}.tex.j2' }}"
    )
    return page.render(context | {"part": part})


def authors(citation: Path) -> str:
    """The authors that ``CITATION.cff`` names, in its order."""
    people = documents.read_yaml(citation)["authors"]
    named = [
        one.get("name") or f"{one.get('given-names', '')} {one['family-names']}".strip()
        for one in people
    ]
    return ", ".join(named)


def drawn(files: Iterable[str]) -> list[str]:
    """Names of the figures among some files, which are called ``<name>.<language>.<suffix>``."""
    known = set(figure_names())
    stems = {Path(file).name.split(".")[0] for file in files}
    return sorted(stem for stem in stems if stem in known or stem.startswith(numbers.SYMPOSIUM))
