"""A number as the paper prints it: value, interval, unit, digits and the cells it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Value:
    """One entry of ``results/paper/values.json``.

    Attributes
    ----------
    value:
        A number, a string, a boolean, or None when nothing could be measured.
    ci:
        Lower and upper end of the 95 % interval in the same unit, or None.
    unit:
        Unit as the reader sees it (``s``, ``MiB``, ``%``, ``x``), empty for a pure number.
    digits:
        Decimals to print; rounding happens only when the value is rendered.
    cells:
        Paths of the records, relative to the results folder, that the value was computed from.
    rounds:
        Rounds behind a comparison of times; None of anything else.
    smallest_difference:
        What a comparison would have shown nine times out of ten, as a share; None if unknown.
    not_judged:
        Why no verdict may rest on a comparison; None where one may, and of anything else.
    """

    value: float | int | str | bool | None
    ci: tuple[float, float] | None = None
    unit: str = ""
    digits: int = 2
    cells: Sequence[str] = field(default_factory=tuple)
    rounds: int | None = None
    smallest_difference: float | None = None
    not_judged: str | None = None

    def as_json(self) -> dict:
        """Return the JSON form, with the field names of the contract."""
        record = asdict(self)
        for name in ("rounds", "smallest_difference", "not_judged"):
            if record[name] is None:
                del record[name]
        record["ci"] = list(self.ci) if self.ci is not None else None
        record["cells"] = sorted(self.cells)
        return record
