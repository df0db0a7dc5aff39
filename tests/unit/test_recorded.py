"""The committed record: what it says must be possible, and nothing in it is judged without evidence."""

from __future__ import annotations

from pathlib import Path

import pytest
from kvbench import studies
from kvbench.analysis import claims, instrument, tables
from kvbench.records import gathering

ROOT = Path(__file__).resolve().parents[2]
MACHINES = {path.name: path for path in gathering.list_machines(ROOT / "results/recorded", ["all"])}


@pytest.fixture(scope="module")
def kv():
    return tables.kv_tables(gathering.kv_records([], MACHINES))


@pytest.fixture(scope="module")
def apps():
    found = {}
    for name in studies.names():
        study = studies.get(name)
        records = gathering.app_records(name, [], MACHINES)
        found[name] = tables.app_table(study.columns, records, study.aggregate)
    return found


#: Studies whose table says how fast its hits can make it at most.
LIMITED = [name for name in studies.names() if "speedup_limit" in studies.get(name).columns]


@pytest.mark.parametrize("name", LIMITED)
def test_no_speed_up_exceeds_what_its_hits_allow(apps, name):
    table = apps[name]
    known = table[table["speedup_ci_low"].notna() & table["speedup_limit"].notna()]
    beyond = known[known["speedup_ci_low"].astype(float) > known["speedup_limit"].astype(float)]
    assert beyond["cell"].tolist() == []


def test_what_ran_one_after_the_other_has_ratios_and_no_verdict(kv):
    _, summary = kv
    unpaired = summary[(summary["rounds"] == 0) & (summary["status"] == "ok")]
    assert unpaired["not_judged"].notna().all()
    others = unpaired[unpaired["strategy"] != "dynamic"]
    assert others["speedup_vs_dynamic_ci_low"].isna().all()


def test_no_claim_on_a_ratio_of_times_is_judged_on_too_few_rounds(kv, apps):
    samples, summary = kv
    quality = tables.quality_table(gathering.kv_records([], MACHINES), summary)
    table = instrument.evaluate(gathering.aa_records([], MACHINES))
    needed = {machine: instrument.evidence(table, machine) for machine in MACHINES}
    rows = claims.evaluate(
        claims.load(ROOT / "config/claims.yaml"),
        samples,
        summary,
        {**apps, "kv_quality": quality},
        needed,
    )
    compared = [row for row in rows if row["rounds"] is not None and row["value"] is not None]
    assert compared
    for row in compared:
        if row["rounds"] < needed[row["machine"]].rounds:
            assert row["verdict"] == "not enough rounds", row["id"]
        assert (row["ci_low"] is None) or row["rounds"] > 1, row["id"]
