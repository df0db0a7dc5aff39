"""Every metric of a record with its formula, and the one rule of which samples count.

A *repeat* is one conversation (or one run through the steps of a fixed scenario): an iteration of an
old record, a round of a block. It counts whole or not at all, so that all turns have the same
repeats: one during whose turns something else took the machine is left out.

TTFT   time to first token (s)
TPOT   (E2E - TTFT)/(new tokens - 1), of a conversation: sum over sum of its turns (s)
E2E    end-to-end latency of a turn (s)
output throughput   new tokens of all requests of a batch/E2E (tokens/s)
speed-up            E2E of the reference over that of the strategy; geometric mean over turns, rounds
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.analysis import paired, statistics
from kvbench.analysis.paired import Paired
from kvbench.errors import InputError
from kvbench.records.identity import IDENTITY

if TYPE_CHECKING:
    import pandas as pd

#: Metrics of a conversation that are told with an interval.
CONVERSATION = ("e2e_s", "ttft_s", "tpot_s", "output_tokens_per_s")


def tpot(e2e_s: float, ttft_s: float, gaps: int) -> float:
    """Time per output token after the first (s); NaN for a single token.

    ``gaps`` is ``new_tokens - 1``, of a conversation summed over its turns.
    """
    return (e2e_s - ttft_s) / gaps if gaps > 0 else math.nan


def throughput(new_tokens: float, e2e_s: float) -> float:
    """Output throughput (tokens/s)."""
    return new_tokens / e2e_s


@dataclass(frozen=True)
class Repeats:
    """The timed repeats of one record; arrays are ``(turns, repeats)``, masks ``(repeats,)``."""

    scenario: str
    #: Id of the block whose cells took turns; None where cells ran one after the other.
    block: str | None
    turns: tuple[int, ...]
    #: Of each request of the batch.
    new_tokens: tuple[int, ...]
    #: Round of the block, or the iteration of an old record.
    rounds: tuple[int, ...]
    e2e_s: np.ndarray
    ttft_s: np.ndarray
    #: Nothing else took the machine during the repeat.
    clean: np.ndarray
    #: Requests that were generated for at once.
    batch: int = 1

    @cached_property
    def clean_columns(self) -> dict[int, int]:
        """Round to column, of the rounds that nothing disturbed."""
        return {number: i for i, number in enumerate(self.rounds) if self.clean[i]}

    @cached_property
    def _logs(self) -> dict[str, np.ndarray]:
        return {}

    def logs(self, metric: str) -> np.ndarray:
        """Logarithms of ``e2e_s`` or ``ttft_s``, taken once for all cells it is compared with."""
        if metric not in self._logs:
            self._logs[metric] = np.log(getattr(self, metric))
        return self._logs[metric]

    @property
    def kept(self) -> np.ndarray:
        """Mask of the repeats that count: the clean ones, or all when there is not even one."""
        return self.clean if self.clean.any() else np.ones_like(self.clean)

    def by_turn(self, metric: str = "e2e_s") -> dict[tuple[str, int], list[float]]:
        """(scenario, turn) to the kept repeats of ``e2e_s`` or ``ttft_s``."""
        table = getattr(self, metric)[:, self.kept]
        return {
            (self.scenario, turn): row.tolist() for turn, row in zip(self.turns, table, strict=True)
        }

    def conversations(self) -> dict[str, list[float]]:
        """Metric to one number per kept repeat; latencies are means over the turns."""
        e2e, ttft = (table[:, self.kept].sum(axis=0) for table in (self.e2e_s, self.ttft_s))
        turns, new = len(self.turns), sum(self.new_tokens)
        gaps = new - turns
        return {
            "e2e_s": (e2e / turns).tolist(),
            "ttft_s": (ttft / turns).tolist(),
            "tpot_s": [tpot(*pair, gaps) for pair in zip(e2e.tolist(), ttft.tolist(), strict=True)],
            "output_tokens_per_s": throughput(self.batch * new, e2e).tolist(),
        }


def repeats(record: Mapping[str, Any]) -> Repeats:
    """Read the samples of a record that succeeded; records without rounds are read as they were."""
    turns = record["turns"]
    count = min((len(turn["samples"]) for turn in turns), default=0)
    first = turns[0]["samples"][:count] if turns else []
    clean = np.ones(count, dtype=bool)
    for turn in turns:
        clean &= [not sample["disturbed"] for sample in turn["samples"][:count]]

    def table(name: str) -> np.ndarray:
        return np.array([[s[name] for s in turn["samples"][:count]] for turn in turns], dtype=float)

    return Repeats(
        scenario=record["cell"]["scenario"],
        block=record["block"]["id"] if record.get("block") else None,
        turns=tuple(turn["turn"] for turn in turns),
        new_tokens=tuple(turn["new_tokens"] for turn in turns),
        rounds=tuple(sample.get("round", sample["iteration"]) for sample in first),
        e2e_s=table("e2e_s"),
        ttft_s=table("ttft_s"),
        clean=clean,
        batch=record["cell"].get("batch", 1),
    )


def log_ratios(numerator: Repeats, denominator: Repeats, metric: str = "e2e_s") -> np.ndarray:
    """Log ratio of every round in which neither side was disturbed, in the order of the rounds.

    Raises
    ------
    InputError
        The two were not measured in one block, or share no turn.
    """
    if numerator.block is None or numerator.block != denominator.block:
        raise InputError("only cells of one block are paired within its rounds")
    turns = [turn for turn in numerator.turns if turn in denominator.turns]
    if not turns:
        raise InputError(f"block {numerator.block}: the two cells share no turn")
    above, below = numerator.clean_columns, denominator.clean_columns
    common = [number for number in above if number in below]
    sides = []
    for side, columns in ((numerator, above), (denominator, below)):
        table = side.logs(metric)[:, [columns[number] for number in common]]
        if len(turns) < len(side.turns):
            table = table[[side.turns.index(turn) for turn in turns]]
        sides.append(table)
    return (sides[0] - sides[1]).mean(axis=0)


@dataclass(frozen=True)
class Comparison:
    """A ratio of two cells: paired where they took turns, a bare value where they did not."""

    value: float
    paired: Paired | None
    #: Why cells that took turns could not be paired, if so.
    reason: str | None = None

    @property
    def interval(self) -> statistics.Interval:
        """The ratio; NaN ends where a single round, or no pairing, leaves it unknown."""
        if self.paired is None:
            return statistics.Interval(self.value, math.nan, math.nan)
        return self.paired.interval

    @property
    def rounds(self) -> int:
        """Rounds behind the ratio; 0 for cells that ran one after the other."""
        return self.paired.rounds if self.paired else 0

    @property
    def blocks(self) -> int:
        """Blocks behind the ratio; 0 for cells that ran one after the other."""
        return self.paired.blocks if self.paired else 0

    @property
    def smallest_difference(self) -> float:
        """What would have been found nine times out of ten; NaN where nothing is known."""
        return self.paired.smallest_difference if self.paired else math.nan


def compare(
    numerators: Iterable[Repeats], denominators: Iterable[Repeats], metric: str = "e2e_s"
) -> Comparison:
    """The ratio of two strategies' times over all blocks that measured both.

    Cells that share no block, such as all of the records made before there were rounds, stood in
    different weather: their ratio of medians is a value and nothing more.

    Raises
    ------
    InputError
        The two sides share no turn.
    """
    numerators, denominators = list(numerators), list(denominators)
    there = {side.block: side for side in denominators if side.block is not None}
    together = [
        log_ratios(side, there[side.block], metric) for side in numerators if side.block in there
    ]
    return _paired_or_bare(
        [logs for logs in together if logs.size],
        (_pooled(side, metric) for side in (numerators, denominators)),
        bool(together),
    )


def _paired_or_bare(
    series: list, sides: Iterable[Mapping[Hashable, list[list[float]]]], together: bool
) -> Comparison:
    """The ratio over blocks where there is a clean round, or else the bare one of the medians."""
    if series:
        found = paired.ratio(series)
        return Comparison(found.value, found)
    value = statistics.ratio_interval(*sides).value
    return Comparison(value, None, ALL_DISTURBED if together else None)


def speedup(reference: Iterable[Repeats], strategy: Iterable[Repeats]) -> Comparison:
    """How many times as long the reference takes: E2E of the reference over the strategy's."""
    return compare(reference, strategy)


