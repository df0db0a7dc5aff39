"""KV-cache strategies: one small class each, found by being a subclass with a name.

To add one, write a frozen dataclass that derives from :class:`kvbench.strategies.base.Strategy` in
any module of this package. The configuration, the DAG, the tables and the figures then know it.
Importing this package imports neither torch nor transformers: planning must stay fast.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from kvbench.errors import InputError, one_of
from kvbench.strategies.base import Generation, Session, Strategy

__all__ = ["REFERENCE", "Generation", "Session", "Strategy", "get", "names", "without_reuse"]

#: The strategy that stands for exact attention: the others' tokens and quality are held against it.
REFERENCE = "dynamic"


@cache
def _registry() -> dict[str, type[Strategy]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found: dict[str, type[Strategy]] = {}
    pending = list(Strategy.__subclasses__())
    while pending:
        strategy = pending.pop()
        pending.extend(strategy.__subclasses__())
        if "name" in vars(strategy):
            other = found.setdefault(strategy.name, strategy)
            if other is not strategy:
                raise InputError(
                    f"{strategy.__module__}: the name {strategy.name!r} is taken by {other.__module__}"
                )
    return dict(sorted(found.items()))


def names() -> list[str]:
    """Names of all strategies, sorted."""
    return list(_registry())


def get(name: str) -> Strategy:
    """Return the strategy called ``name`` with its usual options.

    Raises
    ------
    InputError
        If there is none; the message names the known ones.
    """
    one_of("strategy", name, names())
    return _registry()[name]()


def without_reuse(name: str) -> str | None:
    """The same cache made anew for every turn, or None if the strategy does not reuse turns.

    A name that no module here knows, such as one of another version's records, counts as not reusing.
    """
    known = _registry().get(name)
    return known.without_reuse if known is not None and known.reuses_turns else None
