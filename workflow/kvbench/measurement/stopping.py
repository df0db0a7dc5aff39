"""Who takes part in the next round of a block, and when no further round is needed.

Everything here follows from the rounds so far, so that a block that is taken up again decides as it
would have without the interruption. Each pair has one stopping rule of its own: a cell rests as soon
as its ratio to the reference is known (:func:`kvbench.analysis.paired.reached`), whatever the others
are about. A block that measured everybody until the last one was known would spend most of its
budget on what it knows already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbench.analysis import paired

#: Why no further round was made.
PRECISION, BUDGET, ROUNDS = "precision", "budget", "rounds"

#: Share of its budget by which a block is measured further whose control is off when the budget ends.
FURTHER = 0.25

#: A round as the journal keeps it.
Round = Mapping[str, Any]


@dataclass(frozen=True)
class Rules:
    """What a plan says of when to stop.

    Attributes
    ----------
    reference, control:
        The cell that all others are compared with, and its second run; both go on to the end.
    turns:
        Turns of a conversation.
    once:
        Cells that take part in the first round only; their time is not counted.
    rounds:
        Cell to the rounds that it shall have, spread evenly over the block's time; in them it meets
        all the others.
    precision, budget_s, min_rounds, max_rounds:
        As in :class:`kvbench.inputs.configuration.KvBlock`.
    """

    reference: str | None
    control: str | None
    turns: int
    once: Collection[str]
    rounds: Mapping[str, int]
    precision: float
    budget_s: float
    min_rounds: int
    max_rounds: int

    @classmethod
    def of(cls, plan: Mapping[str, Any], turns: int, parts: int = 1) -> Rules:
        """The rules of a planned block that is measured in some parts, which share its budget."""
        return cls(
            turns=turns,
            budget_s=plan["budget_s"] / parts,
            **{
                key: plan[key]
                for key in (
                    *("reference", "control", "once", "rounds"),
                    *("precision", "min_rounds", "max_rounds"),
                )
            },
        )


def log_ratios(
    rules: Rules, entries: Sequence[Round], names: Collection[str]
) -> dict[str, list[float]]:
    """For each cell its log ratios to the reference, over rounds in which neither was disturbed.

    Empty where the reference is not among the names.
    """
    reference = rules.reference
    if reference not in names:
        return {}
    found: dict[str, list[float]] = {name: [] for name in names if name != reference}
    for entry in entries:
        seconds: dict[str, list[float]] = {}
        for slot in entry["slots"]:
            if not slot["disturbed"]:
                seconds.setdefault(slot["strategy"], []).append(slot["e2e_s"])
        whole = {name for name, times in seconds.items() if len(times) == rules.turns}
        for name, logs in found.items():
            if name in whole and reference in whole:
                logs.append(paired.log_ratio(seconds[name], seconds[reference]))
    return found


def next_round(
    rules: Rules, entries: Sequence[Round], live: Sequence[str]
) -> tuple[list[str], str | None]:
    """Who takes part in the next round.

    Parameters
    ----------
    rules:
        When to stop.
    entries:
        The rounds so far of these cells.
    live:
        The cells that are still able to go on.

    Returns
    -------
    tuple
        The cells, in the order of ``live``, and None; or no cell, and why no round is needed:
        ``precision``, ``budget`` or ``rounds``.
    """
    if not live:
        return [], ROUNDS
    if not entries:
        return list(live), None
    logs = log_ratios(rules, entries, live)
    open_ = _open(rules, entries, live, logs)
    if len(entries) >= rules.min_rounds and not open_ and _sound(rules, logs):
        return [], PRECISION if logs else ROUNDS
    if len(entries) >= rules.max_rounds:
        return [], ROUNDS
    always = (rules.reference, rules.control)
    members = [
        name
        for name in live
        if name in always or (name in open_ and _due(rules, entries, name, open_, logs))
    ] or [name for name in live if name not in rules.once]
    few = rules.rounds.keys() & set(members)
    # Who has few rounds meets everybody in them, those at rest too: it is compared with them as well.
    everybody = [n for n in live if n in few or n not in (*rules.once, *rules.rounds)]
    spent, expected = _seconds(rules, entries)
    further = FURTHER if _control_is_off(rules, logs) else 0.0
    left = rules.budget_s * (1 + further) - spent
    if few and expected(everybody) <= left:
        return everybody, None
    members = [name for name in members if name not in few]
    waiting = open_ <= rules.rounds.keys() if open_ else not members
    if expected(members) > left or waiting:
        return [], BUDGET
    return members, None


def settled(rules: Rules, entries: Sequence[Round], live: Sequence[str]) -> set[str]:
    """The cells that rest: their ratio is known, or they have had their rounds.

    Rounds that one of them has beside a cell of few rounds may make it go on for a while.
    """
    resting = set(live) - {rules.reference, rules.control, *rules.once}
    return resting - _open(rules, entries, live, log_ratios(rules, entries, live))


def _open(
    rules: Rules, entries: Sequence[Round], live: Sequence[str], logs: Mapping[str, Sequence[float]]
) -> set[str]:
    """The cells that have not got what they are in the block for; control and reference apart."""
    found = set()
    for name in live:
        if name in rules.once or name in (rules.reference, rules.control):
            continue
        mine = logs.get(name)
        count = _played(entries, name) if mine is None else len(mine)
        known = mine is not None and paired.reached([mine], rules.precision)
        if name in rules.rounds:
            done = known or count >= rules.rounds[name]
        else:
            done = count >= rules.min_rounds and (known or mine is None)
        if not done:
            found.add(name)
    return found


def _played(entries: Sequence[Round], name: str) -> int:
    return sum(name in entry["order"] for entry in entries)


def _sound(rules: Rules, logs: Mapping[str, Sequence[float]]) -> bool:
    """Whether the control is known as well as everybody else, and is no other than the reference."""
    mine = logs.get(rules.control or "")
    if mine is None:
        return True
    return paired.reached([mine], rules.precision) and not _control_is_off(rules, logs)


def _control_is_off(rules: Rules, logs: Mapping[str, Sequence[float]]) -> bool:
    """Whether the reference differs from its own second run by more than the precision, so far."""
    mine = logs.get(rules.control or "")
    return bool(mine) and paired.beyond(paired.ratio([mine]).value, rules.precision)


def _due(
    rules: Rules,
    entries: Sequence[Round],
    name: str,
    open_: Collection[str],
    logs: Mapping[str, Sequence[float]],
) -> bool:
    """Whether it is a cell's turn: one of few rounds has them spread over the time of the others."""
    wanted = rules.rounds.get(name)
    if wanted is None or open_ <= rules.rounds.keys():
        return True
    spent = sum(entry["wall_s"] for entry in entries)
    passed = max(spent / rules.budget_s, len(entries) / rules.max_rounds)
    count = len(logs[name]) if name in logs else _played(entries, name)
    # One share more than there are rounds: the last one still fits.
    return passed * (wanted + 1) >= count


