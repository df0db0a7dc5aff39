"""Two records or two runs held against each other: what is judged, what is refused, how it ends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kvbench import records
from kvbench.analysis import comparing
from kvbench.analysis.paired import Paired
from kvbench.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 30


def seconds(factor: float = 1.0, *, seed: int = 0, spread: float = 0.02) -> list[list[float]]:
    """One turn's rounds under a drift that all cells of a block share."""
    drift = np.exp(0.2 * np.sin(np.arange(ROUNDS) / 4))
    noise = np.exp(spread * np.random.default_rng(seed).standard_normal(ROUNDS))
    return [(factor * drift * noise).tolist()]


@pytest.fixture
def cell(make_record):
    def cell(strategy: str, factor: float = 1.0, seed: int = 0, **fields: object) -> dict:
        fields = {"block": "exp/cpu/tiny/talk/r1"} | fields
        return make_record(strategy, seconds(factor, seed=seed), **fields)

    return cell


def test_two_cells_of_a_block_get_a_paired_verdict(cell):
    found = comparing.records(cell("dynamic"), cell("static", 1.05, seed=1))
    assert found.verdict == comparing.SLOWER
    assert found.interval.low < 1.05 < found.interval.high
    faster = comparing.records(cell("static", 1.05, seed=1), cell("dynamic"))
    assert faster.verdict == comparing.FASTER


def test_equal_cells_do_not_differ_and_it_says_what_it_would_have_found(cell):
    found = comparing.records(cell("dynamic"), cell("static", seed=1))
    assert found.verdict == comparing.NO_DIFFERENCE
    assert "would have found" in found.why


def test_cells_that_took_no_turns_are_not_judged(cell):
    for other in (
        cell("static", 2.0, block=None),
        cell("static", 2.0, block="exp/cpu/tiny/talk/r2"),
    ):
        found = comparing.records(cell("dynamic"), other)
        assert found.verdict == comparing.NO_VERDICT
        assert math.isnan(found.interval.low)
        assert "side by side" in found.why


def test_a_reference_that_differs_from_itself_leaves_nothing_to_conclude(cell):
    reference, static = cell("dynamic"), cell("static", 1.2, seed=1)
    sound, off = cell("control", seed=2), cell("control", 1.2, seed=2)
    assert comparing.records(reference, static, reference, sound).verdict == comparing.SLOWER
    found = comparing.records(reference, static, reference, off)
    assert found.verdict == comparing.NO_VERDICT
    assert "differs from itself" in found.why
    whole = run(cell, dynamic=1.0, static=1.0, control=1.0)
    (found,) = (
        one for one in comparing.runs(whole, [reference, static, off]) if "static" in one.what
    )
    assert found.verdict == comparing.NO_VERDICT
    assert "differs from itself" in found.why


def test_two_runs_of_one_block_are_not_taken_for_one(cell):
    other = cell("static", 2.0)
    other["block"]["probe_s"] = [0.1]
    assert comparing.records(cell("dynamic"), other).verdict == comparing.NO_VERDICT


def test_few_rounds_are_no_evidence(make_record):
    sides = [
        make_record(name, [[factor, factor, factor]], block="b")
        for name, factor in (("dynamic", 1.0), ("static", 3.0))
    ]
    found = comparing.records(*sides)
    assert found.verdict == comparing.NO_VERDICT
    assert "not enough rounds" in found.why


@pytest.mark.parametrize("key", ["model", "scenario", "threads", "dtype"])
def test_different_cells_are_refused_with_the_key(cell, key):
    other = cell(
        "static", **{key: 7 if key == "threads" else "bfloat16" if key == "dtype" else "x"}
    )
    with pytest.raises(InputError, match=rf"cell\.{key}"):
        comparing.records(cell("dynamic"), other)


def test_a_cell_that_failed_is_refused_with_its_reason(cell, make_record):
    failed = make_record("static", status="failed", reason="it broke")
    with pytest.raises(InputError, match="it broke"):
        comparing.records(cell("dynamic"), failed)


def run(cell, **factors: float) -> list[dict]:
    return [
        cell(name, factor, seed=number) for number, (name, factor) in enumerate(factors.items())
    ]