def _pooled(sides: Iterable[Repeats], metric: str) -> dict[Hashable, list[list[float]]]:
    found: dict[Hashable, list[list[float]]] = {}
    for side in sides:
        for key, values in side.by_turn(metric).items():
            found.setdefault(key, []).append(values)
    return found


# ------------------------------------------------------------------ verdicts


@dataclass(frozen=True)
class Evidence:
    """Rounds and blocks that a verdict needs on a machine, by its own A/A test or another's."""

    rounds: int = paired.FEWEST_ROUNDS
    blocks: int = paired.FEWEST_BLOCKS


#: Why a block without a single clean round is not judged.
ALL_DISTURBED = "every round was disturbed"
#: What a reason begins with when a block's control is off.
CONTROL_OFF = "the reference differs from itself"
#: How far a block's control may differ from 1 where its record states no precision.
PRECISION = 0.03


def why_not_judged(
    rounds: int,
    blocks: int,
    needed: Evidence,
    control: statistics.Interval | None = None,
    precision: float = PRECISION,
) -> str | None:
    """Why no verdict may rest on a ratio, in a few words, or None when one may.

    Parameters
    ----------
    rounds, blocks:
        What the ratio was measured in; 0 for cells that ran one after the other.
    control:
        Ratio of the reference to its own second run in the same blocks, if there was one. It
        speaks against a verdict where :func:`paired.off` says so.
    precision:
        That the blocks were measured to.
    """
    if rounds == 1:
        return "one run"
    if rounds < needed.rounds:
        return f"not enough rounds: {rounds} of {needed.rounds}"
    if blocks < needed.blocks:
        return f"not enough rounds: {blocks} blocks of {needed.blocks}"
    if control is not None and paired.off(control, precision):
        return f"{CONTROL_OFF} by {100 * abs(control.value - 1):.1f} %"
    return None


