"""Which rows of an app table a figure shows: those of one machine."""

from __future__ import annotations

import pandas as pd


def one_machine(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows measured here, or those of the first recorded machine if there are none.

    Times of different machines do not belong on one axis without saying so.
    """
    if "machine" not in table or table.empty:
        return table
    names = list(dict.fromkeys(table["machine"]))
    return table[table["machine"] == ("here" if "here" in names else names[0])]