def _seconds(
    rules: Rules, entries: Sequence[Round]
) -> tuple[float, Callable[[Collection[str]], float]]:
    """What the rounds took, and what one of some members is expected to take (s)."""
    spent = sum(entry["wall_s"] for entry in entries)
    taken: dict[str, list[float]] = {}
    inside = 0.0
    for entry in entries:
        mine: dict[str, float] = {}
        for slot in entry["slots"]:
            mine[slot["strategy"]] = mine.get(slot["strategy"], 0.0) + slot["e2e_s"]
        for name, seconds in mine.items():
            if name not in rules.once:
                taken.setdefault(name, []).append(seconds)
                inside += seconds
    beside = max(0.0, spent - inside) / len(entries)

    def expected(members: Collection[str]) -> float:
        means = (sum(taken[name]) / len(taken[name]) for name in members if name in taken)
        return beside + sum(means)

    return spent, expected


def rested(rules: Rules, entries: Sequence[Round], members: Collection[str]) -> dict[str, int]:
    """From which round on a cell took no part, its ratio being known or its rounds being had.

    Parameters
    ----------
    entries:
        Rounds of one part.
    members:
        Its cells that did not fail.
    """
    found = {}
    for name in sorted(settled(rules, entries, list(members))):
        last = max((entry["round"] for entry in entries if name in entry["order"]), default=None)
        if last is not None and last < entries[-1]["round"]:
            found[name] = last + 1
    return found