# ------------------------------------------------------------------ tables of samples


def counted(samples: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``kv_samples`` that count: whole repeats that nothing disturbed.

    Where every repeat of a cell's process was disturbed, all of them count.
    """
    if samples.empty:
        return samples
    process = [*(name for name in IDENTITY if name in samples), "replicate"]
    disturbed = samples["disturbed"].astype(str).eq("True")
    if not disturbed.any():
        return samples
    keys = [samples[name] for name in process]
    dirty = disturbed.groupby([*keys, samples["iteration"]], dropna=False).transform("any")
    hopeless = dirty.groupby(keys, dropna=False).transform("all")
    return samples[~dirty | hopeless]


def turn_replicates(samples: pd.DataFrame, metric: str) -> list[list[float]]:
    """Replicates of repeats of one turn's rows, as :func:`statistics.median_interval` takes them.

    The rows are counted ones (:func:`counted`).
    """
    rows = samples[samples[metric].notna()]
    return [part.tolist() for _, part in rows.groupby("replicate", sort=True)[metric]]


def conversations(samples: pd.DataFrame) -> pd.DataFrame:
    """One row per repeat of one cell, the unit that medians are taken over, by the same formulas.

    Index: replicate and iteration. Columns: :data:`CONVERSATION`, and ``disturbed``.
    """
    disturbed = samples["disturbed"].astype(str).eq("True")
    groups = samples.assign(disturbed=disturbed).groupby(["replicate", "iteration"], sort=True)
    table = groups[["e2e_s", "ttft_s"]].mean()
    total, first, new = groups["e2e_s"].sum(), groups["ttft_s"].sum(), groups["new_tokens"].sum()
    gaps = new - groups.size()
    table["tpot_s"] = ((total - first) / gaps).where(gaps > 0)
    batch = groups["batch"].first() if "batch" in samples else 1
    table["output_tokens_per_s"] = throughput(new * batch, total)
    table["disturbed"] = groups["disturbed"].any()
    return table


def by_turn(samples: pd.DataFrame, metric: str) -> dict[Hashable, list[list[float]]]:
    """(scenario, turn) to replicates of counted repeats, from rows of one cell of ``kv_samples``."""
    rows = counted(samples)
    rows = rows[rows[metric].notna()].sort_values("iteration")
    return {
        (scenario, int(turn)): turn_replicates(part, metric)
        for (scenario, turn), part in rows.groupby(["scenario", "turn"], sort=True)
    }


def compare_rows(
    samples: pd.DataFrame, numerator: str, denominator: str, metric: str
) -> Comparison:
    """:func:`compare` from rows of ``kv_samples`` of one model, place and scenario.

    Raises
    ------
    InputError
        The two strategies share no turn, or a number is not positive.
    """
    together = _series(samples, numerator, denominator, metric)
    sides = (
        by_turn(samples[samples["strategy"] == name], metric) for name in (numerator, denominator)
    )
    return _paired_or_bare([logs for logs in together if logs], sides, bool(together))


def _series(rows: pd.DataFrame, numerator: str, denominator: str, metric: str) -> list[list[float]]:
    """Log ratios block by block, one list for each block that measured both."""
    if "block" not in rows:
        return []
    rows = rows[rows["block"].notna() & rows[metric].notna()]
    found = []
    for _, part in rows.groupby("block", sort=True):
        tables = []
        for name in (numerator, denominator):
            own = part[part["strategy"] == name]
            dirty = set(own.loc[own["disturbed"].astype(str).eq("True"), "round"])
            own = own[~own["round"].isin(dirty)]
            tables.append(own.pivot_table(index="round", columns="turn", values=metric))
        above, below = (np.log(table) for table in tables)
        logs = (above - below).dropna(axis=1, how="all").dropna(axis=0)
        if {numerator, denominator} <= set(part["strategy"]):
            found.append(logs.mean(axis=1).sort_index().tolist() if logs.size else [])
    return found
