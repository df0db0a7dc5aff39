"""What a figure shows of variants that it does not know: the name, in a spare look, never nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

_SPARE = (("purple", "P"), ("sky", "h"), ("yellow", "8"), ("grey", "p"), ("black", "<"))


def labels(known: Mapping[str, str], found: Iterable[Any]) -> dict[str, str]:
    """Return the known labels in their order, and behind them each other name as its own label.

    Parameters
    ----------
    known:
        Name of a variant to its label.
    found:
        Names in the table; missing ones are passed over.
    """
    return dict(known) | {name: _plain(name) for name in _unknown(known, found)}


def looks(known: Mapping[str, tuple], found: Iterable[Any]) -> dict[str, tuple]:
    """Return the same for looks: tuples of label, colour (a name of the palette) and marker.

    A known look may end after the colour; a spare one is cut to the same length.
    """
    length = len(next(iter(known.values())))
    spare = {
        name: (_plain(name), *_SPARE[place % len(_SPARE)])[:length]
        for place, name in enumerate(_unknown(known, found))
    }
    return dict(known) | spare


def _unknown(known: Mapping[str, Any], found: Iterable[Any]) -> list[str]:
    return [n for n in dict.fromkeys(found) if not pd.isna(n) and n not in known]


def _plain(name: str) -> str:
    return name.replace("_", " ")
