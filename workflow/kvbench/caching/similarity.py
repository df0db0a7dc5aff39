"""Score scales of semantic caches, and what a threshold of each means as a cosine.

For unit vectors the squared Euclidean distance is ``D = 2 (1 - cos)``. Rules that are in use
all say "threshold t" and mean different cosines:

===================  ======================  =======================
rule                 hit if                  the cosine it asks for
===================  ======================  =======================
``cosine``           ``cos >= t``            ``t``
``l2_snippet``       ``D < 1 - t``           ``1 - (1 - t) / 2``
``gptcache``         ``4 - D >= 4 t``        ``2 t - 1``
===================  ======================  =======================

``l2_snippet`` is the guide's: FAISS' ``IndexFlatL2`` returns *squared* distances, compared there
with one minus a cosine. On vectors that are not normalised it means no cosine at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np


def squared_l2(cosine: np.ndarray | float) -> np.ndarray | float:
    """Return the squared distance of unit vectors with this cosine: ``2 (1 - cos)``."""
    return 2 * (1 - np.asarray(cosine))


def cosine_of_squared_l2(distance: np.ndarray | float) -> np.ndarray | float:
    """Return the cosine of unit vectors at this squared distance: ``1 - D / 2``."""
    return 1 - np.asarray(distance) / 2


#: Rule name to the function that says whether a squared distance is a hit at a threshold.
HITS: Mapping[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "cosine": lambda distance, threshold: cosine_of_squared_l2(distance) >= threshold,
    "l2_snippet": lambda distance, threshold: np.asarray(distance) < 1 - threshold,
    "gptcache": lambda distance, threshold: 4 - np.asarray(distance) >= 4 * threshold,
}


def cosine_asked(rule: str, threshold: float) -> float:
    """Return the cosine that ``threshold`` means under ``rule``, for unit vectors.

    Raises
    ------
    ValueError
        If the rule is unknown or the threshold outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be within [0, 1]")
    if rule == "cosine":
        return threshold
    if rule == "l2_snippet":
        return 1 - (1 - threshold) / 2
    if rule == "gptcache":
        return 2 * threshold - 1
    raise ValueError(f"unknown rule {rule!r}; known rules: {', '.join(HITS)}")
