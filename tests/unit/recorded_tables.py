"""All tables of the committed records, made once per process by the functions that the rules call."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
from kvbench import studies
from kvbench.analysis import capacity, claims, instrument, tables
from kvbench.records import gathering

ROOT = Path(__file__).resolve().parents[2]


def machines() -> dict[str, Path]:
    """Recorded machines by name; the newest record is found, not named here."""
    folders = gathering.list_machines(ROOT / "results" / "recorded", ["all"])
    return {path.name: path for path in folders}


@cache
def study_names() -> tuple[str, ...]:
    """Studies that any recorded machine has records of."""
    return tuple(gathering.studies_of(machines().values()))


@cache
def all_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Table by name, written to a folder and read back as the next stage reads them."""
    recorded = machines()
    kv = gathering.kv_records([], recorded)
    aa_test = instrument.evaluate(gathering.aa_records([], recorded))
    needed = {machine: instrument.evidence(aa_test, machine) for machine in kv}
    samples, summary = tables.kv_tables(kv, gathering.ceilings([], recorded), needed)
    made: dict[str, Any] = {
        "kv_samples": samples,
        "kv_summary": summary,
        "kv_rounds": tables.round_table(kv),
        "kv_replies": tables.reply_table(kv),
        "kv_quality": tables.quality_table(kv, summary),
        "kv_profile": tables.profile_table(kv, gathering.ceilings([], recorded)),
        "aa_test": aa_test,
        "capacity": pd.DataFrame(capacity.grid(["embedded"], None), columns=list(capacity.COLUMNS)),
    }
    for name in study_names():
        study = studies.get(name)
        found = gathering.app_records(name, [], recorded)
        made[f"app_{name}"] = tables.app_table(study.columns, found, study.aggregate)
    read = {}
    for name, table in made.items():
        gathering.write_csv(table, folder / f"{name}.csv")
        read[name] = gathering.read_csv(folder / f"{name}.csv")
    others = {name: read[f"app_{name}"] for name in study_names()}
    rows = claims.evaluate(
        claims.load(ROOT / "config" / "claims.yaml"),
        read["kv_samples"],
        read["kv_summary"],
        {**others, "kv_quality": read["kv_quality"]},
        needed,
    )
    claims.write(folder, rows)
    read["claims"] = gathering.read_csv(folder / "claims.csv")
    loss = ROOT / "resources" / "embedded-llama" / "training" / "loss.csv"
    read["training_loss"] = gathering.read_csv(loss)
    return read