def test_runs_are_judged_by_the_ratio_to_their_own_reference(cell):
    # The second machine is twice as slow throughout, and its static cache 10 % slower beyond that.
    first = run(cell, dynamic=1.0, static=1.0)
    second = run(cell, dynamic=2.0, static=2.2)
    found = {result.what.split()[2]: result for result in comparing.runs(first, second)}
    assert found["dynamic"].verdict == comparing.NO_VERDICT
    assert found["dynamic"].ratio == pytest.approx(2.0, rel=0.02)
    assert found["static"].verdict == comparing.SLOWER
    assert found["static"].interval.low < 1.1 < found["static"].interval.high


def test_a_run_without_the_reference_is_not_judged(cell):
    found = comparing.runs(run(cell, static=1.0), run(cell, static=2.0))
    assert found[0].verdict == comparing.NO_VERDICT
    assert "dynamic" in found[0].why


def test_runs_with_other_threads_are_not_judged(cell):
    first = run(cell, dynamic=1.0, static=1.0)
    second = [
        cell("dynamic", 1.0, threads=8),
        cell("static", 2.0, threads=8),
    ]
    assert {result.verdict for result in comparing.runs(first, second)} == {comparing.NO_VERDICT}


def test_runs_without_a_common_cell_are_refused(cell):
    with pytest.raises(InputError, match="no cell in common"):
        comparing.runs(run(cell, dynamic=1.0), run(cell, static=1.0))


def test_a_quotient_carries_both_errors():
    found = comparing.quotient(Paired(1.2, 0.03, 20.0, 21, 1), Paired(1.0, 0.04, 10.0, 11, 1))
    assert found.value == pytest.approx(1.2)
    assert found.error == pytest.approx(0.05)
    # Welch: (9 + 16)^2 / (81/20 + 256/10).
    assert found.freedom == pytest.approx(625 / (81 / 20 + 256 / 10))


def test_false_alarms_of_many_comparisons_are_held_together():
    def result(p: float) -> comparing.Result:
        interval = comparing.Interval(1.1, 1.01, 1.2)
        return comparing.Result("x", 1.1, interval, comparing.SLOWER, "", p)

    assert len(comparing.slower([result(0.04)])) == 1
    assert comparing.slower([result(0.04)] * 10) == []
    assert len(comparing.slower([result(0.0001), *[result(0.04)] * 9])) == 1


@pytest.fixture
def compare(tmp_path):
    def compare(*names: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "kvbench", "compare", *map(str, names)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "workflow"), "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    return compare


@pytest.fixture
def keep(tmp_path):
    """Write records as a run would have them."""

    def keep(folder: str, *cells: dict) -> Path:
        for record in cells:
            place = f"cells/kv/cpu/tiny/talk/{record['cell']['strategy']}/r1.json"
            path = tmp_path / folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            records.write(path, record)
        return tmp_path / folder

    return keep


def test_the_exit_status_tells_faster_slower_and_unknown(cell, keep, compare):
    folder = keep(
        "run", cell("dynamic"), cell("static", 1.2, seed=1), cell("none", 3.0, block=None)
    )
    path = {name: next(folder.rglob(f"{name}/r1.json")) for name in ("dynamic", "static", "none")}
    assert compare(path["dynamic"], path["static"]).returncode == 1
    assert compare(path["static"], path["dynamic"]).returncode == 0
    assert compare(path["dynamic"], path["none"]).returncode == 3


def test_two_records_are_held_against_the_control_beside_them(cell, keep, compare):
    folder = keep("run", cell("dynamic"), cell("static", 1.2, seed=1), cell("control", 1.3, seed=2))
    done = compare(*(next(folder.rglob(f"{name}/r1.json")) for name in ("dynamic", "static")))
    assert done.returncode == 3
    assert "differs from itself" in done.stdout


def test_two_runs_can_be_compared_by_folder_and_by_recorded_name(cell, keep, compare):
    keep("first", *run(cell, dynamic=1.0, static=1.0))
    keep("results/recorded/lab", *run(cell, dynamic=1.0, static=1.3))
    done = compare("first", "lab")
    assert done.returncode == 1, done.stderr
    assert "slower" in done.stdout


def test_what_is_not_there_is_refused_in_one_line(compare, keep, cell):
    keep("results/recorded/lab", cell("dynamic"))
    done = compare("lab", "moon")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "moon" in done.stderr and "lab" in done.stderr
