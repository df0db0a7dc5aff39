"""Who plays on in a block and who rests: each pair by its own precision, and no false alarms for it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from kvbench.analysis import paired
from kvbench.analysis.statistics import Interval
from kvbench.measurement import stopping
from kvbench.measurement.stopping import Rules

#: Rounds before a ratio of no spread at all counts as known.
SOONEST = paired.FEWEST_ROUNDS + paired.CONFIRMING_ROUNDS

RULES = Rules(
    reference="dynamic",
    control="control",
    turns=1,
    once=(),
    rounds={},
    precision=0.03,
    budget_s=1e6,
    min_rounds=10,
    max_rounds=120,
)
LIVE = ["dynamic", "control", "static", "none"]


def entry(number: int, seconds: dict[str, float], disturbed: tuple[str, ...] = ()) -> dict:
    """A round as the journal keeps it."""
    slots = [
        {"strategy": name, "e2e_s": value, "disturbed": name in disturbed}
        for name, value in seconds.items()
    ]
    wall = sum(seconds.values())
    return {"round": number, "order": list(seconds), "slots": slots, "wall_s": wall}


def played(rules: Rules, seconds, live=LIVE, disturbed=lambda name, round: False):
    """All rounds of a block in which a cell takes ``seconds(name, round)``, and why it ended."""
    entries = []
    while True:
        members, stop = stopping.next_round(rules, entries, live)
        if stop:
            return entries, stop
        number = len(entries)
        took = {name: seconds(name, number) for name in members}
        entries.append(entry(number, took, tuple(n for n in took if disturbed(n, number))))


def rounds_of(entries, name):
    return [found["round"] for found in entries if name in found["order"]]


def wobbling(share: float):
    """Equal cells, of which ``static`` differs from round to round by a share, up and down."""
    return lambda name, round: 1 + (share * (-1) ** round if name == "static" else 0)


# ------------------------------------------------------------------ resting


def test_who_is_known_rests_while_the_others_go_on():
    entries, stop = played(RULES, wobbling(0.2))
    assert stop == "rounds"
    assert rounds_of(entries, "none") == list(range(SOONEST))
    assert rounds_of(entries, "static") == list(range(RULES.max_rounds))


def test_reference_and_control_never_rest():
    entries, _ = played(RULES, wobbling(0.2))
    for name in ("dynamic", "control"):
        assert rounds_of(entries, name) == list(range(RULES.max_rounds))


def test_a_block_ends_when_the_last_one_is_known():
    entries, stop = played(RULES, wobbling(0.06))
    assert stop == "precision"
    logs = stopping.log_ratios(RULES, entries, LIVE)
    assert paired.reached([logs["static"]], RULES.precision)
    assert not paired.reached([logs["static"][:-1]], RULES.precision)
    assert len(entries) > len(rounds_of(entries, "none")) == SOONEST


def test_nobody_rests_before_the_fewest_rounds():
    entries, _ = played(replace(RULES, min_rounds=25), wobbling(0.2))
    assert len(rounds_of(entries, "none")) == 25


def test_a_disturbed_round_is_played_again():
    rules = replace(RULES, max_rounds=60)
    entries, _ = played(
        rules, wobbling(0.2), disturbed=lambda name, round: name == "none" and round < 4
    )
    assert rounds_of(entries, "none") == list(range(SOONEST + 4))


def test_the_record_says_who_rests_from_which_round():
    entries, _ = played(RULES, wobbling(0.2))
    assert stopping.rested(RULES, entries, LIVE) == {"none": SOONEST}


def test_who_took_part_to_the_end_did_not_rest():
    entries, _ = played(replace(RULES, max_rounds=12), wobbling(0.2))
    assert stopping.rested(RULES, entries, LIVE) == {}


def test_every_prefix_of_the_rounds_decides_as_it_did():
    entries, _ = played(RULES, wobbling(0.06))
    for count, following in enumerate(entries):
        members, stop = stopping.next_round(RULES, entries[:count], LIVE)
        assert (sorted(members), stop) == (sorted(following["order"]), None)


def test_a_cell_that_fell_out_keeps_nobody_waiting():
    entries, stop = played(RULES, wobbling(0.2), live=["dynamic", "control", "none"])
    assert (stop, len(entries)) == ("precision", SOONEST)


def test_without_any_living_cell_there_is_no_round():
    assert stopping.next_round(RULES, [], []) == ([], "rounds")


# ------------------------------------------------------------------ few rounds for who takes long


def slow(name: str, round: int) -> float:
    """``none`` takes eight times as long; ``static`` is never known."""
    return {"none": 8.0, "static": 1 + 0.3 * (-1) ** round}.get(name, 1.0)


FEW = replace(RULES, rounds={"none": 10}, budget_s=240.0)


def test_an_expensive_cell_has_the_rounds_it_was_given():
    entries, stop = played(FEW, slow)
    assert stop == "budget"
    assert len(rounds_of(entries, "none")) == 10
    assert len(rounds_of(entries, "static")) > 40


def test_few_rounds_are_spread_over_the_whole_time():
    entries, _ = played(FEW, slow)
    ends = np.cumsum([found["wall_s"] for found in entries])
    gaps = [later - earlier for earlier, later in pairwise(ends[rounds_of(entries, "none")])]
    assert ends[rounds_of(entries, "none")[-1]] > 0.75 * FEW.budget_s
    assert max(gaps) < 2 * FEW.budget_s / 10


def test_few_rounds_are_made_up_when_all_the_others_are_known():
    rules = replace(FEW, budget_s=1e6)
    entries, stop = played(rules, lambda name, round: 8.0 if name == "none" else 1.0)
    assert stop == "precision"
    assert len(rounds_of(entries, "none")) == 10
    assert set(rounds_of(entries, "static")) == {*range(SOONEST), *rounds_of(entries, "none")}


def test_who_has_few_rounds_meets_in_them_those_that_rest_already():
    live = [*LIVE, "paged"]
    entries, _ = played(FEW, slow, live=live)
    few = rounds_of(entries, "none")
    # `paged` is known soon and rests, but is compared with `none` as well.
    assert len(rounds_of(entries, "paged")) < len(rounds_of(entries, "static"))
    assert set(few) <= set(rounds_of(entries, "paged"))
    assert len(few) == 10


def test_a_disturbed_one_of_few_rounds_is_played_again():
    first = {"seen": False}

    def disturbed(name: str, round: int) -> bool:
        hit = name == "none" and not first["seen"]
        first["seen"] = first["seen"] or name == "none"
        return hit

    entries, _ = played(FEW, slow, disturbed=disturbed)
    assert len(rounds_of(entries, "none")) == 11


def test_who_does_not_fit_into_the_rest_of_the_budget_lets_the_others_use_it():
    rules = replace(FEW, rounds={"none": 40})
    entries, _ = played(rules, slow)
    assert sum(found["wall_s"] for found in entries) > FEW.budget_s - 4
    assert "none" not in entries[-1]["order"]


def test_a_block_of_nobody_but_cells_of_few_rounds_ends_with_its_budget():
    rules = replace(FEW, reference=None, control=None, budget_s=20.0)
    entries, stop = played(rules, slow, live=["none"])
    assert (len(entries), stop) == (2, "budget")


def test_the_time_of_cells_measured_once_is_not_counted():
    rules = replace(RULES, once=("none",), budget_s=30.0)
    # As a block keeps it: their turns are taken out of the round's time.
    first = entry(0, {name: slow(name, 0) for name in LIVE})
    first["wall_s"] -= 8.0
    members, stop = stopping.next_round(rules, [first], LIVE)
    assert (members, stop) == (["dynamic", "control", "static"], None)
    _, expected = stopping._seconds(rules, [first])
    assert expected(members) == pytest.approx(3.3)


# ------------------------------------------------------------------ the control


def test_a_block_goes_on_while_its_control_differs():
    entries, stop = played(RULES, lambda name, round: 1.1 if name == "control" else 1.0)
    assert (stop, len(entries)) == ("rounds", RULES.max_rounds)
    assert set(entries[-1]["order"]) == {"dynamic", "control"}


@pytest.mark.parametrize(("ratio", "stop"), [(1.02, "precision"), (1.08, "rounds")])
def test_a_control_within_the_precision_does_not_hold_a_block_up(ratio, stop):
    _, found = played(RULES, lambda name, round: ratio if name == "control" else 1.0)
    assert found == stop


# ------------------------------------------------------------------ false alarms


#: Two standard errors of a share of 5 % among the comparisons of independent blocks.
BLOCKS = 1500
MONTE_CARLO = 2 * math.sqrt(0.05 * 0.95 / BLOCKS)


@pytest.fixture(scope="module")
def blocks():
    """Log times of blocks of four equal cells, their rounds as they end, by cell.

    The speed wanders as it was measured; one cell in two is noisier, so that some rest early.
    """
    generator = np.random.default_rng(31)
    spread = np.array([0.05, 0.05, 0.02, 0.09])
    shape = (BLOCKS, RULES.max_rounds)
    drift = np.empty(shape)
    drift[:, 0] = generator.standard_normal(BLOCKS)
    for i in range(1, RULES.max_rounds):
        fresh = generator.standard_normal(BLOCKS)
        drift[:, i] = 0.7 * drift[:, i - 1] + math.sqrt(1 - 0.49) * fresh
    own = spread[:, None, None] * generator.standard_normal((4, *shape))
    hit = generator.random((4, *shape)) < 0.03
    own += hit * generator.exponential(0.3, (4, *shape))
    # And what each process differs by from the others, to its end: 0.9 % were measured.
    own += 0.009 * generator.standard_normal((4, BLOCKS, 1))
    return 0.15 * drift + own


def stopped(block, precision: float) -> dict[str, np.ndarray]:
    """Log times of each cell as far as it took part, when the rule is asked after every round."""
    logs = dict(zip(LIVE, block, strict=True))
    ends = {}
    for name in ("static", "none"):
        series = logs[name] - logs["dynamic"]
        count = next(
            (n for n in range(SOONEST, len(series)) if paired.reached([series[:n]], precision)),
            len(series),
        )
        ends[name] = count
    last = max(ends.values())
    return {name: series[: ends.get(name, last)] for name, series in logs.items()}


@pytest.fixture(scope="module")
def ended(blocks):
    """Precision to every block as far as it was measured; made once."""
    return cache(lambda precision: [stopped(b, precision) for b in np.moveaxis(blocks, 1, 0)])


def alarms(ended, precision: float, above: str, below: str, controlled: bool = False) -> float:
    found = judged = 0
    for logs in ended(precision):
        if controlled:
            control = paired.ratio([logs["control"] - logs["dynamic"]]).interval
            if paired.off(control, precision):
                continue
        count = min(len(logs[above]), len(logs[below]))
        judged += 1
        found += paired.differs(paired.ratio([logs[above][:count] - logs[below][:count]]))
    return found / judged


@pytest.mark.parametrize("precision", [0.03, 0.05])
@pytest.mark.parametrize("name", ["static", "none"])
def test_resting_raises_no_false_alarms_against_the_reference(ended, name, precision):
    assert alarms(ended, precision, name, "dynamic") <= 0.05 + MONTE_CARLO


def test_resting_raises_no_false_alarms_between_two_that_rest_at_their_own_times(ended):
    assert alarms(ended, 0.05, "static", "none") <= 0.05 + MONTE_CARLO


def test_judging_the_control_by_its_interval_raises_no_false_alarms(ended):
    assert alarms(ended, 0.05, "static", "dynamic", controlled=True) <= 0.05 + MONTE_CARLO


def test_a_sound_block_is_hardly_ever_voided_by_its_control(blocks):
    voided = np.mean(
        [
            paired.off(paired.ratio([block[1, :20] - block[0, :20]]).interval, 0.03)
            for block in np.moveaxis(blocks, 1, 0)
        ]
    )
    # The value beyond the precision, and an interval of 95 % that excludes 1.
    assert voided <= 0.05


def test_a_control_that_is_systematically_off_voids_its_block(blocks):
    block = blocks[:, 0]
    control = paired.ratio([block[1] - block[0] + math.log(1.1)]).interval
    assert paired.off(control, 0.03)


@pytest.mark.parametrize(
    ("value", "low", "high", "void"),
    [
        (1.04, 1.01, 1.07, True),
        (0.96, 0.93, 0.99, True),
        # Beyond the precision, but perhaps by chance.
        (1.04, 0.99, 1.09, False),
        (1.04, math.nan, math.nan, False),
        # Surely another, but by less than the precision.
        (1.02, 1.01, 1.03, False),
    ],
)
def test_a_control_voids_by_its_value_where_chance_does_not_explain_it(value, low, high, void):
    assert paired.off(Interval(value, low, high), 0.03) is void


def off_by(share: float, until: int = 10**6):
    """A control that takes a share longer, in the first rounds."""
    return lambda name, round: 1 + (share if name == "control" and round < until else 0)


def test_a_block_whose_control_is_off_at_the_end_of_its_budget_is_measured_further():
    # Four cells of one second each; `static` never gets known, so that the budget is what ends it.
    rules = replace(RULES, budget_s=160.5, max_rounds=1000)
    calm, stop = played(rules, wobbling(0.2))
    assert stop == "budget"
    spent = sum(found["wall_s"] for found in calm)
    assert spent <= 160.5

    def both(name, round):
        return max(wobbling(0.2)(name, round), off_by(0.05)(name, round))

    entries, stop = played(rules, both)
    assert stop == "budget"
    further = sum(found["wall_s"] for found in entries)
    assert 160.5 < further <= 160.5 * (1 + stopping.FURTHER)


def test_a_control_that_comes_right_again_ends_the_further_measuring():
    rules = replace(RULES, budget_s=160.5, max_rounds=1000, precision=0.004)

    def late(name, round):
        return off_by(0.05, until=2)(name, round) + (0.2 * (-1) ** round if name == "static" else 0)

    entries, _ = played(rules, late)
    # Two of forty rounds are trimmed away: nothing is left of them.
    assert sum(found["wall_s"] for found in entries) <= 160.5
