"""What the benches say of what they measured: their verdicts, from numbers that are given."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def bench(name: str) -> ModuleType:
    """A bench as a module, found the way it finds its neighbours when it is run as a script."""
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def bounds(_beside_each_other):
    import bounds

    return bounds


@pytest.fixture
def compare(_beside_each_other):
    return bench("others/compare")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.995, 1.005, "met"),
        (0.99, 1.01, "met"),
        (0.98, 1.005, "cannot tell"),
        (0.98, 1.02, "cannot tell"),
        (1.02, 1.03, "not met"),
        (0.90, 0.98, "not met"),
        (float("nan"), float("nan"), "cannot tell"),
    ],
)
def test_a_bound_is_met_only_by_the_whole_interval(bounds, low, high, verdict):
    assert bounds.judge(low, high, 0.99, 1.01) == verdict


def generations(compare, slower: float, rounds: int = 20, count: int = 5, disturbed: bool = False):
    """Rounds in which optimum-benchmark takes ``slower`` times as long as the two that are equal."""
    random = np.random.default_rng(5)
    played = []
    for _ in range(count):
        entries = []
        for _ in range(rounds):
            weather = 0.7 * random.lognormal(0, 0.15)
            entry = {}
            for name in compare.SUBJECTS:
                seconds = weather * random.lognormal(0, 0.01)
                seconds *= slower if name == compare.OPTIMUM else 1.0
                times = {"e2e_s": seconds, "collector_s": 0.0}
                times["disturbed"] = disturbed and name == compare.OPTIMUM
                if name not in (compare.BARE, compare.STAMPED):
                    times |= {"prefill_s": seconds / 20, "decode_s": seconds * 19 / 20}
                if name == compare.OPTIMUM:
                    times["wall_s"] = seconds
                entry[name] = times
            entries.append(entry)
        played.append(compare.Played({}, entries))
    return played


def test_subjects_that_are_equal_agree_whatever_the_weather(compare):
    assert compare.report(generations(compare, 1.0))[-1].startswith("bound: met: ")


def test_a_subject_that_is_slower_is_named(compare):
    last = compare.report(generations(compare, 1.1))[-1]
    assert last.startswith("bound: not met: ")
    assert "differ: optimum-benchmark" in last and "bare" not in last


def test_a_difference_that_the_stamps_make_is_told_as_explained(compare):
    played = generations(compare, 1.1)
    explained = "over the bare loop with its stamps"
    (differs,) = [line for line in compare.report(played) if explained in line]
    assert differs.endswith("differ")
    for one in played:
        for entry in one.rounds:
            entry[compare.STAMPED] = {
                **entry[compare.STAMPED],
                "e2e_s": entry[compare.OPTIMUM]["e2e_s"],
            }
    (agrees,) = [line for line in compare.report(played) if explained in line]
    assert agrees.endswith("agree within 3 %")


def test_a_few_rounds_are_not_enough(compare):
    last = compare.report(generations(compare, 1.0, rounds=5, count=1))[-1]
    assert last.startswith("bound: cannot tell: ") and "not enough" in last


def test_a_subject_without_an_undisturbed_round_leaves_the_verdict_open(compare):
    last = compare.report(generations(compare, 1.0, disturbed=True))[-1]
    assert last.startswith("bound: cannot tell: ")


@pytest.mark.parametrize(
    ("spread", "verdict"), [(0.5, "met"), (1.0, "cannot tell"), (2.0, "not met")]
)
def test_binding_is_judged_by_the_generations(spread, verdict):
    placement = bench("placement")
    random = np.random.default_rng(3)
    arms = {
        name: placement.Arm(spreads=[factor * random.lognormal(0, 0.1) for _ in range(8)])
        for name, factor in ((placement.AS_PLACED, 0.1), (placement.BOUND, 0.1 * spread))
    }
    assert placement.verdict(arms).startswith(f"bound: {verdict}: ")


@pytest.mark.skipif(
    not hasattr(os, "sched_setscheduler") or os.geteuid() != 0, reason="needs Linux and root"
)
def test_the_neighbour_is_gone_when_the_measurement_fails():
    placement = bench("placement")
    last = max(os.sched_getaffinity(0))

    def neighbours() -> list[str]:
        lines = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        return [pid for pid in lines if "SCHED_FIFO" in Path(f"/proc/{pid}/cmdline").read_text()]

    try:
        with pytest.raises(ZeroDivisionError), placement.neighbour(0.01, last):
            assert len(neighbours()) == 1
            raise ZeroDivisionError
    except placement.NotAllowed as refusal:
        pytest.skip(str(refusal))
    assert neighbours() == []


def test_a_cells_share_of_its_block_is_what_is_judged(capsys):
    cell_cost = bench("cell_cost")

    def verdict(two: float, four: float) -> str:
        found = {2: [two + i / 100 for i in range(6)], 4: [four + i / 100 for i in range(6)]}
        cell_cost.report(found, [four + 2.0] * 6, [4] * 20)
        return capsys.readouterr().out.splitlines()[-2]

    assert verdict(2.0, 2.2).startswith("bound: not met: ")
    assert verdict(0.9, 1.1).startswith("bound: met: ")


@pytest.mark.parametrize(("blocks", "verdict"), [(2, "not met"), (40, "met")])
def test_all_cells_of_a_run_share_the_start_of_its_first_block(capsys, blocks, verdict):
    bench("cell_cost").report({2: [0.5] * 6, 4: [0.8] * 6}, [2.8] * 6, [4] * blocks)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"bound: {verdict}: ")


def test_the_harness_is_judged_by_undisturbed_rounds_alone(capsys):
    overhead = bench("harness_overhead")

    def rounds(count: int, disturbed: bool) -> list[list[dict[str, object]]]:
        return [
            [
                {"strategy": overhead.HARNESS, "e2e_s": 0.7 + i / 1e4, "disturbed": disturbed},
                {"strategy": overhead.BARE, "e2e_s": 0.7 + i / 1e4, "disturbed": False},
            ]
            for i in range(count)
        ]

    overhead.report(rounds(20, False), 2)
    assert capsys.readouterr().out.splitlines()[-1].startswith("bound: met: ")
    overhead.report(rounds(20, True) + rounds(5, False), 2)
    assert capsys.readouterr().out.splitlines()[-1].startswith("bound: cannot tell: ")
